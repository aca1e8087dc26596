"""What a forward forms a map with: a call of SDPA, a softmax, or a factor of a product, each with the rows that stand in it."""

from __future__ import annotations

import math
from typing import Any, Union

import torch
from torch import Tensor

from ..attention.sources import QK, Dense, Outer, Scores, exact_dtype
from .arrangement import Arrangement, Part


class Fused:
    """A call of `scaled_dot_product_attention`, with its arguments.

    Attributes:
        out: what came out, where something is differentiated by it.
        dtype: of what came out.
    """

    out: Tensor | None = None
    dtype = torch.float32

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> None:
        self.q, self.k, self.v = query, *(_for_each_head(query, t) for t in (key, value))
        self.mask, self.scale, self.is_causal, self.dropout_p = _as_tensor(attn_mask, query), scale, is_causal, dropout_p
        leads = (t.shape[:-2] for t in (self.q, self.k, self.v))
        self.lead: tuple[int, ...] = torch.broadcast_shapes(*leads)  # type: ignore[no-untyped-call]

    def part(self, number: int) -> Part:
        """Where the rows of its map would stand."""
        shape = (*self.lead, self.q.shape[-2], self.k.shape[-2])
        return Part(number, None, shape, len(shape) - 1)

    def multiplied(self, rows: Tensor) -> Tensor:
        """What it puts out, made of rows of a map (rows, keys) in place of its own."""
        v = _merged(self.v, self.lead)
        out = rows.view(len(v), self.q.shape[-2], rows.shape[-1]) @ v.to(rows.dtype)
        return out.view(*self.lead, *out.shape[1:])

    def rows(self) -> Tensor:
        """Its map, (rows, keys)."""
        return self._one_by_one().values().flatten(0, 2)

    def slope_rows(self, grad: Tensor) -> Tensor:
        """The gradient of its map, (rows, keys)."""
        grad, value = (_merged(t, self.lead)[:, None] for t in (grad, self.v.detach()))
        return Outer(grad, value).values().flatten(0, 2)

    def source(self, index: Tensor) -> QK:
        """Queries and keys of a map whose rows stand there among its rows; the rows of each head have the same keys."""
        q, k, mask = self.q, self.k, self.mask
        if self.lead == tuple(index.shape[:2]) and is_in_order(index):
            q, k = (t.expand(*self.lead, *t.shape[-2:]) for t in (q, k))  # a mask that is broadcast may stay so
        else:
            every = (*self.lead, q.shape[-2], k.shape[-2])
            mask = None if mask is None else _pick_rows(_merged(mask.expand(every), self.lead), index)
            q, k = _pick_rows(_merged(q, self.lead), index), _pick_slabs(_merged(k, self.lead), index, q.shape[-2])
        return self._qk(q, k, mask, index)

    def slope(self, grad: Tensor, index: Tensor) -> Outer:
        """The gradient of a map whose rows stand there: dL/dA = dL/d(A v) v^T."""
        return Outer(_pick_rows(_merged(grad, self.lead), index), self.values(index).detach())

    def values(self, index: Tensor) -> Tensor:
        """What a map whose rows stand there is multiplied onto: (windows, heads, keys, head_dim)."""
        return _pick_slabs(_merged(self.v, self.lead), index, self.q.shape[-2])

    def _one_by_one(self) -> QK:
        """All that is merged before the last two axes is an image with one head."""
        mask = None if self.mask is None else _merged(self.mask.expand(*self.part(0).shape), self.lead)[:, None]
        q, k = (_merged(t, self.lead)[:, None] for t in (self.q, self.k))
        return self._qk(q, k, mask, None).narrow()

    def _qk(self, q: Tensor, k: Tensor, mask: Tensor | None, index: Tensor | None) -> QK:
        is_causal = self.is_causal
        if is_causal and index is not None and not is_in_order(index):  # row numbers do not tell which keys came before
            row, key = index % self.q.shape[-2], torch.arange(k.shape[-2], device="cpu")
            mask, is_causal = (key <= row[..., None]).to(q.device), False
        additive = mask is not None and mask.dtype != torch.bool
        bias, mask = (mask, None) if additive else (None, mask)
        return QK(q, k, scale=self.scale, bias=bias, mask=mask, is_causal=is_causal)


class Softmaxed:
    """A softmax, with what it was taken of.

    Attributes:
        out: what came out, where something is differentiated by it.
        dtype: of what came out.
    """

    out: Tensor | None = None
    dtype = torch.float32

    def __init__(self, scores: Tensor, axis: int) -> None:
        self.scores, self._axis = scores, axis

    def part(self, number: int) -> Part:
        """Where the rows of its map stand."""
        return Part(number, None, tuple(self.scores.shape), self._axis)

    def rows(self) -> Tensor:
        """What comes out of it, (rows, keys)."""
        return Scores(self.part(0).as_rows(self.scores)[None, None]).values()[0, 0]

    def slope_rows(self, grad: Tensor) -> Tensor:
        """The gradient of what comes out of it, (rows, keys)."""
        return self.part(0).as_rows(grad).to(exact_dtype(grad.dtype))

    def source(self, index: Tensor) -> Scores:
        """The scores of a map whose rows stand there among its rows."""
        return Scores(_pick_rows(self.part(0).as_rows(self.scores)[None], index))

    def slope(self, grad: Tensor, index: Tensor) -> Dense:
        """The gradient of a map whose rows stand there."""
        return Dense(_pick_rows(self.slope_rows(grad)[None], index))


class Factor:
    """A factor of a product: a map that was made by hand.

    Attributes:
        out: the factor, where something is differentiated by it.
        dtype: of the factor.
    """

    out: Tensor | None = None

    def __init__(self, tensor: Tensor, axis: int) -> None:
        self._tensor, self._axis, self.dtype = tensor, axis, tensor.dtype

    def part(self, number: int) -> Part:
        """Where rows stand in it; which factor it is, is not told here."""
        return Part(number, 0, tuple(self._tensor.shape), self._axis)

    def rows(self) -> Tensor:
        """Rows of the map, (rows, keys)."""
        return self.slope_rows(self._tensor)

    def slope_rows(self, grad: Tensor) -> Tensor:
        """The same of its gradient."""
        return self.part(0).as_rows(grad).to(exact_dtype(grad.dtype))


Formed = Union[Fused, Softmaxed, Factor]
"""What holds rows of a map."""


def source_of_rows(formed: list[Formed], arrangement: Arrangement) -> Union[QK, Scores, Dense]:
    """What a map is computed from, as it is arranged among what was formed."""
    if (site := _alone(formed, arrangement)) is not None:
        return site.source(arrangement.index)
    return Dense(arrangement.collect([each.rows() for each in formed]))


def slope_of_rows(formed: list[Formed], arrangement: Arrangement, grads: list[Tensor]) -> Union[Outer, Dense]:
    """What the gradient of a map is computed from, out of those of what was formed."""
    if (site := _alone(formed, arrangement)) is not None:
        return site.slope(grads[0], arrangement.index)
    return Dense(arrangement.collect([each.slope_rows(grad) for each, grad in zip(formed, grads)]))


def _alone(formed: list[Formed], arrangement: Arrangement) -> Fused | Softmaxed | None:
    """What holds all of a map by itself, so that some of its rows are had without the others."""
    site = formed[0]
    if len(formed) > 1 or not arrangement.is_full or isinstance(site, Factor):
        return None
    return site if isinstance(site, Softmaxed) or arrangement.has_own_keys else None


def is_in_order(index: Tensor) -> bool:
    """Whether all rows stand as they come."""
    return torch.equal(index.flatten(), torch.arange(index.numel(), device=index.device))


def _pick_rows(t: Tensor, index: Tensor) -> Tensor:
    """(windows, heads, queries, d) of (g, rows, d)."""
    rows = t.flatten(0, 1)
    return (
        rows.view(*index.shape, t.shape[-1]) if is_in_order(index) and len(rows) == index.numel() else rows[index.to(t.device)]
    )


def _pick_slabs(t: Tensor, index: Tensor, queries: int) -> Tensor:
    """(windows, heads, keys, d) of (g, keys, d)."""
    slabs = index[:, :, 0] // queries
    in_order = is_in_order(slabs) and len(t) == slabs.numel()
    return t.view(*slabs.shape, *t.shape[1:]) if in_order else t[slabs.to(t.device)]


def _merged(t: Tensor, lead: tuple[int, ...]) -> Tensor:
    """Axes before the last two merged into one."""
    return t.expand(*lead, *t.shape[-2:]).reshape(math.prod(lead), *t.shape[-2:])


def _for_each_head(query: Tensor, t: Tensor) -> Tensor:
    """Keys or values of grouped heads, which SDPA spreads by itself."""
    if query.dim() > 2 and t.dim() > 2 and query.shape[-3] != t.shape[-3] > 1:
        return t.repeat_interleave(query.shape[-3] // t.shape[-3], dim=-3)
    return t


def _as_tensor(mask: Any, query: Tensor) -> Any:
    """A mask as a plain tensor: those of `torch.nn.attention.bias` are tensors of another class, without values."""
    # Undocumented, torch 2.6 to 2.15: how they are made.
    return mask._materialize(query.device) if hasattr(mask, "_materialize") else mask
