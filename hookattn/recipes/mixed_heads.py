"""Heads that are mixed, doubled, or without keys: talking heads, two softmaxes a head, outlook attention.

Talking heads mix scores over heads before the softmax: Shazeer et al. 2020, arXiv 2003.02436. The mixing after the softmax is
no part of the map: rows of the map sum to 1, rows of what comes after need not.

Where a head has two softmaxes, the map has 2 * num_heads heads: the two of head h are 2h and 2h + 1. Ye et al. 2024,
"Differential Transformer", arXiv 2410.05258; d'Ascoli et al. 2021, "ConViT", arXiv 2103.10697.

In outlook attention a token predicts the weights of its neighbours, without keys: Yuan et al. 2021, "VOLO", arXiv 2106.13112.
"""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from ..attention.layers import is_plain_conv, is_plain_linear
from ..attention.projection import project, scale_of
from ..attention.sources import QK, Scores, Source, exact_dtype
from ..conditions.autocast import without_autocast
from ..image.geometry import Geometry
from ..image.sizes import size_after
from ..image.tokens import Tokens
from ..image.windows import slide_windows, whole_grid
from .mechanisms import additive_or_bool, heads_of_grid, patch_tokens, prefix_and_patch_tokens, project_in_parallel
from .registry import Shape, layout, recipe
from .values import packed_values, separate_values

# Talking heads


@recipe("timm.models.cait.TalkingHeadAttn", values=packed_values)
def talking_head_attention(self: Any, x: Tensor) -> Source:
    q, k = project(self.qkv, x, "b n (parts h d) -> parts b h n d", parts=2, of=3, h=self.num_heads)
    return mix_heads(self.proj_l, "b h q k -> b q k h", q, k, scale=self.scale)


layout("timm.models.cait.TalkingHeadAttn")(patch_tokens)


def efficientformer_v2_values(self: Any, x: Tensor) -> Tensor:
    return heads_of_grid(self.v(x if self.stride_conv is None else self.stride_conv(x)), self.num_heads)


@recipe("timm.models.efficientformer_v2.Attention2d", values=efficientformer_v2_values)
def efficientformer_v2_attention(self: Any, x: Tensor) -> Source:
    if self.stride_conv is not None:
        x = self.stride_conv(x)
    q, k = (heads_of_grid(layer(x), self.num_heads) for layer in (self.q, self.k))
    if self.training:
        self.v_local(self.v(x))  # come before the heads are mixed, and draw their random numbers before
    bias = self.get_attention_biases(x.device)  # (heads, queries, keys)
    return mix_heads(self.talking_head1, "b h q k -> b h q k", q, k, scale=self.scale, bias=bias)


@layout("timm.models.efficientformer_v2.Attention2d")
def efficientformer_v2_attention_tokens(geometry: Geometry, shape: Shape) -> tuple[Tokens, Tokens]:
    tokens = whole_grid(size_after(geometry.argument("x"), geometry.module.stride_conv))
    return tokens, tokens


def mix_heads(layer: nn.Module, pattern: str, q: Tensor, k: Tensor, *, scale: float, bias: Tensor | None = None) -> Source:
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
        # linear in the scores: mixing can be put off until rows and heads are picked
        if is_plain_linear(layer) or is_plain_conv(layer):
            mix = layer.weight.flatten(1).to(exact)
            biases = [] if bias is None else [torch.einsum("g h, h q k -> g q k", mix, bias.to(exact))]
            biases += [] if layer.bias is None else [rearrange(layer.bias, "h -> h 1 1")]
            return QK(q, k, scale=scale, bias=tuple(biases), mix=mix)
        scores = (q.to(exact) * scale) @ k.to(exact).transpose(-2, -1)
        scores = (scores if bias is None else scores + bias.to(exact)).to(q.dtype)
    there, back = pattern.split(" -> ")
    return Scores(rearrange(layer(rearrange(scores, pattern)), f"{back} -> {there}"))


# Two softmaxes a head


@recipe("timm.layers.diff_attention.DiffAttention")
def diff_attention(self: Any, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> QK:
    q, k = project(self.qkv, x, "b n (parts c) -> parts b n c", parts=2, of=3)
    return describe_differential(self, q, k, attn_mask, is_causal)


@recipe("timm.models.vision_transformer.DiffParallelScalingBlock")
def diff_parallel_scaling_block(self: Any, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> QK:
    q, k, _ = project_in_parallel(self, x)
    return describe_differential(self, q, k, attn_mask, is_causal)


layout("timm.layers.diff_attention.DiffAttention", "timm.models.vision_transformer.DiffParallelScalingBlock")(
    prefix_and_patch_tokens
)


def describe_differential(self: Any, q: Tensor, k: Tensor, attn_mask: Tensor | None, is_causal: bool) -> QK:
    """Two softmaxes a head whose difference acts on the values (Ye et al. 2024, arXiv 2410.05258, equation 1)."""
    q = rearrange(q, "b n (h d) -> b h n d", h=2 * self.num_heads)
    k = rearrange(k, "b n (h d) -> b h n d", h=2 * self.num_heads)
    q, k = self.q_norm(q), self.k_norm(k)
    return QK(q, k, scale=scale_of(self), is_causal=is_causal, **additive_or_bool(attn_mask))


@recipe("timm.models.convit.GPSA", values=separate_values)
def gated_positional_self_attention(self: Any, x: Tensor) -> QK:
    """Content in head 2h, position in head 2h + 1, before the gate weighs them (d'Ascoli et al. 2021, arXiv 2103.10697).

    Positions do not ask the query: their scores are a bias next to zero queries. The module renews `rel_indices` when the
    number of tokens is another one; here it stays as it is.
    """
    q, k = project(self.qk, x, "b n (parts h d) -> parts b h n d", parts=2, of=2, h=self.num_heads)
    fits = self.rel_indices is not None and self.rel_indices.shape[1] == x.shape[1]
    rel_indices = self.rel_indices if fits else self.get_rel_indices(x.shape[1])
    position = rearrange(self.pos_proj(rel_indices), "1 q k h -> 1 h q k")  # the same for all images
    return QK(
        alternate_heads(q, torch.zeros_like(q)),
        alternate_heads(k, k),
        scale=scale_of(self),
        bias=alternate_heads(torch.zeros_like(position), position),
    )


layout("timm.models.convit.GPSA")(patch_tokens)


def alternate_heads(first: Tensor, second: Tensor) -> Tensor:
    """Heads of the one and of the other, alternating."""
    return torch.stack((first, second), dim=2).flatten(1, 2)


# Outlook attention


def outlook_values(self: Any, x: Tensor) -> Tensor:
    v: Tensor = self.unfold(rearrange(self.v(x), "b y x c -> b c y x"))
    return rearrange(v, "b (h d k) n -> (b n) h k d", h=self.num_heads, k=self.kernel_size**2)


@recipe("timm.models.volo.OutlookAttention", axes="b h w q k", values=outlook_values)
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
    tokens = slide_windows((rows, columns), self.kernel_size, self.stride, self.padding)
    return tokens, tokens
