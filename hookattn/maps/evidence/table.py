"""Rows of the products of a forward, arranged as (images * windows, heads, queries, keys): by the place that each feeds."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ...errors import UnreadableError
from .judge import Candidate, queries_of
from .probe import Sources, pull, reach, weights_like
from .product import matrices
from .tape import Tape, storage_of

Row = tuple[int, int, int]  # which map, g, i
Place = tuple[tuple[int, ...], tuple[int, ...]]  # image, query
Window = list[tuple[tuple[int, ...], list[Row]]]  # queries, each with its rows: its heads
Slabs = dict[tuple[int, int], int]  # a number for the values of (map, g), the same for the same values


def arrange(tape: Tape, maps: Sequence[Candidate], sources: Sources) -> tuple[list[Candidate], Tensor]:
    """The products that are the map, and which of all rows stands at (window, head, query); where none does, one beyond all.

    Raises:
        UnreadableError: rows do not fit together as a map.
    """
    maps = _alike(tape, _without_scores(tape, maps))
    _refuse_steps(tape, maps)
    slabs = _number_slabs(maps)
    windows, whole = _windows(maps, slabs, *_axes(tape, sources, maps, slabs))
    _refuse_growing(sources, maps, windows)
    row = windows[0][0][1]
    values = list({slabs[n, g]: maps[n].w[g] for n, g, _ in row}.values())
    _refuse_other_tokens(sources, values)
    if whole:
        _refuse_another_order(tape, sources, maps, values[0], windows[0])
    for c in maps:
        _refuse_scaled_later(tape, c)
    heads = _order_of_heads(maps, slabs, row)
    start = torch.tensor([0, *(c.m.shape[0] * c.m.shape[1] for c in maps)], device="cpu").cumsum(0).tolist()
    table = [[[start[n] + g * maps[n].m.shape[1] + i for n, g, i in (r[h] for h in heads)] for _, r in w] for w in windows]
    missing = [start[-1]] * len(heads)  # in smaller windows
    return maps, torch.tensor([[*t, *[missing] * (max(map(len, table)) - len(t))] for t in table], device="cpu").transpose(1, 2)


def _without_scores(tape: Tape, maps: Sequence[Candidate]) -> list[Candidate]:
    """Without the products of queries and keys that another map is the softmax of, and another map the other way round.

    The first feed places of the output where a module returns its map, and where keys come from a cache as they are, channels
    of them look like tokens. Values times a map look like a map times values where channels are put out as they are, and
    columns of the map depend on different entries of a mask.
    """
    whole = [c for c in maps if torch.allclose(c.m.sum(-1), torch.ones_like(c.m[..., 0]), atol=1e-4)]
    turned = {d.product.step for d in whole}
    return [c for c in maps if c in whole or not (c.product.step in turned or any(_is_made_of(tape, d, c) for d in whole))]


def _is_made_of(tape: Tape, c: Candidate, scores: Candidate) -> bool:
    """Whether a map is made of what a product puts out, one entry of each."""
    if c.m.numel() != scores.m.shape[0] * scores.m.shape[1] * scores.w.shape[2]:
        return False
    run = tape.rerun(cut={scores.product.step}, catch={c.product.at})
    return matrices(run, c.product)[0].requires_grad


def _alike(tape: Tape, maps: Sequence[Candidate]) -> list[Candidate]:
    """Each map once, and if there are such, only those that have rows for each query."""
    once: list[Candidate] = []
    for c in maps:  # values may be multiplied in parts
        if not any(torch.equal(c.m, d.m) and torch.equal(_where(c), _where(d)) and _are_one(tape, c, d) for d in once):
            once.append(c)
    if any(c.vary for c in once):
        once = [c for c in once if c.vary or c.m.shape[1] == 1]  # a chunk of a single query has nothing that varies
    if len({c.local for c in once}) > 1:
        raise UnreadableError("it forms several maps that feed different axes of the output")
    if not any(0 in c.vary for c in once) and len({int(n) for c in once for n in c.places.index[..., 0][c.places.fed]}) > 1:
        raise UnreadableError("it forms several maps, one for each of several outputs")
    return once


def _are_one(tape: Tape, c: Candidate, d: Candidate) -> bool:
    """Whether two maps of equal values are one and the same; those over a single key are all alike."""
    return c.m.shape[2] > 1 or storage_of(tape.of(c.product.map_in(tape.steps))) == storage_of(
        tape.of(d.product.map_in(tape.steps))
    )


def _where(c: Candidate) -> Tensor:
    return c.places.index[..., list(c.local)]


def _refuse_steps(tape: Tape, maps: Sequence[Candidate]) -> None:
    """No map may go into another: then they are steps, not heads."""
    run = tape.rerun(cut={c.product.step for c in maps}, catch={c.product.at for c in maps})
    if any(factor.requires_grad for c in maps for factor in matrices(run, c.product)):
        raise UnreadableError("one of its maps feeds another and the output: steps, or heads in a cascade")


def _number_slabs(maps: Sequence[Candidate]) -> Slabs:
    numbers: dict[bytes, int] = {}
    values = [(n, g, w) for n, c in enumerate(maps) for g, w in enumerate(c.w.detach().cpu().contiguous().numpy())]
    return {(n, g): numbers.setdefault(w.tobytes(), len(numbers)) for n, g, w in values}


def _axes(tape: Tape, sources: Sources, maps: Sequence[Candidate], slabs: Slabs) -> tuple[list[int], list[int]]:
    """Axes of the output that tell images (or windows of them) apart, and those that tell queries apart."""
    first = maps[0].places
    queries = frozenset[int]().union(*(c.vary for c in maps)) or _vary_with_one_slab(maps, slabs)
    others = [a for a in maps[0].local if a and a not in queries]
    if len(queries) > 1 and not others and 1 not in first.sizes:
        raise UnreadableError("all images have one set of keys, or its output has no axis of images")
    apart = {a: reach(tape, max(0, int(first.index[..., 0].max())), a - 1) for a in others}
    apart |= {a: "separate" for a in others if apart[a] == "equal" and not _share_tokens(sources, _along(maps, a))}
    if not queries:  # each has keys of its own
        queries = frozenset(a for a in others if apart[a] == "overlapping")
    images = [a for a in others if a not in queries and apart[a] != "equal"]  # equal: channels, that is heads
    return images, sorted({0, *queries})


def _along(maps: Sequence[Candidate], axis: int) -> list[Tensor]:
    """The values of a row, and those of another that feeds a place beside it along an axis of the output."""
    rows = [(c, g, c.places.index[g, i].tolist()) for c in maps for g, i in c.places.fed.nonzero().tolist()]
    local = [a for a in maps[0].local if a != axis]
    c0, g0, first = rows[0]
    c1, g1, _ = next(r for r in rows if r[2][axis] != first[axis] and all(r[2][a] == first[a] for a in local))
    return [c0.w[g0], c1.w[g1]]


def _share_tokens(sources: Sources, values: Sequence[Tensor]) -> bool:
    """Whether any of several values depend on the same entries of the arguments."""
    sums = torch.stack([(w * weights_like(w)).sum() for w in values])[:, None]
    return any(first is None for first in sources.carried(sums))


def _vary_with_one_slab(maps: Sequence[Candidate], slabs: Slabs) -> frozenset[int]:
    """Axes along which rows differ that multiply the same values, one product after the other."""
    seen = defaultdict(set)
    for n, c in enumerate(maps):
        for g, i in c.places.fed.nonzero().tolist():
            seen[slabs[n, g]].add(tuple(c.places.index[g, i, list(c.local)].tolist()))
    return frozenset(a for k, a in enumerate(maps[0].local) if any(len({p[k] for p in places}) > 1 for places in seen.values()))


def _windows(maps: Sequence[Candidate], slabs: Slabs, images: list[int], queries: list[int]) -> tuple[list[Window], bool]:
    """Queries that share their values, image by image, each with its rows; and whether an image is one window.

    The queries of whole images stand in the order of the output; those of windows stand as the module has them, and so do those
    of which some feed nothing: they pad a window, or only the class token is read.
    """
    rows, unfed = _rows_by_place(maps, images, queries)
    windows = _share_values(rows | unfed, slabs)
    sizes = {(len(w), *{maps[n].m.shape[2] for _, r in w for n, _, _ in r}) for w in windows.values()}
    if any(len(size) > 2 for size in sizes) or len({size[1] for size in sizes}) < len(sizes):
        raise UnreadableError(f"it forms windows of different numbers of queries and keys: {sorted(sizes)}")
    if len({len(r) for w in windows.values() for _, r in w}) > 1:
        raise UnreadableError("places of the output are fed by different numbers of rows")
    count = len({image for image, _ in windows})
    if len(windows) > count and len(next(iter(windows.values()))) == 1:  # each query has keys of its own
        merged: dict[Any, Window] = defaultdict(list)
        for (image, _), w in windows.items():
            merged[image, ()] += w
        windows = merged
    whole = len(windows) == count and not unfed
    order = sorted(windows, key=lambda k: (k[0], min(r for _, r in windows[k])))
    return [sorted(windows[k], key=lambda q: q[0] if whole else q[1]) for k in order], whole


def _rows_by_place(
    maps: Sequence[Candidate], images: list[int], queries: list[int]
) -> tuple[dict[Place, list[Row]], dict[Place, list[Row]]]:
    """Rows by image and query; and those that feed nothing, as further queries of the image that their g feeds."""
    rows, unfed = defaultdict(list), defaultdict(list)
    for n, c in enumerate(maps):
        image, query, fed = (x.tolist() for x in (c.places.index[..., images], c.places.index[..., queries], c.places.fed))
        for g, feeds in enumerate(fed):
            here = feeds.index(True) if any(feeds) else None
            for i, feeds_one in enumerate(feeds):
                if feeds_one:
                    rows[tuple(image[g][i]), tuple(query[g][i])].append((n, g, i))
                elif here is not None:
                    unfed[tuple(image[g][here]), (*query[g][here], i)].append((n, g, i))
    return rows, unfed


def _share_values(rows: dict[Place, list[Row]], slabs: Slabs) -> dict[Any, Window]:
    windows = defaultdict(list)
    for (image, query), r in rows.items():
        windows[image, tuple(slabs[n, g] for n, g, _ in r)].append((query, r))
    return windows


def _refuse_growing(sources: Sources, maps: Sequence[Candidate], windows: Sequence[Window]) -> None:
    """Windows of different sizes must have no token in common: else they are steps of one map, each with more keys."""
    slabs = [maps[n].w[g] for w in windows for n, g, _ in w[0][1][:1]]
    if len({len(w) for w in slabs}) > 1 and _share_tokens(sources, slabs):
        raise UnreadableError("it multiplies different numbers of keys at a time, which have tokens in common")


def _refuse_other_tokens(sources: Sources, values: list[Tensor]) -> None:
    """Rows that feed one place must have values of the same tokens: no blocks of keys, no rows and columns of a grid."""
    some = [w[[0, w.shape[0] // 2, -1]] for w in values]
    first, together = (_indices_of(sources.of(torch.cat(w, -1))) for w in (some[:1], some))
    tokens = [axis for axis, columns in first.items() if len({c for c in columns if c}) > 1]
    if any(first[axis] != together[axis] for axis in tokens):
        raise UnreadableError("rows that feed one place have values of different tokens: blocks of keys, or several attentions")


def _indices_of(masks: list[Tensor]) -> dict[tuple[int, int], list[tuple[int, ...]]]:
    """By argument and axis of it: the indices of the entries that each column depends on."""
    return {
        (k, a): [tuple(column.nonzero()[:, a].unique().tolist()) for column in mask]
        for k, mask in enumerate(masks)
        for a in range(mask.dim() - 1)
    }


def _refuse_another_order(tape: Tape, sources: Sources, maps: Sequence[Candidate], w: Tensor, window: Window) -> None:
    """Queries stand in the order of the output, so keys must stand in the order of the tokens that they carry.

    Or queries, too, are made of tokens in that other order: then it is that of the output, and tokens were moved before.
    """
    carried = sources.carried(w)
    moved = any(r[0] < before[0] for (_, before), (_, r) in pairwise(window))
    in_order = all(at is None or (at.diff() > 0).all() for at in carried)
    if not in_order and not moved:
        n, g, _ = window[0][1][0]
        asked = sources.carried(_queries(tape, sources, maps[n], g))
        pairs = list(zip(asked, carried))
        in_order = len(asked) == len(carried) and all(a is not None and k is not None and torch.equal(a, k) for a, k in pairs)
    # Where the module has its queries in another order, nothing but one whole argument tells the order of its keys.
    if not in_order or (moved and (len(carried) != 1 or carried[0] is None)):
        raise UnreadableError("its keys stand in another order than the tokens they carry, or than its queries")


def _queries(tape: Tape, sources: Sources, c: Candidate, g: int) -> Tensor:
    """The queries (I, D) that the rows of one g come from; none where that is not seen."""
    for p, queries in queries_of(sources, c):
        run = tape.rerun(cut=[p.step], catch={c.product.at})
        first = matrices(run, c.product)[0][g, :1]
        slope = p.result(pull(first, [run.leaves[p.step]], weights_like(first)[None])[0][0], *matrices(sources.run, p))
        if slope[g, 0].any() and slope.count_nonzero() == slope[g, 0].count_nonzero():  # and not a column of its own
            return queries[g]
    return c.m.new_zeros(0, 0)


def _refuse_scaled_later(tape: Tape, c: Candidate) -> None:
    """Rows that do not sum to 1 must have no other influence on the output: their sum would divide it."""
    if ((c.m.sum(-1) - 1).abs() < 1e-4).all():
        return
    m = storage_of(tape.of(c.product.map_in(tape.steps)))
    written = [n for n, s in enumerate(tape.steps) if any(o is not None and storage_of(tape.of(o)) == m for o in s.outs)]
    if not written:
        return
    run = tape.rerun(cut=written[:1], hold={c.product.step})
    for y in (run.values[s] for s in tape.outputs if s in run.values):
        if any(g.any() for g in pull(y, [run.leaves[written[0]]], torch.ones_like(y)[None])):
            raise UnreadableError("what multiplies the values is scaled afterwards: its rows do not sum to 1")


def _order_of_heads(maps: Sequence[Candidate], slabs: Slabs, row: list[Row]) -> list[int]:
    """The order of the rows that feed one place: beside each other those of which the results are first of all added."""
    groups: list[list[int]] = []
    for k, (n, g, i) in enumerate(row):
        x = maps[n].places.slope[g, i]
        for group in groups:
            n0, g0, i0 = row[group[0]]
            z = maps[n0].places.slope[g0, i0]
            alike = slabs[n, g] == slabs[n0, g0] and x.shape == z.shape and len(x) > 1
            if alike and torch.cosine_similarity(x, z, 0).abs() > 1 - 1e-5:
                group.append(k)
                break
        else:
            groups.append([k])
    even = len({len(group) for group in groups}) == 1
    return [k for group in groups for k in group] if even else list(range(len(row)))
