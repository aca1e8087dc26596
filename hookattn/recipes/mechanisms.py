"""What several kinds of attention have in common: masks, projections, rotary and relative positions, orders of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, TypedDict

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor

from ..attention.narrowing import EachToken
from ..attention.projected import do_by_token
from ..attention.projection import multiply, project
from ..attention.sources import QK, exact_dtype
from ..conditions.autocast import without_autocast
from ..errors import TokenError
from ..image.geometry import Geometry
from ..image.tokens import Tokens
from ..image.windows import cut_windows, whole_grid
from .places import find_windows
from .registry import Shape

# Masks


class Masked(TypedDict, total=False):
    """What a mask is to a `QK`."""

    bias: Tensor
    mask: Tensor | None


def additive_or_bool(attn_mask: Tensor | None) -> Masked:
    """What SDPA calls `attn_mask`: a bool tensor masks, a float tensor is added."""
    if attn_mask is not None and attn_mask.dtype.is_floating_point:
        return {"bias": attn_mask}
    return {"mask": attn_mask}


def per_window(mask: Tensor | None, batch: int) -> tuple[Tensor, ...]:
    """The additive mask of shifted windows, (windows, queries, keys), for the windows of every image; nothing for None.

    Returns:
        (batch, 1, queries, keys), where batch is images * windows.
    """
    if mask is None:
        return ()
    return (repeat(mask, "w q k -> (b w) 1 q k", b=batch // len(mask)),)


# Projections


def project_in_parallel(self: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, (batch, tokens, dim) each, of the projection a parallel block shares with its MLP."""
    y = self.in_proj(self.in_norm(x))
    _, q, k, v = y.split(self.in_split, dim=-1)
    return q, k, v


def project_with_biases(self: Any, x: Tensor) -> tuple[Tensor, ...]:
    """Queries and keys of a packed projection whose biases are parameters of their own (`q_bias`, `k_bias`, `v_bias`)."""
    pattern = "b n (parts h d) -> parts b h n d"
    if self.q_bias is None:
        return project(self.qkv, x, pattern, parts=2, of=3, h=self.num_heads)
    if self.qkv_bias_separate:
        bias = torch.cat((self.q_bias, self.k_bias))
        qk = torch.cat(project(self.qkv, x, "b n (parts c) -> parts b n c", parts=2, of=3), dim=-1) + bias
        return torch.unbind(rearrange(qk, pattern, parts=2, h=self.num_heads))
    # the layer has no bias of its own: q and k get theirs where they are multiplied
    q_weight, k_weight, _ = self.qkv.weight.chunk(3)
    return multiply(x, q_weight, self.q_bias, self.num_heads), multiply(x, k_weight, self.k_bias, self.num_heads)


def pool_on_grid(t: Tensor, pool: Any, size: list[int], prefix: int) -> tuple[Tensor, list[int]]:
    """(batch, heads, tokens, d) pooled head by head on its grid, the class token left out, and the size of the new grid."""
    if pool is None:
        return t, size
    grid = rearrange(t[:, :, prefix:], "b h (y x) d -> (b h) d y x", y=size[0], x=size[1])
    grid = pool(grid.contiguous())
    tokens = rearrange(grid, "(b h) d y x -> b h (y x) d", h=t.shape[1])
    return torch.cat((t[:, :, :prefix], tokens), dim=2), list(grid.shape[-2:])


def flatten_grid(x: Tensor) -> Tensor:
    """(batch, channels, height, width) as tokens, row by row."""
    return rearrange(x, "b c y x -> b (y x) c")


def heads_of_grid(x: Tensor, heads: int) -> Tensor:
    """(batch, heads, tokens, head_dim) of (batch, heads * head_dim, height, width)."""
    return rearrange(x, "b (h d) y x -> b h (y x) d", h=heads)


def unflatten_grid(x: Tensor, size: list[int] | tuple[int, int]) -> Tensor:
    """(batch, tokens, channels) on its grid of (height, width)."""
    return rearrange(x, "b (y x) c -> b c y x", y=size[0], x=size[1])


def repeat_for_groups(t: Tensor, heads: int) -> Tensor:
    """Keys or values of fewer heads than there are queries, each for as many heads as share it."""
    return t if t.shape[1] == heads else torch.repeat_interleave(t, heads // t.shape[1], dim=1)


# Rotary positions


def rotate_patches(self: Any, q: Tensor, rope: Tensor) -> Tensor:
    """Rotate (batch, heads, tokens, head_dim) behind the prefix tokens, which have no position.

    Args:
        rope: (tokens, 2 * d) or (heads, tokens, 2 * d) or with a leading batch axis: sines, then cosines.

    Source: Su et al. 2021, "RoFormer", equation 34; `rotate_half` pairs feature i with i + d/2 instead of 2i with 2i + 1.
    """
    return rotate(q, rope, prefix=self.num_prefix_tokens, half=getattr(self, "rotate_half", False))


def rotate(q: Tensor, rope: Tensor, *, prefix: int = 0, half: bool = False) -> Tensor:
    """The same, behind so many prefix tokens, which are turned by nothing."""
    sin, cos = rope.reshape(*[1] * (4 - rope.dim()), *rope.shape).chunk(2, dim=-1)
    turn = EachToken(partial(_turn, half=half), (sin, cos), torch.promote_types(q.dtype, rope.dtype), prefix)
    return do_by_token(q, turn)


def _turn(q: Tensor, sin: Tensor, cos: Tensor, *, half: bool) -> Tensor:
    if half:  # feature i turns with i + d/2
        first, second = q.chunk(2, dim=-1)
        turned = torch.cat((-second, first), dim=-1)
    else:
        turned = torch.stack((-q[..., 1::2], q[..., ::2]), dim=-1).flatten(-2)
    return q * cos + turned * sin


def rotate_by_axis(q: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(batch, heads, tokens, head_dim), one half of the features by the column and the other by the row.

    Args:
        cos, sin: (batch, tokens, head_dim).
    """
    tensors = sin.unsqueeze(1), cos.unsqueeze(1)
    return do_by_token(q, EachToken(_turn_by_axis, tensors, torch.promote_types(q.dtype, cos.dtype)))


def _turn_by_axis(q: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
    first, second = rearrange(q, "b h n (half two d) -> two b h n half d", half=2, two=2)
    turned: Tensor = rearrange([-second, first], "two b h n half d -> b h n (half two d)")
    return q * cos + turned * sin


# Relative positions that are read off the query


def read_off_query(
    q: Tensor, k: Tensor, rel_h: Tensor, rel_w: Tensor, *, scale: float, position_scale: float = 1.0, prefix: int = 0
) -> QK:
    """Queries with what they read for each row and column of keys, keys with indicators of theirs.

        score(q, k) = scale * q.k + q.rel_h[row of q, row of k] + q.rel_w[column of q, column of k]

    Li et al. 2022, "MViTv2", arXiv 2112.01526, equation 4; before that Bello et al. 2019, arXiv 1904.09925. The last two terms
    are products as well, so one product of width d + rows + columns gives the scores. Nothing of size queries x keys is formed
    before it, and a row of the map costs a row.

    Args:
        q, k: (batch, heads, queries, d) and (batch, heads, keys, d), row by row.
        rel_h, rel_w: (rows of queries, rows of keys, d) and (columns of queries, columns of keys, d).
        scale: of q.k alone.
        position_scale: of what is read off the query.
        prefix: how many queries and keys come first and have no position.
    """
    with without_autocast(q.device):
        q, k, rel_h, rel_w = (t.to(exact_dtype(t.dtype)) for t in (q, k, rel_h, rel_w))
        on_grid = rearrange(q[:, :, prefix:], "b h (y x) d -> b h y x d", y=len(rel_h), x=len(rel_w))
        of_rows = torch.einsum("bhyxd,ykd->bhyxk", on_grid, rel_h).flatten(2, 3)  # (batch, heads, queries, rows of keys)
        of_columns = torch.einsum("bhyxd,xkd->bhyxk", on_grid, rel_w).flatten(2, 3)
        read = torch.cat((of_rows, of_columns), dim=-1) * position_scale
        rows, columns = rel_h.shape[1], rel_w.shape[1]
        row = repeat(torch.eye(rows, dtype=k.dtype, device=k.device), "y k -> (y x) k", x=columns)
        column = repeat(torch.eye(columns, dtype=k.dtype, device=k.device), "x k -> (y x) k", y=rows)
        # one row and one column of each key are 1: the product picks what the query has read for them
        place = torch.cat((row, column), dim=-1).expand(*k.shape[:2], -1, -1)
        q = torch.cat((q * scale, F.pad(read, (0, 0, prefix, 0))), dim=-1)
        k = torch.cat((k, F.pad(place, (0, 0, prefix, 0))), dim=-1)
    return QK(q, k, scale=1.0)


def number_offsets(queries: int, keys: int, device: torch.device) -> Tensor:
    """(queries, keys): where in a table of 2 * max(queries, keys) - 1 the offset between a query and a key stands.

    Where there are fewer of the one than of the other, its coordinates are stretched.
    """
    stretch_q, stretch_k = max(keys / queries, 1.0), max(queries / keys, 1.0)  # one of them is 1
    query = torch.arange(queries, dtype=torch.float32, device=device)[:, None] * stretch_q
    key = torch.arange(keys, dtype=torch.float32, device=device)[None, :] * stretch_k
    return (query - key + (keys - 1) * stretch_k).long()


def resize_table(table: Tensor, count: int) -> Tensor:
    """A table of offsets, (offsets, d), for another number of them."""
    if len(table) == count:
        return table
    return rearrange(F.interpolate(rearrange(table, "n d -> 1 d n"), size=count, mode="linear"), "1 d n -> n d")


# Layouts of many classes


def prefix_and_patch_tokens(geometry: Geometry, shape: Shape) -> tuple[Tokens, Tokens]:
    """The layout of attention that sees all prefix tokens of the model and all patches, or what the block around cuts."""
    tokens = find_windows(geometry) or geometry.tokens(shape[3], prefix=True)
    return tokens, tokens


def patch_tokens(geometry: Geometry, shape: Shape) -> tuple[Tokens, Tokens]:
    """The layout of attention that sees all patches: a class token comes later, or never."""
    tokens = find_windows(geometry) or geometry.tokens(shape[3], prefix=False)
    return tokens, tokens


def channels_first_tokens(geometry: Geometry, shape: Shape) -> tuple[Tokens, Tokens]:
    """The layout of attention that is called with (batch, channels, rows, columns), the image or a window of it."""
    tokens = find_windows(geometry) or whole_grid(geometry.argument("x")[2:])
    return tokens, tokens


def channels_last_tokens(geometry: Geometry, shape: Shape) -> tuple[Tokens, Tokens]:
    """The layout of attention that is called with (batch, rows, columns, channels), the image or a window of it."""
    tokens = find_windows(geometry) or whole_grid(geometry.argument("x")[1:-1])
    return tokens, tokens


# Tokens in another order


def cut_square_windows(size: Sequence[int], window: int | None) -> Tokens:
    """A grid in square windows, padded at its lower and right border; no window, or 0, is all of it."""
    return cut_windows(size, (window, window)) if window else whole_grid(size)


def append_tokens(geometry: Geometry, shape: Shape, tail: Tensor, prefix: tuple[str, ...] = ()) -> Tokens:
    """Prefix tokens and patches, and after them tokens that lie nowhere on the image."""
    after = tail.shape[-2]
    patches = shape[3] - len(prefix) - after
    places = torch.cat((torch.arange(patches, device="cpu"), torch.full((after,), -1, device="cpu")))
    return Tokens(prefix, geometry.tokens(patches, prefix=False).grid_size, places[None, None])


def unroll_tokens(schedule: Sequence[Sequence[int]], size: Sequence[int]) -> Tokens:
    """Patches in the order of `Unroll`: stride by stride, what is pooled into one stands far apart."""
    if len(size) != 2:
        raise TokenError(f"its patches are a grid of {' x '.join(map(str, size))}, which is no image; slice m[...].")
    grid = whole_grid(size)
    places = grid.patches[0].reshape(1, *size)
    for rows, columns in schedule:
        # the places inside of a cell join the batch, so that those of one cell stand far apart
        places = rearrange(places, "b (y row) (x column) -> (b row column) y x", row=rows, column=columns)
    return Tokens((), grid.grid_size, places.reshape(1, 1, -1))


def group_in_mask_units(tokens: Tokens, windows: int) -> Tokens:
    """Unrolled tokens in their mask units, which take turns."""
    return Tokens((), tokens.grid_size, rearrange(tokens.patches, "1 1 (n w) -> 1 w n", w=windows))


def raise_shuffled(geometry: Geometry) -> None:
    """Say that only some patches are left, and nobody knows which.

    Raises:
        TokenError: always.
    """
    raise TokenError(f"{geometry.name!r} sees some of the patches, chosen at random; slice the map itself, m[...].")
