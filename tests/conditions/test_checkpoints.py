"""Activation checkpoints: each forward is recorded once, and gradients are those without a recorder."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import timm
import torch
from support.models import DROPOUT, tiny, tiny_double
from support.oracle import loss_of, own_gradients
from support.reading import NAMES, backward_of, compare_gradients, elsewhere, maps_of, read, same
from support.untouched import untouched
from timm.models import checkpoint_seq
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hookattn import AttentionRecorder, NoGradientError


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("options", [{}, {"keep": "maps"}, {"detach": False}, {"keep": "maps", "detach": False}], ids=str)
def test_gradient_checkpointing_records_each_forward_once(
    monkeypatch: pytest.MonkeyPatch, reentrant: bool, options: dict[str, Any]
) -> None:
    monkeypatch.setattr(timm.layers.config, "_USE_REENTRANT_CKPT", reentrant)
    model, x = tiny("vit")
    expected = maps_of(model, x)
    model.train()
    model.set_grad_checkpointing()
    gradients = []
    for recorded in (False, True):
        model.zero_grad()
        with untouched(model):
            if recorded:
                with AttentionRecorder(model, passes="all", **options) as rec:
                    model(x).square().sum().backward()
            else:
                model(x).square().sum().backward()
            gradients.append([p.grad for p in model.parameters()])
            model.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(*gradients))
    assert [list(maps) for maps in rec.passes] == [NAMES]
    assert same({name: m.detach() for name, m in read(rec).items()}, expected)


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


@pytest.mark.parametrize("keep", ["inputs", "maps"])
@pytest.mark.parametrize("reentrant", [None, False, True])
def test_the_gradient_is_there_in_train_mode_and_with_checkpoints(reentrant: bool | None, keep: Any) -> None:
    model, x = tiny_double("vit", proj_drop_rate=0.3, drop_path_rate=0.3)
    model.train()
    torch.manual_seed(1)
    expected = own_gradients(model, x)
    if reentrant is not None:
        for block in model.blocks:
            own = block.forward
            block.forward = lambda *args, own=own, **kwargs: checkpoint(own, *args, use_reentrant=reentrant, **kwargs)
    x.requires_grad_()
    for passes in ("last", "all"):
        torch.manual_seed(1)
        rec = backward_of(model, x, keep=keep, passes=passes)
        assert len(rec.passes) == 1
        compare_gradients(rec, expected)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("keep", ["inputs", "maps"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_give_each_backward_and_each_pass_its_own_gradient(reentrant: bool, keep: Any) -> None:
    model, x = tiny_double("vit")
    x.requires_grad_()
    expected = [own_gradients(model, x, partial(loss_of, which=which)) for which in (0, 1)]
    for block in model.blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=reentrant)
        block.forward = lambda x, run=block.forward, **_: run(x)
    with AttentionRecorder(model, gradients=True, keep=keep) as rec:
        output = model(x)
        for which in (0, 1):
            loss_of(output, which).backward(retain_graph=True)
            compare_gradients(rec, expected[which])
    with AttentionRecorder(model, gradients=True, keep=keep, passes="all") as rec:
        ends = [loss_of(model(x), which) for which in (0, 1)]
        with torch.no_grad():
            model(x)
        for end in ends:
            end.backward()
    for maps, each in zip(rec.passes, expected):
        for name, m in maps.items():
            torch.testing.assert_close(m.gradient[...], each[name], rtol=1e-9, atol=1e-9)
    with pytest.raises(NoGradientError, match="without a graph"):
        rec.passes[2][0].gradient[...]


@pytest.mark.parametrize("recorded_in", ["the thread of forward", "another"])
def test_checkpoints_run_again_in_another_thread_save_what_the_forward_saved(
    monkeypatch: pytest.MonkeyPatch, recorded_in: str
) -> None:
    monkeypatch.setattr(timm.layers.config, "_USE_REENTRANT_CKPT", False)
    model, x = tiny("vit")
    model.train()
    model.set_grad_checkpointing()

    def step() -> None:
        loss = model(x).square().sum()
        loss.backward() if recorded_in == "another" else elsewhere(loss.backward)

    found = []
    for context in (nullcontext(), AttentionRecorder(model, keep="maps", detach=False)):
        model.zero_grad()
        with context:
            elsewhere(step) if recorded_in == "another" else step()
        found.append([p.grad for p in model.parameters()])
    assert all(map(torch.equal, *found))
