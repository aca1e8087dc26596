"""Heads that are mixed, doubled, or without keys: talking heads, two softmaxes a head, outlook attention."""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from ..attention.projection import is_plain_conv, is_plain_linear, project, scale_of
from ..attention.sources import QK, Scores, Source, exact_dtype, without_autocast
from ..image.geometry import Geometry
from ..image.tokens import Tokens, neighbourhoods
from .mechanisms import additive_or_bool, in_projection
from .registry import Shape, layout, recipe


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


@recipe("timm.models.vision_transformer.DiffParallelScalingBlock")
def diff_parallel_scaling_block(self: Any, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> QK:
    q, k = in_projection(self, x)
    return differential(self, q, k, attn_mask, is_causal)


@recipe("timm.layers.diff_attention.DiffAttention")
def diff_attention(self: Any, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> QK:
    q, k = project(self.qkv, x, "b n (parts c) -> parts b n c", parts=2, of=3)
    return differential(self, q, k, attn_mask, is_causal)


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
        alternate_heads(q, torch.zeros_like(q)),
        alternate_heads(k, k),
        scale=scale_of(self),
        bias=alternate_heads(torch.zeros_like(position), position),
    )


@recipe("timm.models.volo.OutlookAttention", form="b h w q k")
def outlook_attention(self: Any, x: Tensor) -> Scores:
    """Queries and keys are the kernel_size ** 2 places of the window around one token, and every token has its window."""
    if self.training:
        self.v(x)  # comes first in the forward, and draws its random numbers first
    x = rearrange(self.pool(rearrange(x, "b y x c -> b c y x")), "b c y x -> b y x c")
    scores = rearrange(self.attn(x), "b y x (h q k) -> (b y x) h q k", h=self.num_heads, q=self.kernel_size**2)
    with without_autocast(x.device):
        return Scores(scores.to(exact_dtype(scores.dtype)) * self.scale)


@layout("timm.models.volo.OutlookAttention")
def outlook_attention_tokens(geometry: Geometry, shape: Shape) -> tuple[Tokens, Tokens]:
    """A window is the neighbourhood of one token, and its places are queries and keys.

    A place is a query in every window it stands in: a picture is the mean of what it gets there.
    """
    self = geometry.module
    _, rows, columns, _ = geometry.argument("x")
    tokens = neighbourhoods((rows, columns), self.kernel_size, self.stride, self.padding)
    return tokens, tokens


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
    with without_autocast(q.device):
        if is_plain_linear(layer) or is_plain_conv(layer):
            mix = layer.weight.flatten(1).to(exact)
            biases = [] if bias is None else [torch.einsum("g h, h q k -> g q k", mix, bias.to(exact))]
            biases += [] if layer.bias is None else [rearrange(layer.bias, "h -> h 1 1")]
            return QK(q, k, scale=scale, bias=tuple(biases), mix=mix)
        scores = (q.to(exact) * scale) @ k.to(exact).transpose(-2, -1)
        scores = (scores if bias is None else scores + bias.to(exact)).to(q.dtype)
    there, back = pattern.split(" -> ")
    return Scores(rearrange(layer(rearrange(scores, pattern)), f"{back} -> {there}"))


def differential(self: Any, q: Tensor, k: Tensor, attn_mask: Tensor | None, is_causal: bool) -> QK:
    """Two softmaxes a head whose difference acts on the values (Ye et al. 2024, arXiv 2410.05258, equation 1)."""
    q = rearrange(q, "b n (h d) -> b h n d", h=2 * self.num_heads)
    k = rearrange(k, "b n (h d) -> b h n d", h=2 * self.num_heads)
    q, k = self.q_norm(q), self.k_norm(k)
    return QK(q, k, scale=scale_of(self), is_causal=is_causal, **additive_or_bool(attn_mask))


def alternate_heads(first: Tensor, second: Tensor) -> Tensor:
    """Heads of the one and of the other, alternating."""
    return torch.stack((first, second), dim=2).flatten(1, 2)
