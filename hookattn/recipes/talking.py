"""Talking heads: scores are mixed over heads before the softmax (Shazeer et al. 2020, arXiv 2003.02436).

The mixing after the softmax is no part of the map: rows of the map sum to 1, rows of what comes after need not.
"""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from ..functional import QK, Scores, Source, exact_dtype, exactly
from .projections import is_plain_conv, is_plain_linear, project
from .registry import recipe


@recipe("timm.models.cait.TalkingHeadAttn")
def talking_head_attention(self: Any, x: Tensor) -> Source:
    q, k = project(self.qkv, x, "b n (parts h d) -> parts b h n d", parts=2, of=3, h=self.num_heads)
    return mixed(self.proj_l, "b h q k -> b q k h", q, k, scale=self.scale)


@recipe("timm.models.efficientformer_v2.Attention2d")
def efficientformer_v2_attention(self: Any, x: Tensor) -> Source:
    if self.stride_conv is not None:
        x = self.stride_conv(x)
    q = rearrange(self.q(x), "b (h d) y x -> b h (y x) d", h=self.num_heads)
    k = rearrange(self.k(x), "b (h d) y x -> b h (y x) d", h=self.num_heads)
    if self.training:
        self.v_local(self.v(x))  # come before the heads are mixed, and draw their random numbers before
    bias = self.get_attention_biases(x.device)
    return mixed(self.talking_head1, "b h q k -> b h q k", q, k, scale=self.scale, bias=bias)


def mixed(layer: nn.Module, pattern: str, q: Tensor, k: Tensor, *, scale: float, bias: Tensor | None = None) -> Source:
    """Scores and their bias, mixed over heads by a layer: L (S + B) + b = L S + (L B + b).

    Args:
        layer: a linear layer or a 1x1 convolution from heads to heads. What is neither (LoRA, hooks) need not be linear, and is
            given all scores.
        pattern: how the layer takes the scores (b h q k).
        q, k: (batch, heads, queries or keys, d).
        scale: of their product.
        bias: (heads, queries, keys), what is added before the scores are mixed.
    """
    exact = exact_dtype(q.dtype)
    with exactly(q.device):
        if is_plain_linear(layer) or is_plain_conv(layer):
            mix = layer.weight.flatten(1).to(exact)
            biases = [] if bias is None else [torch.einsum("g h, h q k -> g q k", mix, bias.to(exact))]
            biases += [] if layer.bias is None else [rearrange(layer.bias, "h -> h 1 1")]
            return QK(q, k, scale=scale, bias=tuple(biases), mix=mix)
        scores = (q.to(exact) * scale) @ k.to(exact).transpose(-2, -1)
        scores = (scores if bias is None else scores + bias.to(exact)).to(q.dtype)
    there, back = pattern.split(" -> ")
    return Scores(rearrange(layer(rearrange(scores, pattern)), f"{back} -> {there}"))
