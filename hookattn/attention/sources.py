"""What a map, or its gradient, is computed from; the only softmax in the package.

A recipe hands over what a map is made of, a `QK`; replay of a module that never shows its queries and keys hands over
`Scores`. A gradient is an `Outer` product. All of them can be narrowed to some images, heads and rows before anything of size
queries x keys is formed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeVar, Union

import torch
from torch import Tensor

from ..conditions.autocast import without_autocast
from .derived import Derived
from .narrowing import ALL, Pick, pick
from .projected import Projected, compute, sizes_of
from .softmax import Chunk, is_ours_alone, softmax

S = TypeVar("S", bound="_Whole")


class _Product:
    """Base of what is computed from two factors, (batch, heads, queries, d) and (batch, heads, keys, d)."""

    @property
    def _factors(self) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(batch, heads, queries, keys)."""
        batch, heads, queries, _ = self._factors[0].shape
        return batch, heads, queries, self._factors[1].shape[-2]

    @property
    def device(self) -> torch.device:
        """The device it is computed on."""
        return self._factors[0].device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype it is computed in: float64 for float64 factors, float32 for everything else."""
        return exact_dtype(self._factors[0].dtype)


@dataclass(frozen=True, eq=False)
class _Whole:
    """Base of what is there already for all pairs of a query and a key.

    Attributes:
        tensor: (batch, heads, queries, keys).
    """

    tensor: Tensor

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(batch, heads, queries, keys)."""
        batch, heads, queries, keys = self.tensor.shape
        return batch, heads, queries, keys

    @property
    def device(self) -> torch.device:
        """The device it lies on."""
        return self.tensor.device

    def narrow(self: S, batch: Pick = ALL, heads: Pick = ALL, rows: Pick = ALL) -> S:
        """Cut it to some images, heads and queries."""
        return replace(self, tensor=pick(self.tensor, batch, heads, rows))

    def prepare(self: S) -> S:
        """Return itself: there is nothing to be computed beforehand, see `QK.prepare`."""
        return self


@dataclass(frozen=True, eq=False)
class QK(_Product):
    """Queries and keys of one attention call: softmax(q k^T * scale + bias) over the keys the mask lets through.

    Attributes:
        q: (batch, heads, queries, head_dim), normalised and rotated, not yet scaled; `Projected` until it is computed.
        k: (batch, heads, keys, head_dim), likewise.
        scale: a number, or a tensor that broadcasts to (batch, heads, queries, 1); None stands for head_dim ** -0.5.
        bias: float tensor that broadcasts to (batch, heads, queries, keys), or several, added to the scaled scores.
        mask: bool tensor that broadcasts likewise, True where a query may attend.
        is_causal: query i attends to keys 0 .. i.
        mix: (heads, heads of q) if scores are mixed over the heads of q and k, before biases and the softmax.
    """

    q: Tensor
    k: Tensor
    scale: float | Tensor | None = None
    bias: Tensor | tuple[Tensor, ...] | None = None
    mask: Tensor | None = None
    is_causal: bool = False
    mix: Tensor | None = None

    @property
    def _factors(self) -> tuple[Tensor, Tensor]:
        return self.q, self.k

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(batch, heads, queries, keys)."""
        batch, heads, queries, _ = sizes_of(self.q)
        return batch, heads if self.mix is None else len(self.mix), queries, sizes_of(self.k)[2]

    @property
    def biases(self) -> tuple[Tensor, ...]:
        """All that is added to the scores, none, one or several."""
        return () if self.bias is None else (self.bias,) if isinstance(self.bias, Tensor) else self.bias

    def narrow(self, batch: Pick = ALL, heads: Pick = ALL, rows: Pick = ALL) -> QK:
        """Cut queries and keys to some images, heads and rows, each axis on its own; biases and masks are expanded to them.

        Queries that are cut are computed.
        """
        if batch is ALL and heads is ALL and rows is ALL and not self.is_causal:
            return self

        def narrowed(value: Tensor, like: Pick = heads, count: int | None = None) -> Tensor:
            images, own, queries, _ = self.shape
            shape = (images, own if count is None else count, queries, value.shape[-1] if value.dim() else 1)
            return pick(value.expand(shape), batch, like, rows)

        # where scores are mixed over heads, each head needs all heads of q and k
        mixed = heads if self.mix is None else ALL
        q = self.q.compute_part(batch, mixed, rows) if isinstance(self.q, Projected) else pick(self.q, batch, mixed, rows)
        k = self.k.narrowed(batch, mixed) if isinstance(self.k, Projected) else pick(self.k, batch, mixed, ALL)
        mask = None if self.mask is None else narrowed(self.mask)
        if self.is_causal:
            # row numbers, since rows that were picked no longer tell which keys came before them
            place = torch.arange(max(self.shape[2:]), device=q.device)
            causal = (place[: self.shape[3]] <= place[: self.shape[2]][rows, None]).expand(len(q), self.shape[1], -1, -1)[
                :, heads
            ]
            mask = causal if mask is None else mask & causal
        scale = narrowed(self.scale, mixed, self.q.shape[1]) if isinstance(self.scale, Tensor) else self.scale
        bias = None if self.bias is None else tuple([narrowed(bias) for bias in self.biases])
        return QK(q, k, scale, bias, mask, mix=None if self.mix is None else self.mix[heads])

    def prepare(self) -> QK:
        """Compute queries and keys now, so that a map that is made a chunk of rows at a time projects them once."""
        return replace(self, q=compute(self.q), k=compute(self.k))

    def values(self, out: Tensor | None = None) -> Tensor:
        """The map: (batch, heads, queries, keys), in `dtype`, rows that sum to 1; in `out` where it can be made there.

        Everything after the projections is done in `dtype`, under autocast too: half-precision scores overflow, and
        half-precision rows do not sum to 1. A row that the mask or the bias closes throughout is zero, as
        `scaled_dot_product_attention` has it.
        """
        return softmax(*self._scores(out))

    def chunk(self) -> Chunk:
        """The map, with its scores."""
        return Chunk.of(*self._scores())

    def _scores(self, out: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """What the softmax is taken of, new and in `dtype`, and which rows are closed throughout, if any can be."""
        if self.is_causal:
            return self.narrow()._scores(out)
        q, k = compute(self.q), self.k if _is_cheaper_absorbed(self.q, self.k) else compute(self.k)
        if not torch._C._is_any_autocast_enabled():  # undocumented, torch 2.6 to 2.15
            return self._scores_of(q, k, out)
        with without_autocast(q.device):
            return self._scores_of(q, k, out)

    def _scores_of(self, q: Tensor, k: Tensor, out: Tensor | None) -> tuple[Tensor, Tensor | None]:
        biases, dtype = self.biases, exact_dtype(q.dtype)
        # `to` costs as much as a view also where there is nothing to do
        scores = self._products(q if q.dtype is dtype else q.to(dtype), k, out)
        if not biases and self.mask is None:
            return scores, None
        writable = is_ours_alone(scores, *biases)
        for bias in biases:
            scores = scores.add_(bias.to(dtype)) if writable else scores + bias.to(dtype).expand_as(scores)
        if self.mask is not None:
            outside = ~self.mask.expand_as(scores)
            scores = (scores.masked_fill_ if writable else scores.masked_fill)(outside, float("-inf"))
        # looked for before the softmax makes NaN of such rows
        return scores, scores.amax(-1, keepdim=True) == float("-inf")

    def _products(self, q: Tensor, k: Tensor, out: Tensor | None) -> Tensor:
        """Scaled, mixed q k^T: (batch, heads, queries, keys), up to a constant in each row, which the softmax takes away."""
        scale = q.shape[-1] ** -0.5 if self.scale is None else self.scale
        if isinstance(scale, Tensor):
            q, scale = q * scale, 1.0
        nothing = q.new_empty(1, 1, 1)  # to scale within a product, which saves a pass; with beta=0 it is not even read
        if isinstance(k, Projected):
            # by heads, which have a weight each for all images
            weight, x = k.weight, k.x
            if weight.dtype is not q.dtype or x.dtype is not q.dtype:
                weight, x = weight.to(q.dtype), x.to(q.dtype)
            absorbed = torch.baddbmm(nothing, q.transpose(0, 1).flatten(1, 2), weight, beta=0, alpha=scale)
            absorbed = absorbed.view(q.shape[1], q.shape[0], q.shape[2], x.shape[2]).transpose(0, 1)
            scores = torch.bmm(absorbed.flatten(1, 2), x.mT)
        else:
            k = k.to(q.dtype).expand(*q.shape[:2], -1, -1)
            out = out.flatten(0, 1) if out is not None and self.mix is None and is_ours_alone(q, k) else None
            scores = torch.baddbmm(nothing, q.flatten(0, 1), k.flatten(0, 1).mT, beta=0, alpha=scale, out=out)
        scores = scores.view(*q.shape[:3], sizes_of(k)[2])
        return scores if self.mix is None else torch.einsum("g h, b h q k -> b g q k", self.mix.to(q.dtype), scores)


@dataclass(frozen=True, eq=False)
class Scores(_Whole):
    """Scores that a module without a recipe has formed itself, right before its softmax over the last axis."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype the map is computed in: float64 for float64 scores, float32 for everything else."""
        return exact_dtype(self.tensor.dtype)

    def values(self) -> Tensor:
        """The map: (batch, heads, queries, keys), in `dtype`; a row that is closed throughout is NaN, as in the module."""
        with without_autocast(self.device):
            return self.tensor.to(self.dtype).softmax(-1)


@dataclass(frozen=True, eq=False)
class Dense(_Whole):
    """A map or a gradient that was computed before and is kept."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype it is kept in."""
        return self.tensor.dtype

    def values(self) -> Tensor:
        """The map or the gradient: (batch, heads, queries, keys), as it is kept; a copy, since what is read is the reader's."""
        return self.tensor.clone()


@dataclass(frozen=True, eq=False)
class Outer(_Product):
    """The gradient of a map A that was multiplied onto values: dL/dA = dL/d(A v) v^T.

    Attributes:
        grad: (batch, heads, queries, head_dim), dL/d(A v).
        value: (batch, heads, keys, head_dim).
    """

    grad: Tensor
    value: Tensor

    @property
    def _factors(self) -> tuple[Tensor, Tensor]:
        return self.grad, self.value

    def narrow(self, batch: Pick = ALL, heads: Pick = ALL, rows: Pick = ALL) -> Outer:
        """Cut both factors to some images, heads and queries."""
        return Outer(pick(self.grad, batch, heads, rows), pick(self.value, batch, heads, ALL))

    def prepare(self) -> Outer:
        """Return itself: both factors are there, see `QK.prepare`."""
        return self

    def values(self) -> Tensor:
        """The gradient: (batch, heads, queries, keys), in `dtype`."""
        with without_autocast(self.device):
            return self.grad.to(self.dtype) @ self.value.to(self.dtype).transpose(-2, -1)


Source = Union[QK, Scores, Outer, Dense, Derived]
"""What a map, or its gradient, is computed from."""


def chunk_of(source: Source) -> Chunk:
    """What a source computes, with the scores where there are such."""
    return source.chunk() if isinstance(source, QK) else Chunk(source.values())


def exact_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that maps of a model are computed in: float64 for float64, float32 for every other."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _is_cheaper_absorbed(q: Tensor, k: Tensor) -> bool:
    """Whether scores take fewer products as (q W) x^T than as q (x W^T)^T.

    With k = x W^T + b the scores of a query are q W x^T + q b: the last term is the same for all keys and drops out of the
    softmax, so a few queries need no keys. Per image and head the products are queries * (head_dim * features +
    features * keys), or keys * (features * head_dim + head_dim * queries).
    """
    if not isinstance(k, Projected) or not k.is_linear:
        return False
    queries, keys, width, features = sizes_of(q)[2], k.sizes[2], k.sizes[3], k.x.shape[2]
    return queries * features * (width + keys) < keys * width * (features + queries)
