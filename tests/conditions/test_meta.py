"""Models without values, wholly or in part: shapes are told, values are refused with what to type; what is fetched is read."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from support.inside import forget_what_was_established
from support.models import small, tiny
from torch import Tensor, nn

import hookattn
from hookattn import AttentionRecorder, HookattnError, NoMapError, UnreadableError
from hookattn.analysis import contributions, entropy, rollout, summarize_heads
from hookattn.extraction import extract

SMALL = ["swin_tiny_patch4_window7_224"]
ADVICE = r"model\.to_empty\(device=\"cpu\"\) and model\.load_state_dict\(\.\.\.\)"
READINGS: dict[str, Callable[[AttentionRecorder], object]] = {
    "all": lambda rec: rec.maps[0][...],
    "row": lambda rec: rec.maps[0][:, :, 0],
    "rows": lambda rec: rec.rows(0),
    "image": lambda rec: rec.maps[0].image(),
    "numpy": lambda rec: np.asarray(rec.maps[0]),
    "keys": lambda rec: rec.maps[0].k[...],
    "values": lambda rec: rec.maps[0].v[...],
    "effective": lambda rec: rec.maps[0].effective[...],
    "output": lambda rec: rec.maps[0].output(),
    "verify": lambda rec: rec.verify(),
    "contributions": lambda rec: contributions(rec.maps[0])[...],
    "entropy": lambda rec: entropy(rec.maps[0]),
    "rollout": lambda rec: rollout(rec),
    "summary": lambda rec: summarize_heads(rec),
}


class Own(nn.Module):
    """Attention that has no recipe."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        return self.proj(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def on_meta(model: nn.Module, x: Tensor, **options: Any) -> AttentionRecorder:
    with AttentionRecorder(model.to("meta"), **options) as rec, torch.no_grad():
        model(x.to("meta"))
    return rec


@pytest.mark.parametrize("reading", READINGS)
def test_shapes_are_told_and_values_refused_with_what_to_type(reading: str) -> None:
    rec = on_meta(*tiny("vit"))
    assert rec.maps[0].device.type == "meta"
    assert rec.maps[0].shape == (2, 3, 17, 17)
    with pytest.raises(UnreadableError, match=ADVICE):
        READINGS[reading](rec)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("keep", ["inputs", "maps"])
def test_so_with_other_attention_and_while_it_runs(own: bool, keep: Any) -> None:
    model, x = (nn.Sequential(Own()), torch.zeros(2, 5, 16)) if own else small(SMALL[0])
    rec = on_meta(model, x, keep=keep, layers="0" if own else None)
    with pytest.raises(UnreadableError, match=ADVICE):
        rec.maps[0][...]


def test_what_is_wanted_on_the_meta_device_lies_there() -> None:
    model, x = tiny("vit")
    assert on_meta(model, x, device="meta").maps[0][:, :, 0].is_meta


def test_what_a_function_makes_while_the_model_runs_is_refused_when_it_is_read() -> None:
    rec = on_meta(*tiny("vit"), keep=entropy)
    with pytest.raises(HookattnError, match=ADVICE):
        rec.reduced[rec.layers[0]]


def test_a_model_that_is_half_loaded_says_what_is_missing() -> None:
    model, x = tiny("vit")
    model.cls_token = nn.Parameter(model.cls_token.to("meta"))
    with AttentionRecorder(model) as rec, pytest.raises(RuntimeError), torch.no_grad():
        model(x)
    with pytest.raises(NoMapError, match=r"1 of its \d+ tensors lie on the meta device .* cls_token: give"):
        _ = rec.maps
    model, x = tiny("vit")
    model.blocks[0].attn.qkv.to("meta")
    with AttentionRecorder(model) as rec, pytest.raises(RuntimeError), torch.no_grad():
        model(x)
    with pytest.raises(UnreadableError, match=r"(?i)give the model memory"):
        rec.maps[0][...]


@pytest.mark.parametrize("name", ["vit", "beit", "relpos", *SMALL])
def test_a_projection_without_values_is_not_taken_for_memory_that_nobody_has_written(name: str) -> None:
    """As PyTorch takes it, whose model runs."""
    model, x = small(name) if name in SMALL else tiny(name)
    layer = next(module for module in model.modules() if hasattr(module, "qkv")).qkv
    layer.weight = nn.Parameter(layer.weight.to("meta"))
    with AttentionRecorder(model) as rec, suppress(RuntimeError), torch.no_grad():
        model(x)
    for read in (lambda: rec.maps[0][...], lambda: rec.maps[0][:, :, 0], lambda: rec.maps[0].k[...]):
        with pytest.raises(UnreadableError, match=ADVICE):
            read()


@pytest.mark.parametrize("loaded", ["qkv", "q_norm", "k_norm"])
def test_a_model_of_which_little_is_loaded_is_refused_likewise(loaded: str) -> None:
    """PyTorch says then that something is "not on the expected device meta!"."""
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, qk_norm=True).eval().to("meta")
    model.blocks[0].attn.get_submodule(loaded).to_empty(device="cpu")
    with AttentionRecorder(model) as rec, pytest.raises(RuntimeError), torch.no_grad():
        model(torch.randn(1, 3, 32, 32, device="meta"))
    with pytest.raises(UnreadableError, match=f"(?i){ADVICE}"):
        rec.maps[0][...]


def test_a_data_set_and_a_file_are_refused(tmp_path: Path) -> None:
    model, x = tiny("vit")
    rec = on_meta(model, x)
    with pytest.raises(UnreadableError, match=ADVICE):
        rec.save(tmp_path / "x.safetensors")
    data = torch.utils.data.TensorDataset(x)
    with pytest.raises(HookattnError, match=ADVICE):
        extract(model, data, tmp_path / "x.zarr", "entropy")
    assert [*tmp_path.iterdir()] == []


class Fetched:
    """As offloading has it: a module's own parameters lie on the meta device, but while its forward runs."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.forward = module, module.forward
        self.values = {name: p.detach().clone() for name, p in module.named_parameters(recurse=False)}
        module.forward = self.run
        self.put("meta")

    def put(self, device: str) -> None:
        for name, value in self.values.items():
            self.module._parameters[name] = nn.Parameter(value.to(device), requires_grad=False)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        self.put("cpu")
        try:
            return self.forward(*args, **kwargs)
        finally:
            self.put("meta")


def fetching(name: str) -> tuple[nn.Module, Tensor, list[Tensor]]:
    """A model whose parameters are fetched, images, and the maps it had before."""
    model, x = small(name) if name in SMALL else tiny(name)
    with AttentionRecorder(model) as rec, torch.no_grad():
        model(x)
    maps = [m[...] for m in rec.maps.values()]
    for module in [*model.modules()]:
        if module._parameters:
            Fetched(module)
    assert all(p.is_meta for p in model.parameters())
    return model, x, maps


@pytest.mark.parametrize("keep", ["inputs", "maps"])
@pytest.mark.parametrize("name", ["vit", "relpos", *SMALL])
def test_parameters_that_are_fetched_when_a_module_is_called_are_read(name: str, keep: Any) -> None:
    model, x, maps = fetching(name)
    with AttentionRecorder(model, keep=keep) as rec, torch.no_grad():
        model(x)
    assert not rec.maps.skipped
    for m, each in zip(rec.maps.values(), maps, strict=True):
        torch.testing.assert_close(m[...], each, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("known", [False, True])
def test_a_forward_that_takes_what_was_not_fetched_is_refused(known: bool) -> None:
    """Be it known or not, of another such module, where its map stands."""
    forget_what_was_established()
    model, x = tiny("beit")
    for block in model.blocks if known else ():
        block.attn.forward = block.attn.forward  # not by its recipe
        with AttentionRecorder(block.attn) as rec, torch.no_grad():
            model(x)
        assert rec.maps[0].shape
        del block.attn.forward
    model, x, _ = fetching("beit")  # which takes the weight of its projection without calling it
    with AttentionRecorder(model) as rec, torch.no_grad():
        model(x)  # PyTorch lets it run, on memory that nobody has written
    with pytest.raises(UnreadableError, match=f"weights of a projection lie on the meta device .* {ADVICE}"):
        rec.maps[0][...]


class TakenAttention(nn.Module):
    """Takes the weight of a convolution without calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Conv2d(8, 24, 1, device="meta")

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = nn.functional.conv2d(x, self.qkv.weight).flatten(2).mT.unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        return nn.functional.scaled_dot_product_attention(q, k, v)


def test_so_is_one_that_convolves_by_what_has_no_values() -> None:
    attention = TakenAttention()
    with AttentionRecorder(attention) as rec, torch.no_grad():
        attention(torch.randn(2, 8, 3, 3))
    with pytest.raises(UnreadableError, match=f"weights of a projection lie on the meta device .* {ADVICE}"):
        rec.maps[0][...]


def test_inspection_works_without_values() -> None:
    model, x = tiny("vit")
    found = hookattn.inspect(model.to("meta"), x.to("meta"))
    assert [each.reason for each in found.entries] == [""] * len(found.entries)
