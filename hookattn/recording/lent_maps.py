"""Maps that are lent to a function, and when: of what layers of a module have made, or of what was noted while it ran."""

from __future__ import annotations

from contextlib import AbstractContextManager
from types import TracebackType

from ..attention.overheard import hearing
from ..attention.sources import Source
from ..calls.call import Call
from ..conditions.graphs import Given
from ..maps.attention_map import AttentionMap
from ..maps.lazy import Spec
from ..maps.reading import Captured, Watched
from ..maps.sites import Watch
from ..maps.specs import needs_values, spec_without_values
from ..recipes.registry import find_recipe
from .hear import Awaited, Listener, take_heard
from .reduce import Reduction


def is_described(call: Call) -> bool:
    """Whether a recipe describes a call, rather than declines it, as far as that can be told without its values."""
    try:
        described = find_recipe(call.layer.module) is not None
        return described and (needs_values(call) or spec_without_values(call) is not None)
    except Exception:  # told when the map is read
        return True


class _Lent(Watched):
    """A map of what was noted while its module ran, as long as its call is at hand."""

    @property
    def call(self) -> Call:
        """The captured call."""
        return self._call


class _Overheard(Captured):
    """A map of what its recipe has made once, of what layers of the module have put out, as long as its call is at hand."""

    why_unreadable = ""

    def __init__(self, call: Call, source: Source) -> None:
        super().__init__(call.restamped())
        self._source = source
        self.spec = Spec(source.shape, source.dtype, source.device)

    def open(self) -> AbstractContextManager[Source]:
        """What it is computed from, in the modes of the call."""
        return _InItsModes(self.call, self._source)


class _InItsModes:
    """A block in the modes of a call, with what its map is computed from."""

    def __init__(self, call: Call, source: Source) -> None:
        self._modes, self._source = call.in_its_modes(), source

    def __enter__(self) -> Source:
        self._modes.__enter__()
        return self._source

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._modes.__exit__(kind, error, traceback)


class AwaitedReduction(Awaited):
    """What a function makes of a map, as soon as its module has made the queries and keys; called once.

    Args:
        maps: of the forward, by name.
        given: what a compiled graph has called the hook with; None outside of graphs.
    """

    def __init__(self, m: AttentionMap, maps: dict[str, AttentionMap], reduction: Reduction, given: Given | None) -> None:
        super().__init__(m.call, given)
        self._m, self._maps, self._reduction = m, maps, reduction

    def form(self, source: Source) -> Source:
        """The source with what was heard in it, before the function is called, which is not to be broken off."""
        return take_heard(source)

    def take(self, formed: Source | None) -> None:
        """Call the function, unless somebody has asked for what it makes meanwhile, or only the end of the call can tell."""
        m = self._m
        if formed is None or self._maps.get(m.name) is not m:
            return
        m = self._maps[m.name] = m._from(_Overheard(self.call, formed))
        self.heard.await_no_more()
        with hearing(self.heard):
            self._maps[m.name] = self._reduction.in_forward(m)

    def fail(self, reason: Exception) -> None:
        """Leave it to the end of the call, or of the block in a graph, where it is read as any other and tells the reason."""


def read_after_call(m: AttentionMap, watch: Watch | None) -> AttentionMap:
    """The map of a call that has just ended, of what was noted of it where it was watched."""
    call = m.call.restamped()
    return m._from(Captured(call) if watch is None else _Lent(call, watch))


def await_reduction(
    m: AttentionMap, maps: dict[str, AttentionMap], reduction: Reduction, listener: Listener, given: Given | None
) -> Awaited | None:
    """Have a function called with a map once its module has made the queries and keys; None if it need not wait for them."""
    awaited = AwaitedReduction(m, maps, reduction, given)
    listener.begin(awaited)
    return awaited if maps.get(m.name) is m else None
