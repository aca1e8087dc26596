"""Which product of a forward is its map: each row feeds one place of the output, each column carries other tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...errors import UnreadableError
from .probe import SEVERAL, Places, Sources, places
from .product import Product, matrices, products_in
from .tape import Tape


@dataclass(frozen=True, eq=False)
class Candidate:
    """A product that may be the map, and what it feeds.

    Args:
        m, w: the map (G, I, J) and the values (G, J, E), a function of the arguments.
        local: axes of `places.index` along which each row feeds one index.
        vary: those of them along which rows of one g differ: queries.
    """

    product: Product
    places: Places
    m: Tensor
    w: Tensor
    local: tuple[int, ...]
    vary: frozenset[int]


def find_maps(tape: Tape) -> tuple[list[Candidate], Sources]:
    """The products that are maps, and what their factors depend on.

    Raises:
        UnreadableError: there is none; what was found instead is told.
    """
    everything = cut = list(products_in(tape))
    if not cut:
        raise UnreadableError("its forward multiplies no two activations, or in a kernel that cannot be looked into")
    sources = Sources(tape, cut)
    reasons: list[str] = []
    while cut:
        found = places(tape, cut)
        if not found:
            break
        maps = []
        for product, feeds in found.items():
            candidate = _candidate(sources, product, feeds)
            reason = _reason_against(sources, candidate, everything if cut is everything else ())
            reasons += [reason] if reason else []
            maps += [] if reason else [candidate]
        if maps:
            return maps, sources
        cut = [p for p in cut if p not in found]
    raise UnreadableError("; ".join(dict.fromkeys(reasons)) or "no product of activations feeds its output")


def _candidate(sources: Sources, product: Product, feeds: Places) -> Candidate:
    local, vary = _local_axes(feeds)
    if not vary and (flattened := _axis_of_blocks(feeds)) is not None:
        feeds = replace(feeds, index=_number_blocks(feeds, flattened))
        local, vary = _local_axes(feeds)
    return Candidate(product, feeds, *matrices(sources.run, product), local, vary)


def _local_axes(feeds: Places) -> tuple[tuple[int, ...], frozenset[int]]:
    """Axes along which each row feeds one index, and those of them along which rows of one g differ."""
    index, fed = feeds.index, feeds.fed
    local = [a for a in range(index.shape[-1]) if (a == 0 or feeds.sizes[a - 1] > 1) and (index[..., a][fed] > SEVERAL).all()]
    least, most = torch.where(fed[..., None], index, 1 << 40).amin(1), torch.where(fed[..., None], index, SEVERAL).amax(1)
    return tuple(local), frozenset(a for a in local if (most[:, a] > least[:, a]).any())


def _axis_of_blocks(feeds: Places) -> int | None:
    """The axis, if any, of an output that was flattened, along which the rows of each g feed blocks that do not overlap."""
    several = [a for a in range(1, feeds.index.shape[-1]) if (feeds.ends[..., a][:, feeds.fed] >= 0).all()]
    for axis in several if feeds.index.shape[1] > 1 else ():
        first, last = (end.sort(1).values for end in feeds.ends[..., axis])
        if (feeds.index[..., axis][feeds.fed] == SEVERAL).all() and (last[:, :-1] < first[:, 1:]).all():
            return axis
    return None


def _number_blocks(feeds: Places, axis: int) -> Tensor:
    """The index with the number of the block in place of what is fed along an axis."""
    index = feeds.index.clone()
    index[..., axis] = feeds.ends[0, ..., axis].argsort(1).argsort(1)
    return index


def _reason_against(sources: Sources, c: Candidate, everything: Sequence[Product]) -> str | None:
    """Why a product is no map, if it is none."""
    n = c.product.step
    if sum(a > 0 for a in c.local) < sum(size > 1 for size in c.places.sizes) - 1:  # only along channels may a row feed several
        return f"each row of product {n} {tuple(c.m.shape)} feeds many places of the output: channels, or a context for all"
    if not c.vary and c.places.fed.sum(1).max() > 1 and not _rows_are_heads(sources, c, everything):
        return f"rows of product {n} {tuple(c.m.shape)} feed no place of the output each"
    if not _columns_are_tokens(sources, c):
        return (
            f"columns of product {n} {tuple(c.m.shape)} are no tokens of the arguments: channels, sampled points or a mixture"
        )
    return None


def spread(n: int, most: int) -> list[int]:
    """Up to `most` of n indices, the first and the last among them."""
    return sorted({round(i * (n - 1) / max(1, most - 1)) for i in range(most)})


def _columns_are_tokens(sources: Sources, c: Candidate) -> bool:
    """Whether the values of different columns depend on different entries of every argument that they depend on."""
    groups = c.places.fed.any(1).nonzero()[:, 0].tolist()
    return all(_are_tokens(sources, c.w[g]) for g in {groups[0], groups[-1]})


def _are_tokens(sources: Sources, w: Tensor) -> bool:
    carried = sources.carried(w)
    if all(first is not None for first in carried):
        return any(len(first) for first in carried if first is not None)
    some = sorted({*spread(len(w), 5), *(int((i + 0.5) * len(w) / 5) for i in range(5))})
    masks = [m.reshape(len(m), -1).float() for m in sources.of(w[some])]
    masks = [m for m in masks if m.any(0).sum() > 1]  # a number that all share, such as a temperature, tells none apart
    if not masks:
        return False
    depends = torch.stack([m.any(1) for m in masks]).any(0)  # padding depends on nothing
    pairs = torch.stack([_overlap(m[depends]) for m in masks]).any(0).tril(-1)
    return bool(pairs.sum() <= depends.sum() * (depends.sum() - 1) / 4)  # neighbours, pooled places may overlap, but not most


def _overlap(masks: Tensor) -> Tensor:
    """Which of the rows (rows, entries) are mostly on the same entries."""
    both, size = masks @ masks.T, masks.sum(1)
    return both > 0.75 * torch.minimum(size, size[:, None])


def _rows_are_heads(sources: Sources, c: Candidate, everything: Sequence[Product]) -> bool:
    """Whether rows of M that feed the same place come from the same place of the arguments: heads of one query."""
    for _, queries in queries_of(sources, c) if everything else ():
        ends = [m.reshape(len(m), -1) for m in sources.of(queries[0, [0, -1]])]
        return any(m.any() for m in ends) and all(torch.equal(m[0], m[1]) for m in ends)
    return False


def queries_of(sources: Sources, c: Candidate) -> Iterator[tuple[Product, Tensor]]:
    """Products before a map that have its shape, the last one first, with a factor (G, I, D): queries, if it is the scores."""
    for p in reversed([p for p in sources.products if p.step < c.product.step]):
        queries, keys = matrices(sources.run, p)
        if (*queries.shape[:2], keys.shape[2]) == c.m.shape:
            yield p, queries
