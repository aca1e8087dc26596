"""Attention between channels: a query is a channel, a key is a channel, and tokens are what is summed over.

El-Nouby et al. 2021, "XCiT", arXiv 2106.09681; Ding et al. 2022, "DaViT", arXiv 2204.03645. The map is (batch, heads, channels
of a head, channels of a head).
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ..attention.projection import project
from ..attention.sources import QK
from .registry import recipe, register_channel_attention
from .values import project_last

register_channel_attention(
    "timm.models.xcit.XCA",
    "timm.models.edgenext.CrossCovarianceAttn",
    "timm.models.davit.ChannelAttention",
    "timm.models.davit.ChannelAttentionV2",
    "vit_pytorch.xcit.XCAttention",
)


def cross_covariance_values(self: Any, x: Tensor) -> Tensor:
    return project_last(self.qkv, x, "b n (parts h d) -> parts b h d n", of=3, h=self.num_heads)


@recipe("timm.models.xcit.XCA", "timm.models.edgenext.CrossCovarianceAttn", values=cross_covariance_values)
def cross_covariance_attention(self: Any, x: Tensor) -> QK:
    q, k = project(self.qkv, x, "b n (parts h d) -> parts b h d n", parts=2, of=3, h=self.num_heads)
    # (batch, heads, channels of a head, tokens); the temperature is (heads, 1, 1)
    return QK(F.normalize(q, dim=-1), F.normalize(k, dim=-1), scale=self.temperature)


def vit_pytorch_cross_covariance_values(self: Any, x: Tensor) -> Tensor:
    x = self.norm(x.flatten(1, -2))
    return project_last(self.to_qkv, x, "b n (parts h d) -> parts b h d n", of=3, h=self.heads)


@recipe("vit_pytorch.xcit.XCAttention", values=vit_pytorch_cross_covariance_values)
def vit_pytorch_cross_covariance_attention(self: Any, x: Tensor) -> QK:
    x = self.norm(x.flatten(1, -2))
    q, k = project(self.to_qkv, x, "b n (parts h d) -> parts b h d n", parts=2, of=3, h=self.heads)
    return QK(F.normalize(q, dim=-1), F.normalize(k, dim=-1), scale=self.temperature.exp())


def davit_channel_values(self: Any, x: Tensor) -> Tensor:
    (q,) = project(self.qkv, x, "b n (parts h d) -> parts b h d n", parts=1, of=3, h=self.num_heads)
    return q


@recipe("timm.models.davit.ChannelAttention", values=davit_channel_values)
def davit_channel_attention(self: Any, x: Tensor) -> QK:
    """Keys ask and values answer: the map is softmax(k^T v), and acts on the queries."""
    _, k, v = project(self.qkv, x, "b n (parts h d) -> parts b h d n", parts=3, of=3, h=self.num_heads)
    return QK(k, v, scale=self.scale)


def davit_channel_values_v2(self: Any, x: Tensor) -> Tensor:
    return project_last(self.qkv, x, "b n (parts h d) -> parts b h d n", of=3, h=self.groups)


@recipe("timm.models.davit.ChannelAttentionV2", values=davit_channel_values_v2)
def davit_channel_attention_v2(self: Any, x: Tensor) -> QK:
    q, k = project(self.qkv, x, "b n (parts h d) -> parts b h d n", parts=2, of=3, h=self.groups)
    tokens = x.shape[1]  # what is summed over
    return QK(q, k, scale=(tokens if self.dynamic_scale else self.head_dim) ** -0.5)
