"""Two oracles of gradients of maps: autograd on the softmax itself, and differences of a loss when maps are moved by `edit`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.bias import CausalBias

from hookattn import AttentionRecorder

Loss = Callable[[], Tensor]
Grads = dict[str, tuple[Tensor, Tensor]]  # a map and its gradient


# Autograd, at the softmax


def _sdpa_map(query: Tensor, key: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None) -> Tensor:
    """What PyTorch documents of `scaled_dot_product_attention`."""
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    places = torch.ones(scores.shape[-2:], dtype=torch.bool)
    if isinstance(mask, CausalBias):
        mask = places.tril(scores.shape[-1] - scores.shape[-2])
    mask = places.tril() if is_causal else mask
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    empty = (scores == -torch.inf).all(-1, keepdim=True)
    weights = (scores - scores.amax(-1, keepdim=True)).masked_fill(empty, 0.0).exp()
    return (weights / weights.sum(-1, keepdim=True)).masked_fill(empty, 0.0)


@contextmanager
def softmaxes(model: nn.Module, layers: list[str]) -> Iterator[dict[str, list[Tensor]]]:
    """The softmaxes of the last forward, which keep their gradients, by the call of a layer that took them."""
    found, calls, running, modules = dict[str, list[Tensor]](), dict[str, int](), list[str](), dict(model.named_modules())

    def enter(name: str) -> None:
        calls[name] = calls.get(name, -1) + 1
        running.append(f"{name}#{calls[name]}" if calls[name] else name)

    def keep(out: Tensor) -> Tensor:
        if running and out.requires_grad:
            out.retain_grad()
            found.setdefault(running[-1], []).append(out)
        return out.clone()  # a module may write into it

    def sdpa(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Any = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if enable_gqa:
            key, value = (t.repeat_interleave(query.shape[-3] // t.shape[-3], -3) for t in (key, value))
        return keep(_sdpa_map(query, key, attn_mask, is_causal, scale)) @ value

    with ExitStack() as stack:
        stack.callback(model.register_forward_pre_hook(lambda *_: (found.clear(), calls.clear())[0]).remove)
        for name in dict.fromkeys(layer.partition("#")[0] for layer in layers):
            stack.callback(modules[name].register_forward_pre_hook(lambda *_, name=name: enter(name)).remove)
            stack.callback(modules[name].register_forward_hook(lambda *_: [running.pop(), None][1]).remove)
        for holder in (torch, Tensor):
            own = holder.softmax
            stack.enter_context(mock.patch.object(holder, "softmax", lambda *args, own=own, **kw: keep(own(*args, **kw))))
        stack.enter_context(mock.patch.object(F, "scaled_dot_product_attention", sdpa))
        yield found


def in_order(values: Tensor, grads: Tensor) -> tuple[Tensor, Tensor]:
    """Entries that are not zero by value, and those of one value by gradient: as often as masks repeat rows."""
    values, grads = values[values != 0], grads[values != 0]
    order = grads.argsort()
    order = order[values[order].mul(1e11).round().argsort(stable=True)]
    return values[order], grads[order]


def alike(values: Tensor, others: Tensor) -> bool:
    return values.shape == others.shape and torch.allclose(values.double(), others.double(), rtol=0, atol=1e-6)


@torch.no_grad()
def agree_with_autograd(got: Grads, found: dict[str, list[Tensor]], tolerance: float) -> set[str]:
    """Compare gradients with those of softmaxes; the maps that are none, or not that alone."""
    without = set()
    for name, (m, gradient) in got.items():
        own = found.get(name, [])
        grads = [torch.zeros_like(each) if each.grad is None else each.grad for each in own]
        (values, expected), (mine, ours) = (own[0], grads[0]) if len(own) == 1 else (m[:0], m[:0]), (m, gradient)
        if not alike(values, mine):  # laid out in another way
            values, expected = in_order(*(torch.cat([t.flatten() for t in ts] or [m.new_zeros(0)]) for ts in (own, grads)))
            mine, ours = in_order(m.flatten(), gradient.flatten())
        if not alike(values, mine):
            without.add(name)
            continue
        largest = expected.abs().max()
        assert largest > 0
        torch.testing.assert_close(ours.double() / largest, expected.double() / largest, rtol=0, atol=tolerance)
    return without


# Differences, by `edit`


def agree_with_differences(model: nn.Module, loss: Loss, layers: list[str], got: Grads, tolerance: float) -> None:
    """Move all maps in random directions, each as far as matters to the loss, and see the loss move by what gradients say."""
    directions = {name: torch.randn(g.shape, dtype=torch.float64) / g.double().norm() for name, (_, g) in got.items()}
    missed = []
    for step in (1e-6, 1e-5, 1e-4, 1e-3):  # what is small enough for this model, and large enough for its softmax in float32
        ends, moved = [], dict.fromkeys(got, 0.0)
        for signed in (step, -step):
            with AttentionRecorder(model, layers) as rec, torch.no_grad(), ExitStack() as stack:
                mover = _Mover(directions, signed)
                stack.callback(model.register_forward_pre_hook(lambda *_, mover=mover: mover.calls.clear()).remove)
                stack.enter_context(rec.edit({layer: mover.of(layer) for layer in rec.layers}))
                ends.append(loss().item())
            for name, by in mover.moved.items():
                moved[name] += float((by * got[name][1]).sum()) * (1 if signed > 0 else -1)
        missed.append(abs(ends[0] - ends[1] - sum(moved.values())) / max(map(abs, moved.values())))
        if missed[-1] < tolerance:
            return
    pytest.fail(f"gradients miss what the loss does by {missed}")


class _Mover:
    """Edits that move maps, and by how much they have moved them once they were rounded."""

    def __init__(self, directions: dict[str, Tensor], step: float) -> None:
        self.directions = {name: d * (step / d.abs().max()) for name, d in directions.items()}
        self.calls, self.moved = dict[str, int](), dict[str, Tensor]()

    def of(self, layer: str) -> Callable[[Tensor], Tensor]:
        def edit(m: Tensor) -> Tensor:
            count = self.calls[layer] = self.calls.get(layer, -1) + 1
            name = f"{layer}#{count}" if count else layer
            if name not in self.directions or self.directions[name].shape != m.shape:
                return m
            edited = (m.double() + self.directions[name]).to(m.dtype)
            self.moved[name] = edited.double() - m.double()
            return edited

        return edit
