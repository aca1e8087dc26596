"""Two softmaxes a head: differential attention, and positional next to content attention.

The map has 2 * num_heads heads: the two of head h are 2h and 2h + 1.
"""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from ..functional import QK
from .plain import additive_or_bool, in_projection
from .projections import project, scale_of
from .registry import recipe


@recipe("timm.models.vision_transformer.DiffParallelScalingBlock")
def diff_parallel_scaling_block(self: Any, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> QK:
    q, k = in_projection(self, x)
    return differential(self, q, k, attn_mask, is_causal)


@recipe("timm.layers.diff_attention.DiffAttention")
def diff_attention(self: Any, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> QK:
    q, k = project(self.qkv, x, "b n (parts c) -> parts b n c", parts=2, of=3)
    return differential(self, q, k, attn_mask, is_causal)


def differential(self: Any, q: Tensor, k: Tensor, attn_mask: Tensor | None, is_causal: bool) -> QK:
    """Two softmaxes a head whose difference acts on the values (Ye et al. 2024, arXiv 2410.05258, equation 1)."""
    q = rearrange(q, "b n (h d) -> b h n d", h=2 * self.num_heads)
    k = rearrange(k, "b n (h d) -> b h n d", h=2 * self.num_heads)
    q, k = self.q_norm(q), self.k_norm(k)
    return QK(q, k, scale=scale_of(self), is_causal=is_causal, **additive_or_bool(attn_mask))


@recipe("timm.models.convit.GPSA")
def gated_positional_self_attention(self: Any, x: Tensor) -> QK:
    """Content in head 2h, position in head 2h + 1, before the gate weighs them (d'Ascoli et al. 2021, arXiv 2103.10697).

    Positions do not ask the query: their scores are a bias next to zero queries. The module renews `rel_indices` when the
    number of tokens is another one; here it stays as it is.
    """
    q, k = project(self.qk, x, "b n (parts h d) -> parts b h n d", parts=2, of=2, h=self.num_heads)
    fits = self.rel_indices is not None and self.rel_indices.shape[1] == x.shape[1]
    rel_indices = self.rel_indices if fits else self.get_rel_indices(x.shape[1])
    position = rearrange(self.pos_proj(rel_indices), "1 q k h -> 1 h q k")
    return QK(
        in_turn(q, torch.zeros_like(q)), in_turn(k, k), scale=scale_of(self), bias=in_turn(torch.zeros_like(position), position)
    )


def in_turn(first: Tensor, second: Tensor) -> Tensor:
    """Heads of the one and of the other, alternating."""
    return torch.stack((first, second), dim=2).flatten(1, 2)
