"""Maps made while a module runs, of the queries and keys it makes itself: nothing is projected twice."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from weakref import WeakSet

from torch import Tensor, nn

from ..attention.softmax import is_ours_alone
from ..attention.sources import QK, Source
from ..calls.call import Call
from ..conditions.function_modes import put_below_others, take_off
from ..conditions.graphs import Given
from ..maps.attention_map import AttentionMap
from ..maps.established import NameInErrors, NotEstablishedError, arrange, deferring
from ..maps.intercept import Intercept, Sites
from ..maps.replay import source_of_watched
from ..maps.sites import Watch
from .buffers import Buffers
from .hear import Awaited, Listener

# Undocumented, torch 2.6 to 2.15: in eval mode these run as one kernel, but not under any function mode, which they take for
# tensors of another class. Outputs would not be those without a recorder, bit for bit.
_WITH_A_FAST_PATH = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
Put = Callable[[AttentionMap], None]


class AwaitedMap(Awaited):
    """A map that is made while its module runs.

    Args:
        put: is given the map that was made.
        decline: called with this where no recipe describes the call.
        buffers: where it is made, if that can be.
        given: what a compiled graph has called the hook with; None outside of graphs.
    """

    def __init__(
        self,
        call: Call,
        m: AttentionMap,
        put: Put,
        decline: Callable[[AwaitedMap], None],
        buffers: Buffers,
        given: Given | None = None,
    ) -> None:
        super().__init__(call, given)
        self.m, self.put, self._decline, self._buffers = m, put, decline, buffers
        self.watch: Watch | None = None

    def form(self, source: Source) -> Tensor:
        """The map."""
        # on other devices PyTorch itself keeps memory, and what a transform of torch.func makes has none that can be told apart
        if isinstance(source, QK) and source.device.type == "cpu" and is_ours_alone() and self.m._deliver.is_as_it_comes:
            return source.values(self._buffers.take(source.shape, source.dtype))
        return source.narrow().values()

    def take(self, formed: Tensor | None) -> None:
        """Keep the map."""
        if formed is None:
            self._decline(self)
        else:
            self.put(self.m.kept(formed))

    def fail(self, reason: Exception) -> None:
        """Keep the reason why there is none."""
        self.put(self.m.lost(reason))


class KeepMaps:
    """Makes maps for keep="maps" out of what attention modules and their layers compute, while they run.

    Modules that a recipe describes are heard. One without a recipe is watched by a mode instead of run again. The stack takes
    the hooks off the layers, and the mode off the thread.
    """

    def __init__(self, model: nn.Module, stack: ExitStack) -> None:
        self._stack, self.listener = stack, Listener(stack)
        self._watches = not any(isinstance(m, _WITH_A_FAST_PATH) for m in model.modules())  # else modules are run again
        self._watched: WeakSet[Sites] | None = None  # None until the mode is on
        self._buffers = Buffers(model)
        stack.callback(self._buffers.leave)

    def begin(self, call: Call, m: AttentionMap, put: Put, given: Given | None = None) -> AwaitedMap:
        """Make the map of a call that is about to run: now, or as soon as the module has projected its queries and keys."""
        awaited = AwaitedMap(call, m, put, self._decline, self._buffers, given)
        self.listener.begin(awaited)
        return awaited

    def end(self, awaited: AwaitedMap, given: Any, output: Any) -> None:
        """Make the map of a module that has run, if it was watched or still waits for a layer that was not called."""
        if awaited.watch is not None and self._watched is not None:
            self.leave(awaited.watch, given, output)
            if output is not None:  # it did not raise
                _make_of_what_was_formed(awaited, awaited.watch)
        if self.listener.end(awaited):
            _compute(awaited)

    def watch(self) -> Watch | None:
        """Note what a module forms that is about to run, until `leave`; None where models are not watched."""
        if not self._watches:
            return None
        watch = Watch(as_called=True)
        self._watching().add(watch)
        return watch

    def leave(self, watch: Watch, given: Any, output: Any) -> None:
        """Note no more of what runs; a module has run, was given this and has put out that."""
        watch.finish(given, output)
        if self._watched is not None:
            self._watched.discard(watch)

    def _decline(self, awaited: AwaitedMap) -> None:
        if awaited.given is not None:
            _compute(awaited)  # in a graph a call has no end, and no mode sees what is formed
        elif awaited.layer is not None:
            self.listener.put_off(awaited)  # and run again then: it is too late to watch it
        elif (watch := self.watch()) is not None:
            awaited.watch = watch
        else:
            _compute(awaited)

    def _watching(self) -> WeakSet[Sites]:
        """The sites that are shown what modules form, by a mode that is on from the first who asks to the end of the block."""
        # A mode that each module put on and took off would stay where an interrupt keeps hooks from running, and would end
        # where the user's own modes do not expect it.
        if self._watched is None:
            self._watched = WeakSet()
            mode = Intercept(self._watched)
            put_below_others(mode)
            self._stack.callback(take_off, mode)
            self._stack.callback(self._watched.clear)
        return self._watched


def _compute(awaited: AwaitedMap) -> None:
    """Make a map by running the module again, unless its axes would have to be established first."""
    with deferring():
        awaited.put(awaited.m.computed())


def _make_of_what_was_formed(awaited: AwaitedMap, watch: Watch) -> None:
    """Make the map of a module that was watched; one that formed none is lost, with the reason."""
    m, call = awaited.m, awaited.call
    try:
        with NameInErrors(call), call.in_its_modes(), deferring():
            source = source_of_watched(call, watch, arrange(call, watch))
            awaited.put(m.kept(source.narrow().values()))
    except NotEstablishedError:  # the first of its kind: made of what was noted when somebody asks, or at the end of the block
        awaited.put(m.watched(watch))
    except Exception as reason:  # whatever it is, the user's forward goes on
        awaited.put(m.lost(reason))
