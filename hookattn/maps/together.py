"""The row of a query in several maps, read together."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ..attention.projected import Projected
from ..attention.sources import QK, Source
from ..calls.call import Call
from ..conditions.samples import Doubts
from ..image.tokens import Query
from .attention_map import AttentionMap
from .established import TellWhy
from .picture import index_of_row
from .reading import Captured, source_of


def read_rows(maps: Mapping[str, AttentionMap], query: Query) -> dict[str, Tensor]:
    """Compute the row of a query in each of several maps: what `m.rows(query)` gives of each."""
    asked = {name: index_of_row(name, *m._both_tokens(), query) for name, m in maps.items()}
    calls = {name: m._origin.call for name, m in maps.items() if isinstance(m._origin, Captured)}
    # One thing after the other for all maps, here and below. Weights are large: what is looked at between the products of one
    # map and those of the next would have to be fetched from memory each time.
    with Doubts() as doubts:
        for call in calls.values():
            call.check_fresh()
    found = _read_in_its_modes(next(iter(calls.values())), calls, asked) if calls else {}
    if doubts.have_come_true():  # waited for once, and not for each map
        for call in calls.values():
            call.check_fresh()
    return {n: m._deliver(m._check(found[n])) if n in found else m[asked[n]] for n, m in maps.items()}


def _read_in_its_modes(
    first: Call, calls: Mapping[str, Call], asked: Mapping[str, tuple[slice, slice, int]]
) -> dict[str, Tensor]:
    """Compute what is asked for of all calls that were made in the same modes as the first; they are fresh."""
    parts: dict[str, Source] = {}
    found: dict[str, Tensor] = {}
    with first.in_its_modes(), TellWhy(first.layer.name) as why:
        for why.name, call in calls.items():
            if call.is_in_its_modes():
                parts[why.name] = source_of(call)
                if not _is_formed_later(parts[why.name]):
                    found[why.name] = _narrowed(parts.pop(why.name), asked[why.name]).values()
        for why.name, source in parts.items():
            parts[why.name] = _narrowed(source, asked[why.name])
        for why.name, part in parts.items():
            found[why.name] = part.values()
        return {name: values[:, :, 0] for name, values in found.items()}


def _narrowed(source: Source, asked: tuple[slice, slice, int]) -> Source:
    batch, heads, row = asked
    return source.narrow(batch, heads, slice(row, row + 1))


def _is_formed_later(source: Source) -> bool:
    """Whether nothing of the size of an input is computed yet, so that there is room for those of all maps at once."""
    return (
        isinstance(source, QK)
        and isinstance(source.q, Projected)
        and isinstance(source.k, Projected)
        and source.bias is source.mask is None
    )
