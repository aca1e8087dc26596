"""What all that is computed from maps has, to be read in parts."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from .narrowing import ALL, Pick


class Derived(Protocol):
    """Something computed from a map, (batch, heads, queries, keys), that is cut before it is computed."""

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(batch, heads, queries, keys)."""

    @property
    def device(self) -> torch.device:
        """The device it is computed on."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype it is computed in."""

    def narrow(self, batch: Pick = ALL, heads: Pick = ALL, rows: Pick = ALL) -> Derived:
        """Cut it to some images, heads and queries."""

    def prepare(self) -> Derived:
        """Compute now what chunks of its rows have in common."""

    def values(self) -> Tensor:
        """All of it."""
