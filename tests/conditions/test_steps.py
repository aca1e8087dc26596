"""Steps of optimizers: what was written before a map is read is noticed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.inside import forget_steps
from support.models import tiny
from support.reading import read, same
from timm.utils import ModelEmaV3
from torch.optim import optimizer as torch_optimizer

from hookattn import AttentionRecorder, StaleMapError


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_a_step_of_any_optimizer_makes_maps_stale(kind: Any, fused: bool) -> None:
    model, x = tiny("vit")
    optimizer = kind(model.parameters(), lr=0.1, fused=fused)
    with AttentionRecorder(model) as rec:
        model(x).square().sum().backward()
    rec.maps[0][0]
    optimizer.step()
    with pytest.raises(StaleMapError, match="changed in place after the forward"):
        rec.maps[0][0]


def one_weight(qkv: Any) -> None:
    qkv.weight.grad = torch.zeros_like(qkv.weight)
    qkv.weight.grad[77, 5] = 1


def one_bias(qkv: Any) -> None:
    qkv.bias.grad = torch.zeros_like(qkv.bias)
    qkv.bias.grad[5] = 1


def compiled(step: Callable[[], Any]) -> Any:
    return torch.compile(step, backend="aot_eager")()


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.inference_mode])
@pytest.mark.parametrize("run", [lambda step: step(), compiled], ids=["eager", "compiled"])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("touch", [one_weight, one_bias])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adagrad])
@pytest.mark.filterwarnings("ignore")  # of the compiler, about profilers
def test_a_step_on_a_single_value_makes_the_maps_of_its_module_stale(
    kind: Any, touch: Any, fused: bool, run: Any, mode: Any
) -> None:
    model: Any
    model, x = tiny("vit")
    optimizer = kind(model.parameters(), lr=0.1, fused=fused)
    with AttentionRecorder(model) as rec, AttentionRecorder(model, keep="maps") as kept, mode():
        model(x)
    before = read(rec)
    touch(model.blocks[0].attn.qkv)
    run(optimizer.step)
    name = "qkv.weight" if touch is one_weight else "qkv.bias"
    with pytest.raises(StaleMapError, match=f"'{name}' changed in place"):
        rec.maps[0][0, 0]
    assert torch.equal(rec.maps[1][...], before["blocks.1.attn"])  # nothing stepped on that
    assert same(read(kept), before)


def test_a_step_on_others_leaves_maps_readable() -> None:
    model: Any
    model, x = tiny("vit")
    model.blocks.requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
    with AttentionRecorder(model) as rec:
        model(x).sum().backward()
    before = read(rec)
    optimizer.step()
    assert same(read(rec), before)


def test_steps_are_counted_only_while_there_are_maps(monkeypatch: pytest.MonkeyPatch) -> None:
    forget_steps(monkeypatch)
    hooks = torch_optimizer._global_optimizer_post_hooks
    before = len(hooks)
    model, x = tiny("vit")
    with AttentionRecorder(model) as rec, AttentionRecorder(model) as other:
        model(x)
    m = other.maps[0]
    del rec, other
    assert len(hooks) == before + 1
    del m
    assert len(hooks) == before


@pytest.mark.parametrize("fused", [True, False])
def test_scaled_steps_make_maps_stale(fused: bool) -> None:
    model, x = tiny("vit")
    optimizer = torch.optim.AdamW(model.parameters(), fused=fused)
    scaler = torch.amp.GradScaler("cpu")
    with AttentionRecorder(model) as rec, torch.autocast("cpu", torch.float16):
        loss = model(x).float().square().mean()
    scaler.scale(loss).backward()
    rec.maps[0][0]
    scaler.step(optimizer)
    with pytest.raises(StaleMapError, match=r"'qkv\.weight'"):
        rec.maps[0][0]


def test_maps_of_an_averaged_model_outlive_a_step_but_not_the_next_average() -> None:
    model, x = tiny("vit")
    average, optimizer = ModelEmaV3(model), torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    with AttentionRecorder(average.module) as rec, torch.no_grad():
        average.module(x)
    before = read(rec)
    model(x).sum().backward()
    optimizer.step()
    assert same(read(rec), before)
    average.update(model)
    with pytest.raises(StaleMapError):
        rec.maps[0][0]


def test_not_a_number_is_no_change() -> None:
    model, x = tiny("vit")
    with torch.inference_mode():  # whose tensors have no version: their values are compared
        x = x.clone()
        x[0, 0, 0, 0] = torch.nan
        with AttentionRecorder(model) as rec:
            model(x)
        assert rec.maps[0][0].isnan().any()
        assert rec.maps[0][1].isfinite().all()
