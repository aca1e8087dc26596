"""Relative positions read off the query, a row's and a column's apart.

score(q, k) = scale * q.k + q.rel_h[row of q, row of k] + q.rel_w[column of q, column of k]

Li et al. 2022, "MViTv2", arXiv 2112.01526, equation 4; before that Bello et al. 2019, arXiv 1904.09925. The last two terms are
products as well: with indicators of a key's row and column appended to the key, and what the query reads for each row and
column appended to the query, one product of width d + rows + columns gives the scores. Nothing of size queries x keys is formed
before it, and a row of the map costs a row.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor

from ..functional import QK, exact_dtype, exactly
from .projections import project
from .registry import recipe
from .rotary import rotated


@recipe("timm.models.vision_transformer_sam.Attention", form="(b h) q k")
def sam_attention(self: Any, x: Tensor) -> QK:
    _, height, width, _ = x.shape
    x = rearrange(x, "b y x c -> b (y x) c")
    q, k = project(self.qkv, x, "b n (parts h d) -> parts b h n d", parts=2, of=3, h=self.num_heads)
    dtype = k.dtype
    q, k = self.q_norm(q), self.k_norm(k)
    if self.use_rel_pos:
        rel_h = resized(self.rel_pos_h, 2 * height - 1)[offsets(height, height, x.device)]
        rel_w = resized(self.rel_pos_w, 2 * width - 1)[offsets(width, width, x.device)]
        return read_off_query(q, k, rel_h, rel_w, scale=self.scale)
    if self.rope is not None:
        rope = self.rope.get_embed()
        q, k = (rotated(t, rope).to(dtype) for t in (q, k))
    return QK(q, k, scale=self.scale)


@recipe("timm.models.mvitv2.MultiScaleAttention")
def multi_scale_attention(self: Any, x: Tensor, feat_size: list[int]) -> QK:
    q, k = project(self.qkv, x, "b n (parts h d) -> parts b h n d", parts=2, of=3, h=self.num_heads)
    prefix = int(self.has_cls_token)
    q, q_size = pooled(q, self.pool_q, feat_size, prefix)
    q = q if self.norm_q is None else self.norm_q(q)
    k, k_size = pooled(k, self.pool_k, feat_size, prefix)
    k = k if self.norm_k is None else self.norm_k(k)
    if self.rel_pos_type != "spatial":
        return QK(q, k, scale=self.scale)
    rel_h = self.rel_pos_h[offsets(q_size[0], k_size[0], x.device)]
    rel_w = self.rel_pos_w[offsets(q_size[1], k_size[1], x.device)]
    return read_off_query(q, k, rel_h, rel_w, scale=self.scale, prefix=prefix)


@recipe("timm.layers.bottleneck_attn.BottleneckAttn", form="(b h) q k")
def bottleneck_attention(self: Any, x: Tensor) -> QK:
    qkv = self.qkv(x)
    q, k, _ = qkv.split([self.dim_out_qk, self.dim_out_qk, self.dim_out_v], dim=1)
    q, k = (rearrange(t, "b (h d) y x -> b h (y x) d", h=self.num_heads) for t in (q, k))
    height, width = x.shape[-2:]
    rel_h = self.pos_embed.height_rel[offsets(height, height, x.device).T]
    rel_w = self.pos_embed.width_rel[offsets(width, width, x.device).T]
    position_scale = self.scale if self.scale_pos_embed else 1.0
    return read_off_query(q, k, rel_h, rel_w, scale=self.scale, position_scale=position_scale)


@recipe("timm.layers.halo_attn.HaloAttn", form="(b h) w q k")
def halo_attention(self: Any, x: Tensor) -> QK:
    """Each block looks at itself and a halo around it (Vaswani et al. 2021, arXiv 2103.12731); zero padding is attended to."""
    block, window = self.block_size_ds, self.win_size
    pattern = "b (h d) (row y) (col x) -> (b row col) h (y x) d"
    q = rearrange(self.q(x), pattern, h=self.num_heads, y=block, x=block)
    k = rearrange(self.kv(x), "b (h d) y x -> b h d y x", h=self.num_heads)[:, :, : self.dim_head_qk]
    k = F.pad(k, [self.halo_size] * 4).unfold(3, window, self.block_size).unfold(4, window, self.block_size)
    k = rearrange(k, "b h d row col y x -> (b row col) h (y x) d")
    key, query = torch.arange(window, device=x.device), torch.arange(block, device=x.device)
    distance = key - query[:, None] + window - 1
    rel_h, rel_w = self.pos_embed.height_rel[distance], self.pos_embed.width_rel[distance]
    position_scale = self.scale if self.scale_pos_embed else 1.0
    return read_off_query(q, k, rel_h, rel_w, scale=self.scale, position_scale=position_scale)


def read_off_query(
    q: Tensor, k: Tensor, rel_h: Tensor, rel_w: Tensor, *, scale: float, position_scale: float = 1.0, prefix: int = 0
) -> QK:
    """Queries with what they read for each row and column of keys, keys with indicators of theirs.

    Args:
        q, k: (batch, heads, queries, d) and (batch, heads, keys, d), row by row.
        rel_h, rel_w: (rows of queries, rows of keys, d) and (columns of queries, columns of keys, d).
        scale: of q.k alone.
        position_scale: of what is read off the query.
        prefix: how many queries and keys come first and have no position.
    """
    with exactly(q.device):
        q, k, rel_h, rel_w = (t.to(exact_dtype(t.dtype)) for t in (q, k, rel_h, rel_w))
        on_grid = rearrange(q[:, :, prefix:], "b h (y x) d -> b h y x d", y=len(rel_h), x=len(rel_w))
        of_rows = torch.einsum("bhyxd,ykd->bhyxk", on_grid, rel_h).flatten(2, 3)
        of_columns = torch.einsum("bhyxd,xkd->bhyxk", on_grid, rel_w).flatten(2, 3)
        read = torch.cat((of_rows, of_columns), dim=-1) * position_scale
        rows, columns = rel_h.shape[1], rel_w.shape[1]
        row = repeat(torch.eye(rows, dtype=k.dtype, device=k.device), "y k -> (y x) k", x=columns)
        column = repeat(torch.eye(columns, dtype=k.dtype, device=k.device), "x k -> (y x) k", y=rows)
        place = torch.cat((row, column), dim=-1).expand(*k.shape[:2], -1, -1)
        q = torch.cat((q * scale, F.pad(read, (0, 0, prefix, 0))), dim=-1)
        k = torch.cat((k, F.pad(place, (0, 0, prefix, 0))), dim=-1)
    return QK(q, k, scale=1.0)


def offsets(queries: int, keys: int, device: torch.device) -> Tensor:
    """(queries, keys): where in a table of 2 * max(queries, keys) - 1 the offset between a query and a key stands.

    Where there are fewer of the one than of the other, its coordinates are stretched.
    """
    stretch_q, stretch_k = max(keys / queries, 1.0), max(queries / keys, 1.0)
    query = torch.arange(queries, dtype=torch.float32, device=device)[:, None] * stretch_q
    key = torch.arange(keys, dtype=torch.float32, device=device)[None, :] * stretch_k
    return (query - key + (keys - 1) * stretch_k).long()


def resized(table: Tensor, count: int) -> Tensor:
    """A table of offsets, (offsets, d), for another number of them."""
    if len(table) == count:
        return table
    return rearrange(F.interpolate(rearrange(table, "n d -> 1 d n"), size=count, mode="linear"), "1 d n -> n d")


def pooled(t: Tensor, pool: Any, size: list[int], prefix: int) -> tuple[Tensor, list[int]]:
    """(batch, heads, tokens, d) pooled head by head on its grid, the class token left out, and the size of the new grid."""
    if pool is None:
        return t, size
    grid = rearrange(t[:, :, prefix:], "b h (y x) d -> (b h) d y x", y=size[0], x=size[1])
    grid = pool(grid.contiguous())
    tokens = rearrange(grid, "(b h) d y x -> b h (y x) d", h=t.shape[1])
    return torch.cat((t[:, :, :prefix], tokens), dim=2), list(grid.shape[-2:])
