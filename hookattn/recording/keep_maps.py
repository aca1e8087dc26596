"""Maps made while a module runs, of the queries and keys it makes itself: nothing is projected twice."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from threading import get_ident
from typing import Any
from weakref import WeakSet

from torch import nn

from ..attention.overheard import AwaitedError, Heard, hearing
from ..calls.call import Call
from ..calls.hooks import Hook, put_on
from ..conditions.function_modes import put_below_others, take_off
from ..maps.attention_map import AttentionMap
from ..maps.established import NameInErrors, NotEstablishedError, arrange, deferring, source_by_recipe
from ..maps.intercept import Intercept, Sites
from ..maps.replay import source_of_watched
from ..maps.sites import Watch

# Undocumented, torch 2.6 to 2.14: in eval mode these run as one kernel, but not under any function mode, which they take for
# tensors of another class. Outputs would not be those without a recorder, bit for bit.
_WITH_A_FAST_PATH = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
Put = Callable[[AttentionMap], None]


class Awaited:
    """A map that is made while its module runs, as soon as there is what it is computed from.

    Whoever follows the call holds it, and all else refers to it weakly: a call that was interrupted is followed by nobody, and
    what waits for it is gone. `put` is given the map that was made.
    """

    def __init__(self, call: Call, m: AttentionMap, put: Put) -> None:
        self.call, self.m, self.put, self.thread = call, m, put, get_ident()
        self.heard = Heard(call.tensors)
        self.layer: nn.Module | None = None
        self.watch: Watch | None = None


class KeepMaps:
    """Makes maps for keep="maps" out of what attention modules and their layers compute, while they run.

    A recipe is run before the module. Where it needs a projection that the module will make, it is broken off (`AwaitedError`)
    and run again when a hook has heard that layer. A module without a recipe is watched by a mode instead of run again.
    The stack takes the hooks off the layers, and the mode off the thread.
    """

    def __init__(self, model: nn.Module, stack: ExitStack) -> None:
        self._stack = stack
        self._watches = not any(isinstance(m, _WITH_A_FAST_PATH) for m in model.modules())  # else modules are run again
        self._watched: WeakSet[Sites] | None = None  # None until the mode is on
        self._hooked: set[nn.Module] = set()
        self._waits_for: dict[nn.Module, nn.Module] = {}  # what the last call of a module waited for
        self._waiting: WeakSet[Awaited] = WeakSet()

    def begin(self, call: Call, m: AttentionMap, put: Put) -> Awaited:
        """Make the map of a call that is about to run: now, or as soon as the module has projected its queries and keys."""
        awaited = Awaited(call, m, put)
        if (layer := self._waits_for.get(call.layer.module)) is None:
            self._go_on(awaited)
        else:
            self._wait_for(layer, awaited)
        return awaited

    def end(self, awaited: Awaited, output: Any) -> None:
        """Make the map of a module that has run, if it was watched or still waits for a layer that was not called."""
        if awaited.watch is not None and self._watched is not None:
            self.leave(awaited.watch)
            if output is not None:  # it did not raise
                _make_of_what_was_formed(awaited, awaited.watch)
        if awaited in self._waiting:
            self._waiting.discard(awaited)
            _compute(awaited)

    def watch(self) -> Watch | None:
        """Note what a module forms that is about to run, until `leave`; None where models are not watched."""
        if not self._watches:
            return None
        watch = Watch(as_called=True)
        self._watching().add(watch)
        return watch

    def leave(self, watch: Watch) -> None:
        """Note no more of what runs."""
        if self._watched is not None:
            self._watched.discard(watch)

    def _go_on(self, awaited: Awaited) -> None:
        m, call = awaited.m, awaited.call
        try:
            call.check_at_hand()
            # not `resumed`, which compares with the beginning of the call: since then FSDP may have written parameters anew
            with call.in_its_modes(), hearing(awaited.heard):
                source = source_by_recipe(call)
                attention = None if source is None else source.narrow().values()
        except AwaitedError as wanted:
            self._wait_for(wanted.layer, awaited)
        except Exception as reason:  # whatever it is, the user's forward goes on
            awaited.put(m.lost(reason))
        else:
            if attention is not None:
                awaited.put(m.kept(attention))
            elif awaited.layer is not None:  # other calls of the module waited for that layer; this one is run again at its end
                awaited.layer = None
                del self._waits_for[call.layer.module]
                self._waiting.add(awaited)
            elif (watch := self.watch()) is not None:
                awaited.watch = watch
            else:
                _compute(awaited)

    def _wait_for(self, layer: nn.Module, awaited: Awaited) -> None:
        # hooks stay on for the calls to come, which will wait for the same layers
        if layer not in self._hooked:
            self._hooked.add(layer)
            self._stack.enter_context(put_on(layer.register_forward_hook, Hook(self._hear)))
        awaited.layer = self._waits_for[awaited.call.layer.module] = layer
        self._waiting.add(awaited)

    def _hear(self, layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Forward hook of a layer: hand what it has put out to the maps of this thread that wait for it."""
        for awaited in list(self._waiting):
            mine = awaited.thread == get_ident() and bool(args) and awaited.heard.note(layer, args[0], output)
            if mine and awaited.layer is layer:
                self._waiting.discard(awaited)
                self._go_on(awaited)

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


def _compute(awaited: Awaited) -> None:
    """Make a map by running the module again, unless its axes would have to be established first."""
    with deferring():
        awaited.put(awaited.m.computed())


def _make_of_what_was_formed(awaited: Awaited, watch: Watch) -> None:
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
