"""Training goes on as if nobody looked, and a map of before a step is not read after it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from support.inside import forget_steps
from support.models import tiny
from support.reading import read, same
from timm.models import checkpoint_seq
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.optim import optimizer as torch_optimizer

from hookattn import AttentionRecorder, StaleMapError

DROPOUT = {"proj_drop_rate": 0.3, "attn_drop_rate": 0.3, "drop_path_rate": 0.3}


@pytest.mark.parametrize("options", [{}, {"keep": "maps"}, {"detach": False}], ids=str)
def test_gradients_of_three_micro_batches_and_the_random_stream_are_those_without_a_recorder(options: Any) -> None:
    model, _ = tiny("vit", **DROPOUT)
    model.train()
    batches = [torch.randn(2, 3, 64, 64) for _ in range(3)]
    results = []
    for recorded in (False, True):
        model.zero_grad()
        torch.manual_seed(4)
        with AttentionRecorder(model, passes="all", **options) if recorded else nullcontext() as rec:
            for x in batches:
                loss = model(x).square().mean()
                if rec is not None:
                    first = [m[...].detach() for m in rec.maps.values()]
                    assert all(torch.equal(m[...].detach(), a) for m, a in zip(rec.maps.values(), first))
                loss.backward()
        results.append([*(p.grad for p in model.parameters() if p.grad is not None), torch.get_rng_state()])
        if rec is not None:
            assert [len(maps) for maps in rec.passes] == [2, 2, 2]
            assert all((m[...].sum(-1) - 1).abs().max() < 1e-5 for maps in rec.passes for m in maps.values())
    assert all(map(torch.equal, *results))


class Sequence(nn.Module):
    """A ViT whose blocks run in checkpointed segments."""

    def __init__(self, vit: Any, reentrant: bool) -> None:
        super().__init__()
        self.vit, self.reentrant = vit, reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = self.vit._pos_embed(self.vit.patch_embed(x))
        return checkpoint_seq(self.vit.blocks, x, every=2, use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("options", [{}, {"keep": "maps"}, {"keep": "maps", "detach": False}], ids=str)
def test_checkpointed_segments_are_recorded_once_and_give_the_same_gradients(options: Any, reentrant: bool) -> None:
    vit, x = tiny("vit", depth=4, **DROPOUT)
    model = Sequence(vit, reentrant).train()
    x.requires_grad_()
    gradients = []
    for recorded in (False, True):
        model.zero_grad()
        torch.manual_seed(1)
        with AttentionRecorder(model, passes="all", **options) if recorded else nullcontext() as rec:
            model(x).square().mean().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert rec is not None
    assert [len(maps) for maps in rec.passes] == [4]
    assert all(map(torch.equal, *gradients))


# Steps


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


def test_weights_that_are_swapped_through_data_and_back_give_the_map_again() -> None:
    model: Any
    model, x = tiny("vit")
    with AttentionRecorder(model) as rec, torch.no_grad():
        model(x)
    before, weight = rec.maps[0][...], model.blocks[0].attn.qkv.weight
    kept = weight.detach().clone()
    weight.data[:, 1:] = 2 * kept[:, 1:]  # the first column stays
    with pytest.raises(StaleMapError, match="values of parameters"):
        rec.maps[0][0]
    weight.data.copy_(kept)
    assert torch.equal(rec.maps[0][...], before)
