"""How much of each key reaches each query: a map A, and what its values v become by each head's projection W."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..conditions.autocast import without_autocast
from .narrowing import ALL, Pick, pick
from .sources import Source
from .weighted import OfMap


@dataclass(frozen=True, eq=False)
class Norms(OfMap):
    """Norms of what each key brings to each query, head by head: |A_ij| ||v_j W||.

    Attributes:
        lengths: (batch, heads, 1, keys), ||v_j W||.
    """

    lengths: Tensor

    def narrow(self, batch: Pick = ALL, heads: Pick = ALL, rows: Pick = ALL) -> Norms:
        """Cut it to some images, heads and queries."""
        return Norms(self.source.narrow(batch, heads, rows), pick(self.lengths, batch, heads, ALL))

    def values(self) -> Tensor:
        """The norms: (batch, heads, queries, keys)."""
        return self.source.values().abs() * self.lengths


@dataclass(frozen=True, eq=False)
class NormsOfSums(OfMap):
    """Norms of what all heads together bring of each key to each query: ||sum_h A_ij^h v_j^h W^h||.

    Attributes:
        gram: (batch, keys, heads, heads), products of v_j^h W^h of the heads of one key.
        picked: which of the single head there is.
    """

    gram: Tensor
    picked: Tensor

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(batch, 1, queries, keys)."""
        batch, _, queries, keys = self.source.shape
        return batch, len(self.picked), queries, keys

    def narrow(self, batch: Pick = ALL, heads: Pick = ALL, rows: Pick = ALL) -> NormsOfSums:
        """Cut it to some images and queries."""
        return NormsOfSums(self.source.narrow(batch, ALL, rows), self.gram[batch], self.picked[heads])

    def values(self) -> Tensor:
        """The norms: (batch, 1, queries, keys)."""
        with without_autocast(self.device):
            by_key = self.source.values().permute(0, 3, 2, 1)  # (batch, keys, queries, heads)
            squares = ((by_key @ self.gram) * by_key).sum(-1).clamp(min=0)
        return squares.sqrt().mT[:, None].expand(-1, len(self.picked), -1, -1)


@dataclass(frozen=True, eq=False)
class Projections(OfMap):
    """How far what keys bring to queries goes in the direction of all that is brought there: A_ij v_j W . y_i / ||y_i||.

    Attributes:
        toward: (batch, heads, queries, width), y_i / ||y_i|| by the transpose of W, so that v_j times it is the product.
        values_of_keys: v, (batch, heads, keys, width).
        picked: None head by head; where heads are added up, which of the single one there is then.
    """

    toward: Tensor
    values_of_keys: Tensor
    picked: Tensor | None

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(batch, heads, queries, keys)."""
        batch, heads, queries, keys = self.source.shape
        return batch, heads if self.picked is None else len(self.picked), queries, keys

    def narrow(self, batch: Pick = ALL, heads: Pick = ALL, rows: Pick = ALL) -> Projections:
        """Cut it to some images, heads and queries."""
        picked = None if self.picked is None else self.picked[heads]
        heads = heads if self.picked is None else ALL
        toward, values = pick(self.toward, batch, heads, rows), pick(self.values_of_keys, batch, heads, ALL)
        return Projections(self.source.narrow(batch, heads, rows), toward, values, picked)

    def values(self) -> Tensor:
        """The projections: (batch, heads, queries, keys)."""
        with without_autocast(self.device):
            each = self.source.values() * (self.toward @ self.values_of_keys.mT)
        return each if self.picked is None else each.sum(1, keepdim=True).expand(-1, len(self.picked), -1, -1)


@dataclass(frozen=True, eq=False)
class Shares(OfMap):
    """Rows divided by their sums."""

    def narrow(self, batch: Pick = ALL, heads: Pick = ALL, rows: Pick = ALL) -> Shares:
        """Cut it to some images, heads and queries."""
        return Shares(self.source.narrow(batch, heads, rows))

    def values(self) -> Tensor:
        """The shares: (batch, heads, queries, keys); a row of zeros stays one."""
        values = self.source.values()
        sums = values.sum(-1, keepdim=True)
        return values / sums.where(sums != 0, 1.0)


def norms(source: Source, values: Tensor, projection: Tensor) -> Norms:
    """Norms head by head, of v (batch, heads, keys, width) and W (heads, width, dim)."""
    with without_autocast(values.device):
        # head by head: all heads' vectors at once would take heads times what the values do
        each = [(values[:, h] @ projection[h]).norm(dim=-1) for h in range(len(projection))]
    return Norms(source, torch.stack(each, 1)[:, :, None])


def norms_of_sums(source: Source, values: Tensor, projection: Tensor) -> NormsOfSums:
    """Norms of sums over heads, likewise."""
    products = torch.einsum("hed,gfd->hegf", projection, projection)
    with without_autocast(values.device):
        rows = [torch.einsum("bke,egf,bgkf->bkg", values[:, h], products[h], values) for h in range(len(projection))]
    return NormsOfSums(source, torch.stack(rows, 2), torch.zeros(1, dtype=torch.long, device="cpu"))


def projections(source: Source, values: Tensor, projection: Tensor, brought: Tensor, *, summed: bool) -> Projections:
    """Projections onto y, (batch, queries, dim), which is what all heads together bring."""
    direction = torch.nn.functional.normalize(brought, dim=-1)
    with without_autocast(values.device):
        toward = torch.einsum("bqd,hed->bhqe", direction, projection)
    return Projections(source, toward, values, torch.zeros(1, dtype=torch.long, device="cpu") if summed else None)
