"""What is computed from a map, and the first of it: sums of its heads."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from einops import rearrange
from torch import Tensor

from .narrowing import ALL, Pick, pick
from .sources import Source, exact_dtype

S = TypeVar("S", bound="OfMap")


@dataclass(frozen=True, eq=False)
class OfMap:
    """Base of what is computed from a map.

    Attributes:
        source: the map.
    """

    source: Source

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(batch, heads, queries, keys)."""
        return self.source.shape

    @property
    def device(self) -> torch.device:
        """The device it is computed on."""
        return self.source.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype it is computed in."""
        return exact_dtype(self.source.dtype)

    def prepare(self: S) -> S:
        """See `QK.prepare`."""
        return replace(self, source=self.source.prepare())


@dataclass(frozen=True, eq=False)
class Weighted(OfMap):
    """Heads of a map, weighted and added up.

    Attributes:
        members: (heads, count), which heads of it are added up.
        weights: (batch, heads, count, queries).
    """

    members: Tensor
    weights: Tensor

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(batch, heads, queries, keys)."""
        batch, _, queries, keys = self.source.shape
        return batch, len(self.members), queries, keys

    def narrow(self, batch: Pick = ALL, heads: Pick = ALL, rows: Pick = ALL) -> Weighted:
        """Cut it to some images, heads and queries."""
        members, weights = self.members[heads], pick(self.weights, batch, heads, ALL)
        numbers = torch.arange(members.numel(), device="cpu").view(members.shape)
        return Weighted(self.source.narrow(batch, members.flatten(), rows), numbers, weights[..., rows])

    def values(self) -> Tensor:
        """The sums: (batch, heads, queries, keys)."""
        each = self.source.values()[:, self.members.flatten()]
        each = rearrange(each, "b (h m) q k -> b h m q k", m=self.members.shape[1])
        return (each * self.weights[..., None].to(each)).sum(2)
