"""Which products carry a map to the output of its module, and where its rows are in them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..calls.call import Call
from ..errors import UnreadableError
from .arrangement import Arrangement
from .products import Met, Product, WatchProducts
from .replay import run_under
from .sites import Inject


@dataclass(frozen=True, eq=False)
class Carried:
    """How a forward carries its map on; the same for each call that goes the same way.

    Attributes:
        map: where the map stands, before what is done to it.
        products: where it is multiplied onto values.
        rows: (images * windows, heads, queries), on the CPU: which of the rows of all products, one product after the other,
            stands there; one beyond all of them is zeros.
        is_map: whether what is multiplied is the map.
        went: the way that such calls go, see `Following`.
        members: (heads, count), heads of `rows` of which the outcomes are added up, where there are several such.
        found: what else was found out, by whoever looked.
    """

    map: Arrangement
    products: tuple[Product, ...]
    rows: Arrangement
    is_map: bool
    went: tuple[Any, ...]
    members: Tensor | None = None
    found: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def groups(self) -> Tensor:
        """(images * windows, heads, queries): which of the values of all products each row is multiplied onto, -1 for none."""
        starts, of_rows = 0, []
        for product in self.products:
            of_rows.append(product.groups + starts)
            starts += int(product.groups.max()) + 1
        return torch.cat([*of_rows, torch.tensor([-1], device="cpu")])[self.rows.index]


SEVERAL_VALUES = "its map is multiplied onto several tensors: it cannot be told which values its heads belong to."


def find_carried(call: Call, watch: WatchProducts, arrangement: Arrangement) -> Carried:
    """Find out how a forward that was watched carries its map on, by running it with other maps.

    Raises:
        UnreadableError: its map is not multiplied onto values by a product of matrices that can be seen.
    """
    by_hand, went = [part for part in arrangement.parts if part.operand is not None], watch.went
    if by_hand:
        watch = run_under(call, WatchProducts(by_hand))[1]
    met = _met(watch, arrangement)
    products = tuple([each.product for each in met])
    parts = tuple([product.part for product in products])
    if by_hand or all(product.operand is None for product in products):
        if [part.number for part in parts] != [part.number for part in arrangement.parts]:
            raise UnreadableError(_UNSEEN)
        return Carried(arrangement, products, Arrangement(parts, arrangement.index), True, went)
    if any(product.operand is None for product in products):
        raise UnreadableError(_UNSEEN)
    trace = _Trace(call, watch, arrangement, products)
    if all(each.as_it_is for each in met) and (same := trace.same_rows()) is not None:
        return Carried(arrangement, products, Arrangement(parts, same), True, went)
    return Carried(arrangement, products, Arrangement(parts, trace.mixed_rows()), False, went)


_UNSEEN = (
    "its map is not multiplied onto values by a product of matrices that can be seen, or in several: it cannot be told what it "
    "is multiplied onto."
)


def _met(watch: WatchProducts, arrangement: Arrangement) -> list[Met]:
    """The products that parts of a map are multiplied in."""
    found: dict[int, Met] = {}
    for part in arrangement.parts:
        if part.operand is None:
            of_part = [n for n, met in enumerate(watch.met) if part.number in met.of]
        else:
            of_part = [n for n, met in enumerate(watch.met) if met.product.part == part]
        if not of_part:
            raise UnreadableError(_UNSEEN)
        found.update({n: watch.met[n] for n in of_part})
    return [found[n] for n in sorted(found)]


class _Trace:
    """Runs of a forward with other maps in place of its own, which tell where in its products their rows are."""

    def __init__(self, call: Call, watch: WatchProducts, arrangement: Arrangement, products: tuple[Product, ...]) -> None:
        self._call, self._watch, self._map, self._products = call, watch, arrangement, products
        self._random = torch.Generator().manual_seed(6)
        self._own = next(met.factor for met in watch.met if met.product == products[0])

    def same_rows(self) -> Tensor | None:
        """For each row of the map the row of the products that is the same; None where there is none.

        Raises:
            UnreadableError: there are several.
        """
        other, beyond = self._draw().to(self._own), sum(product.part.rows for product in self._products)
        numbers = {row: n for n, row in enumerate(_first_of(self._run(other.clone())))}  # it may be written into
        wanted = (self._map.index < sum(part.rows for part in self._map.parts)).flatten().tolist()
        taken = [numbers.get(row) if w else beyond for w, row in zip(wanted, _first_of(other.flatten(0, 2)))]
        if len(numbers) != beyond:
            raise UnreadableError(SEVERAL_VALUES)
        return None if None in taken else torch.tensor(taken, device="cpu").view(self._map.index.shape)

    def mixed_rows(self) -> Tensor:
        """Rows of the products by the place that all they are made of has: (windows, heads, queries).

        Raises:
            UnreadableError: rows of several places are mixed.
        """
        windows, heads, queries = self._map.index.shape
        place = torch.arange(windows * queries, device="cpu").view(windows, 1, queries).expand(windows, heads, queries)
        head = torch.arange(heads, device="cpu").view(1, heads, 1).expand(windows, heads, queries)
        base = self._draw()
        changed = base * (0.5 + torch.rand(base.shape, generator=self._random, device="cpu"))

        def rows_with(mask: Tensor) -> Tensor:
            return self._run(torch.where(mask[..., None], changed, base).to(self._own))

        of_place, of_head = (trace_bits(label, rows_with, row_wise=True) for label in (place, head))
        if (of_place < 0).any():
            raise UnreadableError("rows of its map are mixed with those of other queries before they multiply its values.")
        order = of_head if (of_head >= 0).all() else torch.arange(len(of_place), device="cpu")
        found = defaultdict(list)
        for row in order.argsort(stable=True).tolist():
            found[int(of_place[row])].append(row)
        if len(self._products) > 1 and len(of_place) > place.numel():
            raise UnreadableError(SEVERAL_VALUES)
        if len({len(rows) for rows in found.values()}) != 1 or len(found) != windows * queries:
            raise UnreadableError("its queries are multiplied onto values in different numbers of heads.")
        return (
            torch.tensor([found[n] for n in range(windows * queries)], device="cpu").view(windows, queries, -1).transpose(1, 2)
        )

    def _draw(self) -> Tensor:
        drawn = torch.rand(self._map.shape, generator=self._random, dtype=torch.float64, device="cpu") + 0.1
        return drawn / drawn.sum(-1, keepdim=True)

    def _run(self, attention: Tensor) -> Tensor:
        """Rows of the products with another map in place."""
        watch = WatchProducts()
        run_under(self._call, Inject(self._watch, self._map, attention), watch)
        met = {each.product: each for each in watch.met}
        factors = [(product.part, met[product].factor) for product in self._products]
        return torch.cat([part.as_rows(factor) for part, factor in factors if factor is not None]).detach().cpu()


def _first_of(rows: Tensor) -> list[tuple[float, ...]]:
    """The first few entries of each row, which tell rows of random numbers apart."""
    return [tuple(row) for row in rows[:, :4].tolist()]


SEVERAL, NOTHING = -1, -2


def trace_bits(label: Tensor, run: Callable[[Tensor], Tensor], *, row_wise: bool = False) -> Tensor:
    """The number in `label` that each entry, or row, of what a function puts out depends on, one bit after the other.

    Args:
        label: a number for each part of what goes into the function.
        run: the function, of a mask of parts that are changed.

    Returns:
        SEVERAL where it depends on several, NOTHING where it depends on none.
    """
    base = run(torch.zeros_like(label, dtype=torch.bool))

    def is_moved(mask: Tensor) -> Tensor:
        other = run(mask)
        moved = (other != base) & ~(other.isnan() & base.isnan())
        return moved.any(-1) if row_wise else moved

    found = torch.where(is_moved(torch.ones_like(label, dtype=torch.bool)), 0, NOTHING)
    for bit in range(int(label.max()).bit_length()):
        one, zero = is_moved((label >> bit & 1).bool()), is_moved(~(label >> bit & 1).bool())
        found = torch.where(one & zero | (found == SEVERAL), SEVERAL, torch.where(one, found + (1 << bit), found))
    return found
