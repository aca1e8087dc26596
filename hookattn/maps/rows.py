"""Some rows of a map without the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..attention.narrowing import ALL, Pick, pick
from ..attention.sources import Dense
from ..errors import UnreadableError, listed


@dataclass(frozen=True, eq=False)
class SomeRows(Dense):
    """Rows of a map that were saved without the others.

    Attributes:
        tensor: (batch, heads, saved rows, keys).
        name: of the map, for errors.
        rows: the number of each row that was saved, in their order.
        queries: how many rows the map has.
    """

    name: str
    rows: tuple[int, ...]
    queries: int

    def __post_init__(self) -> None:
        if len(self.rows) != self.tensor.shape[2] or not all(0 <= row < self.queries for row in self.rows):
            raise ValueError(f"{self.name!r} has {self.tensor.shape[2]} rows, which are not those of the list {self.rows}")

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(batch, heads, queries, keys), of the whole map."""
        batch, heads, _, keys = self.tensor.shape
        return batch, heads, self.queries, keys

    def narrow(self, batch: Pick = ALL, heads: Pick = ALL, rows: Pick = ALL) -> SomeRows:
        """Cut it to some images, heads and queries.

        Raises:
            UnreadableError: one of the queries was not saved.
        """
        if rows is ALL:
            return SomeRows(pick(self.tensor, batch, heads, ALL), self.name, self.rows, self.queries)
        wanted = torch.arange(self.queries, device="cpu")[rows].tolist()
        found = pick(self.tensor, batch, heads, self._places_of(wanted))
        return SomeRows(found, self.name, tuple(range(len(wanted))), len(wanted))

    def values(self) -> Tensor:
        """The map, if all of its rows were saved."""
        return pick(self.tensor, ALL, ALL, self._places_of(range(self.queries)))

    def _places_of(self, wanted: Sequence[int]) -> Tensor:
        places = {row: place for place, row in enumerate(self.rows)}
        if missing := [row for row in wanted if row not in places]:
            raise UnreadableError(
                f"{self.name!r} was saved without row {missing[0]}: there is {listed(map(str, self.rows))}, as in "
                f"m[:, :, {self.rows[0] if self.rows else 0}]. Save it with rows=None for all."
            )
        return torch.tensor([places[row] for row in wanted], dtype=torch.long, device="cpu")
