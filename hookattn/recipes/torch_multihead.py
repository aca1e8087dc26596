"""PyTorch's own `nn.MultiheadAttention`, whose masks close where they are True."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor

from ..attention.projection import multiply
from ..attention.sources import QK
from .registry import recipe


def multihead_values(self: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
    if query.dim() != 3:  # (tokens, embed_dim)
        value = value.unsqueeze(0)
    elif not self.batch_first:
        value = value.transpose(0, 1)
    weight = self.v_proj_weight if self.in_proj_weight is None else self.in_proj_weight.chunk(3)[2]
    v = multiply(value, weight, None if self.in_proj_bias is None else self.in_proj_bias.chunk(3)[2], self.num_heads)
    return append_own(self, v, self.bias_v)


@recipe("torch.nn.modules.activation.MultiheadAttention", values=multihead_values)
def multihead_attention(
    self: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> QK:
    batched = query.dim() == 3  # else (tokens, embed_dim)
    if not batched:
        query, key = query.unsqueeze(0), key.unsqueeze(0)
    elif not self.batch_first:
        query, key = query.transpose(0, 1), key.transpose(0, 1)
    q_weight, k_weight = find_projection_weights(self)
    q_bias, k_bias = (None, None) if self.in_proj_bias is None else self.in_proj_bias.chunk(3)[:2]
    q = multiply(query, q_weight, q_bias, self.num_heads)
    k = append_own(self, multiply(key, k_weight, k_bias, self.num_heads), self.bias_k)
    bias = add_masks(self, q, k, key_padding_mask, attn_mask)
    return QK(q, k, scale=self.head_dim**-0.5, bias=bias)


def append_own(self: Any, t: Tensor, learned: Tensor | None) -> Tensor:
    """Keys or values with those that the module appends itself: a learned one, and one of zeros."""
    if learned is not None:
        t = torch.cat((t, repeat(learned, "1 1 (h d) -> b h 1 d", b=len(t), h=self.num_heads)), dim=2)
    return torch.cat((t, torch.zeros_like(t[:, :, :1])), dim=2) if self.add_zero_attn else t


def find_projection_weights(self: Any) -> tuple[Tensor, Tensor]:
    """(embed_dim, in_features) weights of queries and keys, packed or not."""
    if self.in_proj_weight is None:
        return self.q_proj_weight, self.k_proj_weight
    q_weight, k_weight, _ = self.in_proj_weight.chunk(3)
    return q_weight, k_weight


def add_masks(self: Any, q: Tensor, k: Tensor, key_padding_mask: Tensor | None, attn_mask: Tensor | None) -> Tensor | None:
    """Both masks as one bias, (batch or 1, heads or 1, queries or 1, keys); the keys the module appends stay open."""
    biases = []
    if attn_mask is not None:
        mask = to_additive_mask(attn_mask, q.dtype)
        biases.append(mask if mask.dim() == 2 else rearrange(mask, "(b h) q k -> b h q k", h=self.num_heads))
    if key_padding_mask is not None:
        mask = to_additive_mask(key_padding_mask, q.dtype)
        biases.append(rearrange(mask.reshape(-1, mask.shape[-1]), "b k -> b 1 1 k"))
    appended = [F.pad(bias, (0, k.shape[2] - bias.shape[-1])) for bias in biases]
    return None if not appended else sum(appended[1:], start=appended[0])


def to_additive_mask(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask as PyTorch's module takes it: True closes, a float is added."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, float("-inf"))
