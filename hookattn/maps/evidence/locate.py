"""Where rows of products stand among what functions of PyTorch form: in softmaxes, inside of SDPA, or as factors."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...errors import UnreadableError
from ..arrangement import Arrangement, Part
from .product import AS_IT_IS, Product, matrices
from .tape import Slot, Tape


class _Held(NamedTuple):
    """Rows (rows, keys) that stand in a part; `step` of the tape has made them, -1 for those of a factor."""

    part: Part
    rows: Tensor
    step: int


def locate(tape: Tape, products: Sequence[Product], index: Tensor, mixed: tuple[int, tuple[int, ...]] | None) -> Arrangement:
    """The arrangement of a map among what the forward forms, out of that among the rows of products.

    Args:
        index: (windows, heads, queries), which of the rows of all products stands there.
        mixed: for a map that is a softmax before its heads are mixed: its step, and its axes as (windows, heads, queries,
            keys).

    Raises:
        UnreadableError: its rows are not seen outside of the products.
    """
    softmaxes = [_Held(*each) for each in tape.seen.rows_of_softmaxes(tape.of)]
    if mixed is not None:
        return _before_mixing(softmaxes, index, *mixed)
    run = tape.rerun(catch={p.at for p in products}, exactly=True)
    blocks = [matrices(run, p)[0].flatten(0, 1) for p in products]
    used = index[index < sum(map(len, blocks))]
    wanted = torch.cat([_codes(rows) for rows in blocks])[used.to(blocks[0].device)].tolist()
    # others are taken for something else, or changed before they multiply, if only by a mask that hides nothing in this call
    softmaxes = [held for held in softmaxes if _is_what_multiplies(tape, held.step, products)]
    found = _match(wanted, softmaxes)
    if found is not None and len(set(wanted)) < len(wanted):  # rows that are the same do not tell their order
        found = _match_others(tape, products, used, softmaxes)
    if found is None:
        keys = {rows.shape[1] for rows in blocks}
        found = _match(wanted, list(_factors(tape, products, keys, set(wanted))))
        if found is not None:  # a map may have rows that are the same, or columns that are rows, such as one that is diagonal
            others = _match_other_factors(tape, products, used, keys, found[0])
            if others is None and len(set(wanted)) < len(wanted):
                raise UnreadableError("rows of its map are the same, and it is not told in which order they stand")
            found = others or found
    if found is None:
        raise UnreadableError("what multiplies its values is made where no function of PyTorch can be seen to take it")
    parts, numbers = found
    rows = torch.full_like(index, sum(part.rows for part in parts))
    rows[index < sum(map(len, blocks))] = torch.tensor(numbers, device="cpu")
    return Arrangement(tuple(parts), rows)


def _before_mixing(softmaxes: list[_Held], index: Tensor, step: int, order: tuple[int, ...]) -> Arrangement:
    for held in softmaxes:
        if held.step == step:
            lead = [a for a in range(len(held.part.shape)) if a != held.part.axis]
            places = torch.arange(held.part.rows, device="cpu").view([held.part.shape[a] for a in lead])
            places = places.permute([lead.index(a) for a in order if a != held.part.axis])
            return Arrangement((held.part,), places.reshape(index.shape))
    raise UnreadableError("its softmax is taken where no function of PyTorch can be seen to take it")


def _match(wanted: list[int], helds: Sequence[_Held]) -> tuple[list[Part], list[int]] | None:
    """Parts that hold all of the rows that are wanted, and where; rows that are the same in the order they come in."""
    places: dict[int, deque[tuple[int, int]]] = defaultdict(deque)
    for n, held in enumerate(helds):
        for row, code in enumerate(_codes(held.rows).tolist()):
            places[code].append((n, row))
    if any(not places.get(code) for code in wanted):
        return None
    at = [places[code].popleft() if len(places[code]) > 1 else places[code][0] for code in wanted]
    used = sorted({n for n, _ in at})
    start, starts = 0, {}
    for n in used:
        starts[n] = start
        start += helds[n].part.rows
    return [helds[n].part for n in used], [starts[n] + row for n, row in at]


def _match_others(
    tape: Tape, products: Sequence[Product], used: Tensor, softmaxes: Sequence[_Held]
) -> tuple[list[Part], list[int]] | None:
    """As `_match`, with random numbers in place of what the softmaxes put out, no two rows of which are the same."""
    random, device = torch.Generator().manual_seed(5), softmaxes[0].rows.device
    others = {held.step: torch.rand(held.part.shape, generator=random, device="cpu").to(held.rows) for held in softmaxes}
    run = tape.rerun(catch={p.at for p in products}, exactly=True, put=others)
    wanted = torch.cat([_codes(matrices(run, p)[0].flatten(0, 1)) for p in products])[used.to(device)]
    return _match(wanted.tolist(), [held._replace(rows=held.part.as_rows(others[held.step])) for held in softmaxes])


def _is_what_multiplies(tape: Tape, made: int, products: Sequence[Product]) -> bool:
    """Whether what a step puts out is a map of the products as it is, only laid out in another way."""
    unchanged = set(tape.steps[made].outs)
    for step in tape.steps[made + 1 : 1 + max(p.at for p in products)]:
        if not unchanged.isdisjoint(step.slots()) and step.func.overloadpacket in AS_IT_IS:
            unchanged |= set(step.outs)
    return any(p.map_in(tape.steps) in unchanged for p in products)


def _factors(tape: Tape, products: Sequence[Product], keys: set[int], wanted: set[int]) -> Iterator[_Held]:
    """Factors of the multiplications that are the products, each along the axis in which most rows are wanted ones."""
    for number, operand, factor in tape.seen.factors_of([p.at for p in products]):
        helds = [_Held(part, part.as_rows(factor), -1) for part in _parts(number, operand, factor, keys)]
        if helds:
            yield max(helds, key=lambda held: sum(code in wanted for code in _codes(held.rows).tolist()))


def _match_other_factors(
    tape: Tape, products: Sequence[Product], used: Tensor, keys: set[int], parts: Sequence[Part]
) -> tuple[list[Part], list[int]] | None:
    """As `_match`, with random numbers in place of the factors that parts are."""
    random, helds, put, given = torch.Generator().manual_seed(5), list[_Held](), dict[int, Tensor](), dict[Slot, Tensor]()
    for number, operand, factor in tape.seen.factors_of([p.at for p in products]):
        if any((part.number, part.operand) == (number, operand) for part in parts):
            drawn = torch.rand(factor.shape, generator=random, device="cpu")
            other = torch.empty_like(factor).copy_(drawn)  # as strided as it was, for what is a view of it
            slot, made = tape.made_in(factor)
            # a step that runs again would put its own in place of what is given
            put, given = ({**put, made: other}, given) if made >= 0 else (put, {**given, slot: other})
            helds += [_Held(part, part.as_rows(other), made) for part in _parts(number, operand, factor, keys)]
    run = tape.rerun(given, catch={p.at for p in products}, exactly=True, put=put)
    rows = torch.cat([_codes(matrices(run, p)[0].flatten(0, 1)) for p in products])
    return _match(rows[used.to(rows.device)].tolist(), helds)


def _parts(number: int, operand: int, factor: Tensor, keys: set[int]) -> list[Part]:
    return [Part(number, operand, tuple(factor.shape), axis) for axis, n in enumerate(factor.shape) if n in keys]


def _codes(rows: Tensor) -> Tensor:
    """A number for each row (rows, keys), the same for those that are the same to the last bit."""
    bits = rows.contiguous().view(torch.int64 if rows.dtype == torch.float64 else torch.int32).long()
    odd = torch.randint(1 << 62, (rows.shape[1],), generator=torch.Generator().manual_seed(2), device="cpu") * 2 + 1
    return (bits * odd.to(bits.device)).sum(1) + rows.shape[1]
