"""How alike heads and layers are, against divergences of whole maps, row by row from the definition."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import reference
from support.image import SWIN, made_of
from support.inside import kept, read_in_chunks
from support.models import randomise, tiny
from support.modes import peak_of
from support.reading import record, record_one
from torch import Tensor, nn

from hookattn import AttentionRecorder, StaleMapError
from hookattn.analysis import compare_with_mean, divergence_from_mean, similarity


class Unknown(nn.Module):
    """Attention that no recipe knows; some keys are closed, and one query sees none."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)
        self.mask = torch.rand(11, 11) < 0.6
        self.mask[1] = False

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask).transpose(1, 2).flatten(2)


def unknown() -> tuple[nn.Module, Tensor]:
    return randomise(nn.Sequential(Unknown(), Unknown())).eval(), torch.randn(3, 11, 16)


swin = made_of("swin_tiny_patch4_window7_224", (64, 64), **SWIN, img_size=64)
MODELS: dict[str, tuple[Callable[[], tuple[nn.Module, Any]], slice]] = {
    "plain": (lambda: tiny("vit", batch=3), slice(None)),
    "registers": (lambda: tiny("vit_registers", depth=3), slice(None)),
    "shifted windows": (swin, slice(1, 2)),
    "replay": (unknown, slice(None)),
}


@pytest.mark.parametrize("chunk", [1, 900, 10**9])
@pytest.mark.parametrize("keep", ["inputs", "maps"])
@pytest.mark.parametrize("name", MODELS)
def test_divergences_are_those_of_whole_maps(monkeypatch: pytest.MonkeyPatch, name: str, keep: Any, chunk: int) -> None:
    make, layers = MODELS[name]
    maps = record(*make(), keep=keep).maps[layers]
    heads = [m[:, head] for m in maps for head in range(m.shape[1])]
    read_in_chunks(monkeypatch, chunk)
    found = similarity(maps)
    assert found.names == tuple(f"{m.name}, head {head}" for m in maps for head in range(m.shape[1]))
    expected = reference.divergences(heads)
    assert expected.max() > 0.1
    torch.testing.assert_close(found.divergence.double(), expected, rtol=1e-5, atol=1e-6)
    of_layers = similarity(maps, by="layers")
    assert of_layers.names == tuple(m.name for m in maps)
    torch.testing.assert_close(
        of_layers.divergence.double(), reference.divergences([m[...].mean(1) for m in maps]), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("name", MODELS)
def test_heads_are_compared_with_the_mean_of_their_layer(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    make, layers = MODELS[name]
    recorded = record(*make())
    for m in recorded.maps[layers]:
        by_hand = [
            [float(reference.divergences([a[None, head], a.mean(0)[None]])[0, 1]) for head in range(m.shape[1])] for a in m[...]
        ]
        read_in_chunks(monkeypatch, 900)
        torch.testing.assert_close(divergence_from_mean(m).double(), torch.tensor(by_hand).double(), rtol=1e-4, atol=1e-6)
        rows = compare_with_mean(m)
        assert [row[:3] for row in rows] == [(m.name, 0, head) for head in range(m.shape[1])]
        assert [row.divergence for row in rows] == pytest.approx(torch.tensor(by_hand).mean(0).tolist(), rel=1e-4)
    assert [row.depth for row in compare_with_mean(recorded)] == [
        depth for depth, m in enumerate(recorded.maps.values()) for _ in range(m.shape[1])
    ]


def test_divergences_are_what_they_are_called() -> None:
    m = record_one(*tiny("vit"))
    shifted = torch.stack([torch.eye(17), torch.eye(17).roll(1, 0), torch.eye(17)])
    found = similarity(kept(shifted.expand(2, -1, -1, -1), m)).divergence
    torch.testing.assert_close(found, torch.tensor([[0.0, 1, 0], [1, 0, 1], [0, 1, 0]]) * torch.tensor(2.0).log())
    real = similarity(record(*tiny("vit"))).divergence
    assert torch.equal(real, real.mT)
    assert (real.diagonal() == 0).all()
    assert 0 < real.max() < torch.tensor(2.0).log()


def test_nothing_is_below_zero() -> None:
    m = record_one(*tiny("vit"))
    alike = torch.rand(2, 1, 17, 17) * (1 + 1e-7 * torch.randn(2, 12, 17, 17))
    nearly = kept(alike / alike.sum(-1, keepdim=True), m)
    found = similarity(nearly).divergence
    assert 0 <= found.min() <= found.max() < 1e-6
    assert divergence_from_mean(nearly).min() >= 0


def test_each_layer_may_have_its_number_of_heads() -> None:
    m = record_one(*tiny("vit"))
    other = kept(m[...][:, :2], m)
    found = similarity([m, other])
    assert len(found.names) == 5
    assert float(found.divergence[0, 3]) == float(found.divergence[1, 4]) == 0
    torch.testing.assert_close(found.divergence[3, 4], found.divergence[0, 1])


def test_layers_that_cannot_be_compared_are_named() -> None:
    windows = record(*swin())
    with pytest.raises(ValueError, match=r"'layers\.0\.blocks\.0\.attn' and 'layers\.0\.blocks\.1\.attn'.*places on the image"):
        similarity(windows.maps[:2])
    with pytest.raises(ValueError, match=r"'layers\.1\.blocks\.0\.attn'.*queries, keys\).*similarity\(m\)"):
        similarity(windows.maps[::2])
    one, other = record_one(*tiny("vit")), record_one(*tiny("vit", batch=1))
    with pytest.raises(ValueError, match=r"\(2, 17, 17\) and \(1, 17, 17\)"):
        similarity([one, other], by="layers")
    registers, tokens = (
        record_one(*tiny("vit_registers")),
        record_one(tiny("vit", img_size=(64, 80))[0], torch.randn(2, 3, 64, 80)),
    )
    assert registers.shape == tokens.shape
    with pytest.raises(ValueError, match="places on the image"):
        similarity([registers, tokens])
    with pytest.raises(ValueError, match="there are no maps to compare"):
        similarity([])
    with pytest.raises(ValueError, match='by="heads" or by="layers"'):
        similarity([one], by="images")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"by=a list is not known.*of the maps of one forward"):
        similarity([one], [one])  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", ["autocast", "inference", "half", "train", "graph"])
def test_divergences_are_those_of_the_modes_of_the_call(mode: str) -> None:
    model, x = tiny("vit", attn_drop_rate=0.2)
    if mode == "half":
        model, x = model.to(torch.bfloat16), x.to(torch.bfloat16)
    model.train(mode == "train")
    modes = torch.autocast("cpu", enabled=mode == "autocast"), torch.inference_mode(mode == "inference")
    with (
        AttentionRecorder(model, detach=mode != "graph") as recorded,
        modes[0],
        modes[1],
        torch.set_grad_enabled(mode == "graph"),
    ):
        model(x)
    assert recorded.maps[0][...].requires_grad == (mode == "graph")
    heads = [m[:, head].detach() for m in recorded.maps.values() for head in range(3)]
    with torch.autocast("cpu"):
        found = similarity(recorded).divergence
    assert found.dtype == torch.float32
    assert not found.requires_grad
    torch.testing.assert_close(found.double(), reference.divergences(heads), rtol=1e-4, atol=1e-6)


def test_no_more_than_a_chunk_of_each_layer_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = tiny("vit", img_size=512, patch_size=16, embed_dim=12, depth=3)
    recorded = record(model, torch.randn(2, 3, 512, 512))
    chunk = 3 * 1025 * 80
    read_in_chunks(monkeypatch, chunk)
    projected = 4 * 2 * 1025 * 36 * 6
    assert peak_of(lambda: similarity(recorded)) <= 4 * (3 + 4) * chunk + projected < recorded.maps[0][...].nbytes / 2


def test_maps_that_are_stale_say_so() -> None:
    model, x = tiny("vit")
    recorded = record(model, x)
    with torch.no_grad():
        model.blocks[1].attn.qkv.weight.add_(1)
    with pytest.raises(StaleMapError, match=r"blocks\.1\.attn"):
        similarity(recorded)
