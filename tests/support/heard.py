"""Attention whose layers are not called as its recipe says."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from timm.layers import Attention
from torch import Tensor, nn

from hookattn import QK, project, recipe
from support.models import D, H


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
