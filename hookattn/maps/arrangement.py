"""Where among what a forward forms its map stands: from rows of softmaxes, in a module's own order, to a map and back."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ..errors import UnreadableError
from ..recipes.registry import Shape


class Part(NamedTuple):
    """One tensor that holds rows of a map, as the forward forms it.

    Attributes:
        number: of the softmaxes and SDPA calls of the forward, the how manieth; or of its multiplications.
        operand: None for what a softmax puts out, or would inside of SDPA; else which factor of the multiplication.
        shape: of the tensor.
        axis: along which a row lies, that of the keys.
    """

    number: int
    operand: int | None
    shape: tuple[int, ...]
    axis: int

    @property
    def rows(self) -> int:
        """How many rows there are."""
        return math.prod(n for axis, n in enumerate(self.shape) if axis != self.axis)

    def as_rows(self, tensor: Tensor) -> Tensor:
        """The tensor as (rows, keys)."""
        return tensor.movedim(self.axis, -1).reshape(self.rows, self.shape[self.axis])

    def of_rows(self, rows: Tensor) -> Tensor:
        """The tensor again, out of (rows, keys)."""
        lead = [n for a, n in enumerate(self.shape) if a != self.axis]
        return rows.reshape(*lead, self.shape[self.axis]).movedim(-1, self.axis)


@dataclass(frozen=True, eq=False)
class Arrangement:
    """Where the rows of a map stand among those that a forward forms; the same for each call that goes the same way.

    Attributes:
        parts: tensors that hold rows.
        index: (images * windows, heads, queries), on the CPU: which of the rows of all parts, one part after the other, stands
            there; one beyond all of them is zeros.
        is_random: whether the map is made of random numbers, dropout aside.
    """

    parts: tuple[Part, ...]
    index: Tensor
    is_random: bool = False

    @property
    def shape(self) -> Shape:
        """(images * windows, heads, queries, keys); smaller windows are filled up with zeros."""
        windows, heads, queries = self.index.shape
        return windows, heads, queries, max(part.shape[part.axis] for part in self.parts)

    def is_like(self, other: Arrangement) -> bool:
        """Whether rows stand at the same places in another one."""
        return self.parts == other.parts and torch.equal(self.index, other.index)

    @cached_property
    def is_in_order(self) -> bool:
        """Whether the map is one tensor that is laid out as its reader has it, so that a view of it is the map."""
        return len(self.parts) == 1 and torch.equal(
            self.index.flatten(), torch.arange(self.parts[0].rows, device=self.index.device)
        )

    @cached_property
    def is_full(self) -> bool:
        """Whether a row of the module stands at every place of the map."""
        return bool((self.index < sum(part.rows for part in self.parts)).all())

    @cached_property
    def has_own_keys(self) -> bool:
        """Whether the rows of each head and window come of one matrix of the module's, and so have the same keys."""
        matrix = self.index // max(1, self.parts[0].shape[-2])
        return bool((matrix == matrix[:, :, :1]).all())

    def collect(self, rows: Sequence[Tensor]) -> Tensor:
        """The map (images * windows, heads, queries, keys), or whatever else has its rows, of (rows, keys) of each part."""
        if self.is_in_order:
            return rows[0].reshape(*self.index.shape, rows[0].shape[-1])
        keys = max(each.shape[-1] for each in rows)
        everything = torch.cat([F.pad(each, (0, keys - each.shape[-1])) for each in rows])
        # not where every row is taken: the row of zeros costs a copy
        everything = everything if self.is_full else F.pad(everything, (0, 0, 0, 1))
        return everything[self.index.to(everything.device)]

    def spread(self, attention: Tensor, number: int, own: Callable[[], Tensor]) -> Tensor:
        """Rows of one part, (rows, keys), out of a map; `own` gives the module's, for those that are no part of the map."""
        part, start = self.parts[number], sum(p.rows for p in self.parts[:number])
        flat = attention.flatten(0, 2)[:, : part.shape[part.axis]]
        if self.is_in_order:
            return flat
        row = self.index.flatten() - start
        here = ((row >= 0) & (row < part.rows)).nonzero()[:, 0]
        rows = own() if len(here) < part.rows else flat.new_empty(part.rows, flat.shape[1])
        return rows.to(flat).index_copy(0, row[here].to(flat.device), flat[here.to(flat.device)])


def arrange_by_recipe(parts: Sequence[Part], form: str | None, shape: Shape) -> Arrangement:
    """The arrangement of a map that a recipe describes: in order, heads dealt out in turn to several maps, or in its form.

    Args:
        parts: what the forward has formed.
        form: the axes of the module's own map as its recipe tells them, in the letters of einops; None for (batch, heads,
            queries, keys), whatever of it is merged.
        shape: of the map.

    Raises:
        UnreadableError: the forward has formed something of other sizes.
    """
    batch, heads, queries, _ = shape
    count, rows = len(parts), sum(part.rows for part in parts)
    if len({part._replace(number=0) for part in parts}) > 1 or rows != batch * heads * queries:
        shapes = ", ".join(str(part.shape) for part in parts)
        raise UnreadableError(f"its forward forms maps of {shapes}, which do not make up the one of {shape} by its recipe")
    if rows == 0:  # no images, or no tokens
        return Arrangement(tuple(parts), torch.zeros(shape[:3], dtype=torch.long, device="cpu"))
    axes = (form or "b h q k").replace("(b h)", "bh").split()
    axes = axes if len(axes) == len(parts[0].shape) else ["b", "h", "q", "k"]  # a class that can do without windows
    sizes = {axis: parts[0].shape[axes.index(axis)] for axis in ("w",) if axis in axes}
    lead = [axis for axis in "".join(axes) if axis != "k"]
    known = {"n": count, "h": heads // count, "q": queries, **sizes}
    pattern = f"(n {' '.join(lead)}) -> {'(b w)' if sizes else 'b'} {'(h n)' if 'h' in lead else 'n'} q"
    index = rearrange(torch.arange(rows, device="cpu"), pattern, **{a: n for a, n in known.items() if a in ["n", *lead]})
    return Arrangement(tuple(parts), index)
