"""Gradients of modules that put out more than one tensor, against autograd on the map itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hookattn import AttentionRecorder

Out = Callable[[Any, Tensor, Tensor], Any]


class Attention(nn.Module):
    """An attention of 4 heads of 8 that keeps its map, and puts out what `out` makes of (itself, result, map)."""

    def __init__(self, out: Out) -> None:
        super().__init__()
        self.num_heads, self.out = 4, out
        self.qkv, self.proj, self.table = nn.Linear(32, 96), nn.Linear(32, 32), nn.Parameter(torch.randn(1, 4, 9, 9))

    def forward(self, x: Tensor) -> Any:
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        attention = (q @ k.mT * 8**-0.5 + self.table).softmax(-1)
        return self.out(self, self.proj((attention @ v).transpose(1, 2).flatten(2)), attention)


# what is put out, and what of it goes into the loss; the last one is the map that autograd has
OUTPUTS: dict[str, tuple[Out, Callable[[Any], Tensor]]] = {
    "beside its map, which nobody uses": (lambda self, y, a: (y, a), lambda out: out[0].pow(2).sum()),
    "beside its map, in the loss too": (
        lambda self, y, a: (y, a),
        lambda out: out[0].pow(2).sum() + out[1].pow(3).sum(),
    ),
    "map first": (lambda self, y, a: (a, y), lambda out: out[0].sin().sum() + out[1].pow(2).sum()),
    "in a dict": (lambda self, y, a: {"y": y, "a": a}, lambda out: out["y"].pow(2).sum() + out["a"].cos().sum()),
    "one made of another": (lambda self, y, a: (y, y.tanh(), a), lambda out: out[0].pow(2).sum() + out[1].pow(2).sum()),
    "a chain": (lambda self, y, a: (y, z := y.tanh(), z.exp(), a), lambda out: sum(t.pow(2).sum() for t in out[:3])),
    "twice the same": (lambda self, y, a: (y, y, a), lambda out: (out[0] * out[1]).sum()),
    "a parameter handed on": (lambda self, y, a: (y, self.table, a), lambda out: out[0].pow(2).sum() + out[1].sum()),
}


@pytest.mark.parametrize("keep", ["inputs", "maps"])
@pytest.mark.parametrize("name", OUTPUTS)
def test_the_gradient_is_the_one_that_autograd_brings_to_the_map(name: str, keep: Any) -> None:
    out, loss = OUTPUTS[name]
    kept: list[Tensor] = []

    def keeping(self: Any, y: Tensor, attention: Tensor) -> Any:
        if not kept:  # not when it is run again
            attention.retain_grad()
            kept.append(attention)
        return out(self, y, attention)

    model, x = nn.Sequential(Attention(keeping)).double(), torch.randn(2, 9, 32, dtype=torch.float64, requires_grad=True)
    with AttentionRecorder(model, gradients=True, keep=keep) as rec:
        loss(model(x)).backward()
    torch.testing.assert_close(rec.maps[0].gradient[...], kept[0].grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("keep", ["inputs", "maps"])
def test_an_input_that_is_handed_on_is_no_output_of_the_map(keep: Any) -> None:
    """As T5 hands its position bias from layer to layer."""

    class Handing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.num_heads, self.qkv = 4, nn.Linear(32, 96)

        def forward(self, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
            q, k, v = self.qkv(x).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
            out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
            return out.transpose(1, 2).flatten(2), bias

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn1, self.attn2, self.table = Handing(), Handing(), nn.Parameter(torch.randn(1, 4, 9, 9))

        def forward(self, x: Tensor) -> Tensor:
            x, bias = self.attn1(x, self.table)
            out: Tensor = self.attn2(x, bias)[0]
            return out

    model, x = Two().double(), torch.randn(2, 9, 32, dtype=torch.float64)
    with AttentionRecorder(model, gradients=True, keep=keep) as rec:
        model(x).pow(2).sum().backward()
    expected = unfused(model, x)
    for m, grad in zip(rec.maps.values(), expected):
        torch.testing.assert_close(m.gradient[...], grad, rtol=1e-9, atol=1e-12)


def unfused(model: Any, x: Tensor) -> list[Tensor]:
    """Gradients of the two maps, from maps that are formed."""
    maps = []
    for module in (model.attn1, model.attn2):
        q, k, v = module.qkv(x).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        attention = (q @ k.mT * 8**-0.5 + model.table).softmax(-1)
        attention.retain_grad()
        maps.append(attention)
        x = (attention @ v).transpose(1, 2).flatten(2)
    x.pow(2).sum().backward()
    return [m.grad for m in maps if m.grad is not None]
