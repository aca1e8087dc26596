"""A model that was made for another size of images after a forward: what is read is of that forward, or a StaleMapError."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from support.models import randomise

from hookattn import AttentionMap, AttentionRecorder, StaleMapError, TokenError

VIT = {"depth": 2, "embed_dim": 48, "num_heads": 3}
SWIN = {"embed_dim": 12, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4}
BOTH = [{"img_size": (96, 96)}, {"img_size": (64, 128)}]
FINER = [{"img_size": (32, 32), "patch_size": 8}, {"img_size": (64, 128), "patch_size": (16, 32)}]  # as many tokens, elsewhere
WINDOWS = [*BOTH, {"img_size": (64, 64), "window_size": (2, 8)}]
# (model, how it is made, size of its images, what is set then)
CASES: list[tuple[str, dict[str, Any], int, list[dict[str, Any]]]] = [
    ("vit_tiny_patch16_224", VIT, 64, [*BOTH, *FINER, {"patch_size": 8}]),
    ("vit_tiny_patch16_224", {**VIT, "dynamic_img_size": True}, 64, [*BOTH, *FINER, {"patch_size": 8}]),
    ("vit_small_patch16_rope_224", VIT, 64, [*BOTH, *FINER]),
    ("vit_small_patch16_dinov3", VIT, 64, [*BOTH, *FINER]),
    ("beit_base_patch16_224", VIT, 64, BOTH),
    ("vit_relpos_small_patch16_224", VIT, 64, [*BOTH, *FINER]),
    ("swin_tiny_patch4_window7_224", SWIN, 64, WINDOWS),
    ("swinv2_tiny_window8_256", SWIN, 64, WINDOWS),
    ("swinv2_cr_tiny_224", SWIN, 64, WINDOWS),
    ("maxvit_nano_rw_256", {}, 64, [{"img_size": (64, 128)}, {"img_size": (64, 64), "window_size": (1, 2)}]),
    ("coatnet_rmlp_nano_rw_224", {}, 64, [{"img_size": (64, 128)}]),
    ("efficientvit_m0", {}, 128, [{"img_size": 224}]),
    ("efficientvit_m0", {}, 224, [{"img_size": 64}]),
]
SETTINGS = [
    pytest.param(name, options, size, settings, id=f"{name}-{size}-{n}")
    for name, options, size, several in CASES
    if timm.is_model(name)
    for n, settings in enumerate(several)
]


def facts(m: AttentionMap) -> dict[str, Any]:
    """Of one map, each fact or the error it gives."""
    found: dict[str, Any] = {"shape": m.shape, "axes": m.axes}
    reads = {"map": lambda: m[...], "verified": m.verify, "places": lambda: m.tokens.patches, "image": lambda: m.image("mean")}
    for fact, read in {**reads, "point": lambda: m.image((0.9, 0.3)), "grid": lambda: m.tokens.grid_size}.items():
        try:
            found[fact] = read()
        except (StaleMapError, TokenError) as error:
            found[fact] = error
    return found


@pytest.mark.filterwarnings("ignore")  # of timm's resampling
@pytest.mark.parametrize(("name", "options", "size", "settings"), SETTINGS)
def test_what_is_read_after_it_is_that_of_the_forward(
    name: str, options: dict[str, Any], size: int, settings: dict[str, Any]
) -> None:
    model: Any = randomise(timm.create_model(name, img_size=size, **options)).eval()
    if not hasattr(model, "set_input_size"):
        pytest.skip("an older timm")
    x = torch.randn(2, 3, size, size)
    with AttentionRecorder(model) as rec, torch.no_grad():
        model(x)
    with AttentionRecorder(model, keep="maps") as kept, torch.no_grad():
        model(x)
    before = {name: facts(m) for name, m in rec.maps.items()}
    model.set_input_size(**settings)
    for name, m in rec.maps.items():
        for fact, now in facts(m).items():
            then = before[name][fact]
            if isinstance(now, Exception):  # a stale map, or no grid as the model would cut now
                assert isinstance(now, StaleMapError if fact in ("map", "verified") else (StaleMapError, TokenError)), now
            elif isinstance(now, torch.Tensor):
                assert torch.equal(now, then), fact
            else:
                assert now == then, fact
        assert torch.equal(kept.maps[name][...], before[name]["map"])
        assert torch.equal(kept.maps[name].image("mean"), before[name]["image"])


def test_each_forward_of_a_block_has_the_grid_that_it_was_cut_into() -> None:
    model: Any = randomise(timm.create_model("vit_tiny_patch16_224", img_size=64, **VIT)).eval()
    if not hasattr(model, "set_input_size"):
        pytest.skip("an older timm")
    with AttentionRecorder(model, passes="all") as rec, torch.no_grad():
        model(torch.randn(2, 3, 64, 64))
        model.set_input_size(img_size=(64, 128), patch_size=(8, 16))
        model(torch.randn(2, 3, 64, 128))
    assert [maps[0].tokens.grid_size for maps in rec.passes] == [(4, 4), (8, 8)]
    cells = [maps[0]._geometry.cell_size(maps[0].tokens.grid_size) for maps in rec.passes]
    assert cells == [(16, 16), (8, 16)]
