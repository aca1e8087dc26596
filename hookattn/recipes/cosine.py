"""Cosine attention: normalised queries and keys, and a learned scale (Liu et al. 2022, arXiv 2111.09883, equation 2)."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ..functional import QK
from .projections import project
from .registry import recipe
from .rotary import project_with_biases
from .windows import per_window


@recipe("timm.models.swin_transformer_v2.WindowAttention")
def swin_v2_attention(self: Any, x: Tensor, mask: Tensor | None = None) -> QK:
    q, k = project_with_biases(self, x)
    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    return QK(q, k, scale=clamped(self.logit_scale), bias=(continuous_bias(self), *per_window(mask, len(x))))


@recipe("timm.models.swin_transformer_v2_cr.WindowMultiHeadAttention")
def swin_v2_cr_attention(self: Any, x: Tensor, mask: Tensor | None = None) -> QK:
    q, k = project(self.qkv, x, "b n (parts h d) -> parts b h n d", parts=2, of=3, h=self.num_heads)
    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    scale = clamped(rearrange(self.logit_scale, "h -> h 1 1"))
    return QK(q, k, scale=scale, bias=(self._relative_positional_encodings(), *per_window(mask, len(x))))


def clamped(logit_scale: Tensor) -> Tensor:
    """The inverse temperature of each head, at most 100."""
    return torch.clamp(logit_scale, max=math.log(1.0 / 0.01)).exp()


def continuous_bias(self: Any) -> Tensor:
    """(heads, queries, keys): a small network of the log-spaced offset between query and key, equation 3 there."""
    table = rearrange(self.cpb_mlp(self.relative_coords_table), "1 y x h -> (y x) h")
    return 16 * torch.sigmoid(rearrange(table[self.relative_position_index], "q k h -> h q k"))
