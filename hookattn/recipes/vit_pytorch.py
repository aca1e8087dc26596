"""vit-pytorch: how its classes lay out their maps, recipes for those that call flex attention, where their tokens lie.

`flex_attention` is one call that shows neither softmax nor `scaled_dot_product_attention`, so its callers have a recipe; all
others are found by the name of their class and read by replay.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..attention.narrowing import EachToken
from ..attention.projected import do_by_token
from ..attention.projection import project, project_heads
from ..attention.sources import QK
from ..errors import TokenError
from ..image.geometry import Geometry
from ..image.images import Patches
from ..image.tokens import Tokens
from ..image.trunk import cut_of, grid_size
from ..image.windows import cut_windows, whole_grid
from .mechanisms import append_tokens, cut_square_windows, raise_shuffled
from .places import find_queries
from .registry import Shape, layout, partition, qualified_names, recipe, register_attention
from .values import project_last

register_attention("vit_pytorch.vit_for_small_dataset.LSA", "vit_pytorch.vit_with_patch_merger.PatchMerger")


@recipe("vit_pytorch.ats_vit.Attention")
def adaptive_token_sampling_attention(self: Any, x: Tensor, *, mask: Tensor | None) -> QK:
    """The map from which rows are drawn at random, if any are; Fayyaz et al. 2022, arXiv 2111.15667."""
    q, k = project(self.to_qkv, self.norm(x), "b n (parts h d) -> parts b h n d", parts=2, of=3, h=self.heads)
    if mask is None:
        return QK(q, k, scale=self.scale)
    pairs = mask[:, None, :, None] & mask[:, None, None]
    # as there: a query of which all keys are closed attends to all alike
    return QK(
        q, k, scale=self.scale, bias=torch.zeros((), device=pairs.device).masked_fill(~pairs, -torch.finfo(torch.float32).max)
    )


# Flex attention


PairMask = Callable[[Any, Any, Tensor, Tensor], Tensor]
"""Of a batch, a head, queries and keys by their numbers: True where a query may attend."""


def packed_nd_values(self: Any, x: Tensor, *_: Any, **__: Any) -> Tensor:
    return project_last(self.to_qkv, self.norm(x), "b n (parts h d) -> parts b h n d", of=3, h=self.heads)


def separate_nd_values(self: Any, x: Tensor, *_: Any, **__: Any) -> Tensor:
    return project_heads(self.to_v, self.norm(x), self.heads)


@recipe("vit_pytorch.vit_nd.Attention", values=packed_nd_values)
def nd_attention(self: Any, x: Tensor, block_mask: Any = None, mask_fn: PairMask | None = None) -> QK:
    q, k = project(self.to_qkv, self.norm(x), "b n (parts h d) -> parts b h n d", parts=2, of=3, h=self.heads)
    return QK(q, k, scale=self.scale, mask=find_open_pairs(mask_fn, x))


@recipe("vit_pytorch.vit_nd_rotary.Attention", values=separate_nd_values)
def nd_rotary_attention(
    self: Any, x: Tensor, pos: Tensor | None = None, block_mask: Any = None, mask_fn: PairMask | None = None
) -> QK:
    q, k = project(self.to_qk, self.norm(x), "b n (parts h d) -> parts b h n d", parts=2, of=2, h=self.heads)
    if self.rotary_emb is not None:
        q, k = self.rotary_emb(q, pos), self.rotary_emb(k, pos)
    return QK(q, k, scale=self.scale, mask=find_open_pairs(mask_fn, x))


@recipe("vit_pytorch.vit_nd_pope.Attention", values=separate_nd_values)
def nd_polar_attention(
    self: Any,
    x: Tensor,
    polar_pos_emb: tuple[Tensor, Tensor] | None = None,
    block_mask: Any = None,
    mask_fn: PairMask | None = None,
) -> QK:
    """Positions turn the angle of a number whose length is the query or key made positive."""
    q, k = project(self.to_qk, self.norm(x), "b n (parts h d) -> parts b h n d", parts=2, of=2, h=self.heads)
    if polar_pos_emb is not None:
        angles, bias = polar_pos_emb
        q, k = turn_by_angles(q, angles), turn_by_angles(k, angles + bias)
    return QK(q, k, scale=self.scale, mask=find_open_pairs(mask_fn, x))


@recipe("vit_pytorch.levjepa_nd.Attention", values=packed_nd_values)
def levjepa_nd_attention(self: Any, x: Tensor, rotary_emb: Any, pos: Tensor, block_mask: Any, dense_mask: Tensor | None) -> QK:
    q, k = project(self.to_qkv, self.norm(x), "b n (parts h d) -> parts b h n d", parts=2, of=3, h=self.heads)
    if rotary_emb is not None:
        sin, cos = (rearrange(t, "b n d -> b 1 n d") for t in rotary_emb(pos))
        q, k = rotate_first_channels(q, sin, cos), rotate_first_channels(k, sin, cos)
    if block_mask is not None:
        numbers = torch.arange(len(x), device=x.device)[:, None, None, None]
        mask = find_open_pairs(block_mask.mask_mod, x, numbers)
    else:
        mask = None if dense_mask is None else rearrange(dense_mask, "b q k -> b 1 q k")
    return QK(q, k, scale=self.scale, mask=mask)


def find_open_pairs(mask_fn: PairMask | None, x: Tensor, batch: Tensor | int = 0) -> Tensor | None:
    """Where a query may attend, (queries, keys) or (batch, 1, queries, keys), told by a function of their numbers."""
    if mask_fn is None:
        return None
    tokens = torch.arange(x.shape[1], device=x.device)
    return mask_fn(batch, 0, tokens[:, None], tokens)


def turn_by_angles(x: Tensor, angles: Tensor) -> Tensor:
    """Real and imaginary parts of numbers of length softplus(x) at these angles, in float32."""
    lengths = F.softplus(x.float())
    return torch.cat((lengths * angles.cos(), lengths * angles.sin()), dim=-1).to(x.dtype)


def rotate_first_channels(x: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
    """The first channels rotated, each odd one with the even one before it."""
    return do_by_token(x, EachToken(_turn_first_channels, (sin, cos), torch.promote_types(x.dtype, sin.dtype)))


def _turn_first_channels(x: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
    turning, rest = x.tensor_split((sin.shape[-1],), dim=-1)
    crossed = torch.stack((-turning[..., 1::2], turning[..., ::2]), dim=-1).flatten(-2)
    return torch.cat((turning * cos + crossed * sin, rest), dim=-1)


# Windows


@layout("vit_pytorch.twins_svt.LocalAttention")
def twins_local_attention_tokens(geometry: Geometry, shape: Shape) -> tuple[Tokens, Tokens]:
    self: Any = geometry.module
    tokens = cut_windows(geometry.argument("fmap")[-2:], (self.patch_size, self.patch_size))
    return tokens, tokens


@layout("vit_pytorch.scalable_vit.InteractiveWindowedSelfAttention")
def interactive_windowed_self_attention_tokens(geometry: Geometry, shape: Shape) -> tuple[Tokens, Tokens]:
    tokens = cut_square_windows(geometry.argument("x")[-2:], geometry.module.window_size)
    return tokens, tokens


@layout("vit_pytorch.crossformer.Attention")
def crossformer_attention_tokens(geometry: Geometry, shape: Shape) -> tuple[Tokens, Tokens]:
    """Short attention sees a window, long attention patches at equal distances."""
    self: Any = geometry.module
    window = (self.window_size, self.window_size)
    tokens = cut_windows(geometry.argument("x")[-2:], window, strided=self.attn_type == "long")
    return tokens, tokens


@layout("vit_pytorch.nest.Attention")
def nest_attention_tokens(geometry: Geometry, shape: Shape) -> tuple[Tokens, Tokens]:
    """As many blocks down as across, told by how many there are of an image."""
    pieces, _, height, width = geometry.argument("x")
    if geometry.images is None or isinstance(geometry.images, Patches) or pieces % geometry.images[0]:
        raise TokenError(f"it is not known how many blocks {geometry.name!r} cuts an image into; slice the map itself, m[...].")
    # blocks come as images
    across = round((pieces // geometry.images[0]) ** 0.5)
    tokens = cut_windows((across * height, across * width), (height, width))
    return tokens, tokens


@layout("vit_pytorch.max_vit.Attention")
def max_vit_attention_tokens(geometry: Geometry, shape: Shape) -> tuple[Tokens, Tokens]:
    """Every other attention of a stage is the one over a grid; the layer before it tells how the image was cut."""
    _, down, across, height, width, _ = geometry.argument("x")
    path = list(geometry.path())
    layers = next(list(m) for m in path if isinstance(m, nn.Sequential) and any(part in path for part in m))
    at = next(i for i, part in enumerate(layers) if part in path)
    # the Rearrange that stands before the attention cut the windows; its pattern is an attribute
    before = [str(getattr(part, "pattern", "")) for part in layers[:at]]
    pattern = next((p for p in reversed(before) if p), "")
    strided = {"b d (x w1) (y w2) -> b x y w1 w2 d": False, "b d (w1 x) (w2 y) -> b x y w1 w2 d": True}.get(pattern)
    if strided is None:
        raise TokenError(
            f"it is not known how {geometry.name!r} gets its windows, by {pattern!r}; slice the map itself, m[...]."
        )
    tokens = cut_windows((down * height, across * width), (height, width), strided=strided)
    return tokens, tokens


@partition("vit_pytorch.mobile_vit.MobileViTBlock")
def mobile_vit_block(self: Any, geometry: Geometry) -> Tokens:
    """A window takes one pixel of each patch."""
    _, _, rows, columns = geometry.block_argument(self, "x")
    return cut_windows((rows, columns), (rows // self.ph, columns // self.pw), strided=True)


# All tokens, in another order or with others among them


@layout(
    "vit_pytorch.simple_uvit.Attention",
    "vit_pytorch.simple_vit_with_hyper_connections.Attention",
    "vit_pytorch.simple_vit_with_register_tokens.Attention",
)
def registers_at_the_end(geometry: Geometry, shape: Shape) -> tuple[Tokens, Tokens]:
    tokens = append_tokens(geometry, shape, geometry.find_holder("register_tokens").register_tokens)
    return tokens, tokens


@layout("vit_pytorch.vat.Attention", "vit_pytorch.vaat.Attention")
def registers_before_the_class_token(geometry: Geometry, shape: Shape) -> tuple[Tokens, Tokens]:
    """The same class attends to actions and to what other models make of the image, which lies nowhere."""
    trunk: Any = geometry.trunk
    registers = getattr(trunk, "register_tokens", None)
    if not isinstance(registers, Tensor) or not hasattr(trunk, "to_patch_embedding"):
        raise TokenError(f"{geometry.name!r} is not inside of what cuts the image, and sees other tokens; slice m[...].")
    names = (*(f"reg{i}" for i in range(registers.shape[-2])), "cls")
    tokens = Tokens(names, geometry.tokens(shape[3] - len(names), prefix=False).grid_size)
    return find_queries(shape, tokens), tokens


@layout("vit_pytorch.jumbo_vit.Attention")
def jumbo_class_tokens(geometry: Geometry, shape: Shape) -> tuple[Tokens, Tokens]:
    """A class token that is as wide as several comes as several."""
    patches = len(geometry.find_holder("pos_embedding").pos_embedding)
    names = tuple(f"cls{i}" for i in range(shape[3] - patches))
    tokens = Tokens(names, geometry.tokens(patches, prefix=False).grid_size)
    return tokens, tokens


@layout("vit_pytorch.cross_vit.Attention")
def cross_vit_attention_tokens(geometry: Geometry, shape: Shape) -> tuple[Tokens, Tokens]:
    """Patches of two sizes, each with a class token; the class token of one looks at itself and the patches of the other."""
    patches = grid_size(cut_of(geometry.trunk), geometry.image_size, shape[3] - 1)
    if patches is None:
        raise TokenError(
            f"the {shape[3]} tokens of {geometry.name!r} are no grid over its image; slice the map itself, m[...]."
        )
    tokens = whole_grid(patches, ("cls",))
    return find_queries(shape, tokens), tokens


# Tokens that may have been dropped


@layout("vit_pytorch.vit.Attention", "vit_pytorch.mp3.Attention")
def maybe_masked_attention_tokens(geometry: Geometry, shape: Shape) -> tuple[Tokens, Tokens]:
    """Wrapped for pretraining, the encoder sees the patches that were kept in a random order."""
    path = list(geometry.path())
    for module in path:
        wraps = [name for name in qualified_names(module) if name in ("vit_pytorch.mae.MAE", "vit_pytorch.mp3.MP3")]
        if wraps and any(part in path for name in ("encoder", "vit") if (part := getattr(module, name, None)) is not None):
            raise_shuffled(geometry)
    tokens = geometry.tokens(shape[3])
    return find_queries(shape, tokens), tokens


@layout("vit_pytorch.vit_with_patch_dropout.Attention", "vit_pytorch.simple_vit_with_patch_dropout.Attention")
def attention_after_patch_dropout_tokens(geometry: Geometry, shape: Shape) -> tuple[Tokens, Tokens]:
    trunk: Any = geometry.trunk
    sides = getattr(trunk.to_patch_embedding[0], "axes_lengths", {})  # of the Rearrange that cuts patches
    if geometry.images is None or isinstance(geometry.images, Patches) or not {"p1", "p2"} <= set(sides):
        raise TokenError(f"it is not known whether {geometry.name!r} sees all patches; slice the map itself, m[...].")
    size = geometry.images[1] // sides["p1"], geometry.images[2] // sides["p2"]
    tokens = whole_grid(size, ("cls",) * isinstance(getattr(trunk, "cls_token", None), Tensor))
    if len(tokens) != shape[3]:  # some were dropped
        raise_shuffled(geometry)
    return tokens, tokens
