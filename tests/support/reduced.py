"""Models whose maps are reduced by a function, and what the same function makes of recorded maps."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from hookattn import AttentionMap
from hookattn.analysis import compute_statistics, entropy, received
from support import elsewhere
from support.inside import find_recipe
from support.mechanisms import moved
from support.models import B, C, D, H, N, plain, randomise, tiny
from support.reading import record


class Own(nn.Module):
    """Attention of one's own, which no recipe knows."""

    def __init__(self, fused: bool = True) -> None:
        super().__init__()
        self.fused, self.num_heads = fused, H
        self.qkv, self.proj = nn.Linear(C, 3 * C), nn.Linear(C, C)

    def forward(self, x: Tensor, fails: bool = False) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, H, D)).permute(2, 0, 3, 1, 4)
        if fails:
            raise ArithmeticError("midway")
        y = F.scaled_dot_product_attention(q, k, v) if self.fused else (q @ k.mT * D**-0.5).softmax(-1) @ v
        return self.proj(y.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class Twice(nn.Module):
    """Calls one module twice."""

    def __init__(self, attn: nn.Module) -> None:
        super().__init__()
        self.attn = attn

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attn(x + self.attn(x))  # type: ignore[no-any-return]


def own(fused: bool = True) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    attention = Own(fused)
    assert find_recipe(attention) is None
    return randomise(nn.Sequential(attention, Twice(Own(fused)))).eval(), torch.randn(B, N, C)


def from_elsewhere(name: str) -> tuple[nn.Module, Tensor]:
    model, case = elsewhere.made(name)
    return model, case.inputs[0] if case.inputs else case.named["pixel_values"]


MODELS: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "vit": partial(tiny, "vit"),
    "rope": partial(tiny, "rope_half"),
    "swin": partial(moved, "swin"),
    "cait": partial(moved, "cait"),
    "twice": lambda: (Twice(plain()), torch.randn(B, N, C).double()),
    "no recipe, fused": own,
    "no recipe": partial(own, False),
    "torchvision vit": partial(from_elsewhere, "torchvision vit"),
    "transformers DINOv2": partial(from_elsewhere, "transformers Dinov2Model, sdpa"),
    "transformers CLIP": partial(from_elsewhere, "transformers CLIPVisionModel, sdpa"),
}


def figures(m: AttentionMap) -> Any:
    """Whole, row, shape and what goes over it chunk by chunk."""
    assert m.x.shape[0] > 0
    return m.name, m.shape, m[...], m[:, :, 0], m[0, -1], *compute_statistics(m, entropy, received)


def same(got: Any, expected: Any) -> bool:
    """Whether two trees hold the same, tensors bit for bit."""
    (ours, how), (theirs, like) = pytree.tree_flatten(got), pytree.tree_flatten(expected)
    return how == like and all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in zip(ours, theirs))


def alike(got: Any, expected: Any) -> bool:
    """Whether two trees hold the same, tensors within rounding.

    A module's own layer makes queries and keys of all tokens in one product with the values, and a recipe without them, of some
    tokens: sums are then added up in another order.
    """
    (ours, how), (theirs, like) = pytree.tree_flatten(got), pytree.tree_flatten(expected)
    return how == like and all(_alike(a, b) if isinstance(a, Tensor) else a == b for a, b in zip(ours, theirs))


def _alike(a: Tensor, b: Tensor) -> bool:
    rounding = 8 * torch.finfo(a.dtype).eps if a.is_floating_point() else 0
    return a.dtype == b.dtype and torch.allclose(a, b, rtol=rounding, atol=rounding)


def reduced(model: nn.Module, x: Any, function: Callable[[AttentionMap], Any] = figures, **options: Any) -> dict[str, Any]:
    return dict(record(model, x, keep=function, **options).reduced)


def late(model: nn.Module, x: Any, function: Callable[[AttentionMap], Any] = figures, **options: Any) -> dict[str, Any]:
    """The same function of maps that are recorded."""
    return {name: function(m) for name, m in record(model, x, **options).maps.items()}
