"""A learned bias for the offset between query and key, added to the scores."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..functional import QK
from .projections import project, scale_of
from .registry import recipe
from .rotary import project_with_biases


@recipe("timm.models.beit.Attention")
def beit_attention(self: Any, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> QK:
    q, k = project_with_biases(self, x)
    bias = None if self.relative_position_bias_table is None else self._get_rel_pos_bias()
    if shared_rel_pos_bias is not None:
        bias = shared_rel_pos_bias if bias is None else bias + shared_rel_pos_bias
    return QK(q, k, scale=scale_of(self), bias=bias)


@recipe("timm.models.vision_transformer_relpos.RelPosAttention")
def relpos_attention(self: Any, x: Tensor, shared_rel_pos: Tensor | None = None) -> QK:
    q, k = project(self.qkv, x, "b n (parts h d) -> parts b h n d", parts=2, of=3, h=self.num_heads)
    q, k = self.q_norm(q), self.k_norm(k)
    bias = shared_rel_pos if self.rel_pos is None else self.rel_pos.get_bias()
    return QK(q, k, scale=scale_of(self), bias=bias)
