"""Attention whose layers are not called as its recipe says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.layers import Attention
from torch import Tensor, nn

from hookattn import QK, project, recipe
from support.inside import own_registers
from support.models import B, C, D, H, N, randomise


class Twice(Attention):
    """Calls its projection with something else first."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.qkv(x * 3)
        return super().forward(x, *args, **kwargs)


class Around(Attention):
    """Calls no layer of its own."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        q, k, v = F.linear(x, self.qkv.weight, self.qkv.bias).unflatten(-1, (3, H, D)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def declining() -> nn.Module:
    """Attention whose recipe, which is registered now, declines calls with a mask."""

    class Declined(Attention):  # type: ignore[misc]
        def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
            return super().forward(x, attn_mask=attn_mask)  # type: ignore[no-any-return]

    @recipe(Declined)
    def without_a_mask(self: Any, x: Tensor, attn_mask: Tensor | None = None) -> Any:
        q, k = project(self.qkv, x, "b n (parts h d) -> parts b h n d", parts=2, of=3, h=self.num_heads)
        return QK(q, k) if attn_mask is None else NotImplemented

    return Declined(16, 4).eval()


class Crossed(nn.Module):
    """Attention of queries to keys of something else, by one layer."""

    def __init__(self, between: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.qk, self.num_heads, self.between = nn.Linear(C, C), H, between

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        k = self.qk(context)
        if self.between is not None:
            k = self.between(k)
        q = self.qk(x)
        q, k, v = (t.unflatten(-1, (H, D)).transpose(1, 2) for t in (q, k, context))
        return F.scaled_dot_product_attention(q, k, v)


breaking: list[str] = []
"""Why the next call of `break_off` raises; empty where it does not."""


@torch.library.custom_op("hookattn_tests::break_off", mutates_args=())
def break_off(x: Tensor) -> Tensor:
    """Break a forward off, once, in whatever graph it stands."""
    if breaking:
        raise ArithmeticError(breaking.pop())
    return x.clone()


break_off.register_fake(torch.empty_like)


class Model(nn.Module):
    """A model, whose attention is called with what nobody else holds."""

    def __init__(self, attn: nn.Module) -> None:
        super().__init__()
        self.attn = attn

    def forward(self, *given: Tensor, **options: Any) -> Tensor:
        return self.attn(*[each + 0 for each in given], **options)  # type: ignore[no-any-return]


def crossed(
    monkeypatch: pytest.MonkeyPatch, *between: Any, kind: type[Crossed] = Crossed
) -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    """A model of it, whose recipe is filed, with two inputs and its map."""
    own_registers(monkeypatch)

    @recipe(kind)
    def by_one_layer(self: Any, x: Tensor, context: Tensor) -> QK:
        of = {"parts": 1, "of": 1, "h": self.num_heads}
        return QK(*[project(self.qk, t, "b n (parts h d) -> parts b h n d", **of)[0] for t in (x, context)])

    torch.manual_seed(0)
    attn: Any = randomise(kind(*between)).eval()
    x, context = torch.randn(B, N, C), torch.randn(B, N, C)
    q, k = (attn.qk(t).unflatten(-1, (H, D)).transpose(1, 2) for t in (x, context))
    return Model(attn), x, context, (q @ k.mT * D**-0.5).softmax(-1).detach()
