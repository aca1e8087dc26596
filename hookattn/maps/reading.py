"""Where a map comes from: a captured call, read by recipe or by replay; a tensor that was kept; or nowhere, and why."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from types import TracebackType
from typing import Union

from torch import Tensor

from ..attention.sources import Dense, Source
from ..calls.call import Call
from ..conditions.transforms import is_left_behind
from ..errors import HookattnError, RecorderError, UnreadableError
from .established import NameInErrors, TellWhy, arrange, as_in_training, source_by_recipe
from .lazy import LazyArray, Spec
from .replay import replayed, source_of_watched, why_unreadable
from .sites import Watch
from .specs import known_spec, needs_values, spec_without_values

_LET_GO = 'the input of {!r} was let go; record with AttentionRecorder(model, keep="inputs").'


class Captured:
    """A map that is computed from a captured call each time it is sliced."""

    def __init__(self, call: Call) -> None:
        self.call = call

    @cached_property
    def why_unreadable(self) -> str:
        """Why there is no such map, if it cannot be read."""
        return why_unreadable(self.call)

    def open(self) -> AbstractContextManager[Source]:
        """Queries and keys of the call, in its modes for as long as the block lasts."""
        return _Opened(self.call)

    @cached_property
    def spec(self) -> Spec:
        """Shape, dtype and device of the map; looked up once, without computing it where its module has a recipe."""
        with TellWhy(self.call.layer.name):
            return _spec_of(self.call)


class _Opened:
    """A captured call that is resumed to be read."""

    # A class, since this is around each reading and a generator costs several times as much.

    def __init__(self, call: Call) -> None:
        self._call = call

    def __enter__(self) -> Source:
        self._modes = self._call.resumed()
        self._modes.__enter__()
        try:
            with TellWhy(self._call.layer.name):
                return source_of(self._call)
        except BaseException:
            self._modes.__exit__(None, None, None)
            raise

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._modes.__exit__(kind, error, traceback)


class Deferred(Captured):
    """A map that was to be computed while the model ran, and waits for its axes to be established, with its call."""


class Watched:
    """A map that waits for its axes to be established, with what was noted while its module ran."""

    def __init__(self, call: Call, watch: Watch) -> None:
        self._call, self._watch = call, watch

    @contextmanager
    def open(self) -> Iterator[Source]:
        """What was noted, arranged now."""
        call = self._call
        with call.in_its_modes(), NameInErrors(call):
            with TellWhy(call.layer.name):
                source = source_of_watched(call, self._watch, arrange(call, self._watch))
            yield source

    @cached_property
    def why_unreadable(self) -> str:
        """Why there is no such map, if it cannot be read."""
        try:
            self._spec_now()
        except UnreadableError as reason:
            return str(reason)
        return ""

    @cached_property
    def spec(self) -> Spec:
        """Shape, dtype and device of the map."""
        return self._spec_now()

    def _spec_now(self) -> Spec:
        with self.open() as source:
            return Spec(source.shape, source.dtype, source.device)

    @property
    def call(self) -> Call:
        """Always raises: the call is let go when the map is computed."""
        raise RecorderError(_LET_GO.format(self._call.layer.name))


class Kept:
    """A map that was computed while the model ran; the call was let go."""

    why_unreadable = ""

    def __init__(self, name: str, attention: Tensor) -> None:
        self._name, self._attention = name, attention
        self.spec = Spec(Dense(attention).shape, attention.dtype, attention.device)

    @contextmanager
    def open(self) -> Iterator[Source]:
        """The map as it was kept."""
        if is_left_behind(self._attention):
            raise UnreadableError(
                f"{self._name!r} ran under torch.vmap, which has returned; return m[...] from what is mapped."
            )
        yield Dense(self._attention)

    @property
    def call(self) -> Call:
        """Always raises: the call was let go."""
        raise RecorderError(_LET_GO.format(self._name))


class Lost:
    """A map that should have been computed while the model ran, and could not be, for the reason given.

    Attributes:
        why_unreadable: the reason, if it is that of every other such call: its module forms no map that can be read.
    """

    def __init__(self, name: str, reason: str, kind: type[HookattnError] = UnreadableError, *, always: bool = False) -> None:
        self._name, self._reason, self._kind = name, reason, kind
        self.why_unreadable = reason if always else ""

    def open(self) -> AbstractContextManager[Source]:
        """Always raises, with the reason."""
        raise self._kind(self._reason)

    @property
    def spec(self) -> Spec:
        """Always raises, with the reason."""
        raise self._kind(self._reason)

    @property
    def call(self) -> Call:
        """Always raises: the call was let go."""
        raise RecorderError(_LET_GO.format(self._name))


class Loaded:
    """A map that was loaded from a file: its values, some rows, or what it is made of, read from there when it is sliced."""

    why_unreadable = ""

    def __init__(self, name: str, source: Source) -> None:
        self._name, self._source = name, source
        self.spec = Spec(source.shape, source.dtype, source.device)

    def open(self) -> AbstractContextManager[Source]:
        """What was loaded."""
        return nullcontext(self._source)

    @property
    def call(self) -> Call:
        """Always raises: a file holds no call."""
        raise RecorderError(f"{self._name!r} was loaded from a file, which holds no model and no input; record it for these.")


class Computed:
    """Something that is computed from a map, and is read like one."""

    why_unreadable = ""

    def __init__(self, name: str, what: str, open: Callable[[], AbstractContextManager[Source]]) -> None:
        self._name, self._what, self.open = name, what, open

    @cached_property
    def spec(self) -> Spec:
        """Shape, dtype and device of it."""
        with self.open() as source:
            return Spec(source.shape, source.dtype, source.device)

    @property
    def call(self) -> Call:
        """Always raises: it is of a map, which has one."""
        raise RecorderError(f"this is {self._what} of {self._name!r}; its call is that of the map: rec.maps[{self._name!r}].")


Origin = Union[Captured, Watched, Kept, Lost, Loaded, Computed]
"""Where a map comes from."""


def keep_or_lose(array: LazyArray) -> Kept | Lost:
    """Compute what is to be pickled, so that it keeps no model; where it cannot be read, keep the reason."""
    try:
        return Kept(array.name, array[...].detach())
    except HookattnError as error:
        return Lost(array.name, str(error), type(error))


def source_of(call: Call) -> Source:
    """Make what the map of a call is computed from, by recipe or by replay; the modes of the call are on already."""
    if True not in call.modes.training:
        return source_by_recipe(call) or replayed(call)
    with as_in_training(call):
        return source_by_recipe(call) or replayed(call)


def _spec_of(call: Call) -> Spec:
    """Shape, dtype and device of a map, without its values where they need not be looked at."""
    by_recipe = not needs_values(call)
    if by_recipe and (found := known_spec(call)) is not None:
        return found  # it follows from sizes, whatever has become of values
    call.check_soon()
    if by_recipe and (found := spec_without_values(call)) is not None:
        return found
    with call.in_its_modes():
        source = source_of(call)
    return Spec(source.shape, source.dtype, call.x.device)
