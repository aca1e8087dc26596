"""What is made of a call while its module runs, as soon as the module's own layers have put out what it is computed from."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from threading import get_ident
from typing import Any, TypeVar
from weakref import WeakSet

from torch import Tensor, nn

from ..attention.overheard import AwaitedError, Heard, hearing, is_same
from ..attention.projected import Projected
from ..attention.sources import QK, Source
from ..attention.weighted import OfMap
from ..calls.call import Call
from ..calls.hooks import Hook, put_on
from ..calls.restore import is_reading
from ..conditions.graphs import Given, LayerOutput
from ..maps.established import source_by_recipe

S = TypeVar("S", bound=OfMap)


class Awaited:
    """What is made of a call, as soon as there is what it is computed from.

    Whoever follows the call holds it, and all else refers to it weakly: a call that was interrupted is followed by nobody, and
    what waits for it is gone.

    Args:
        given: what a compiled graph has called the hook with, which hands on what layers put out, too; None outside of graphs.

    Attributes:
        layer: what it waits for, or has waited for last; None where it has waited for nothing.
    """

    def __init__(self, call: Call, given: Given | None = None) -> None:
        self.call, self.thread, self.given = call, get_ident(), given
        self.heard = Heard(call.tensors)
        self.layer: nn.Module | None = None

    def form(self, source: Source) -> Any:
        """Compute what is needed of it, in the modes of the call; broken off, and called again, where a layer is awaited."""
        raise NotImplementedError

    def take(self, formed: Any) -> None:
        """Called once, with what was formed; None where no recipe describes the call."""
        raise NotImplementedError

    def fail(self, reason: Exception) -> None:
        """Called instead where the recipe, or `form`, has raised."""
        raise NotImplementedError


class Listener:
    """Hears layers of attention modules, for what waits for them.

    A recipe is run before the module. Where it needs a projection that the module will make, it is broken off (`AwaitedError`)
    and run again when a hook has heard that layer. The stack takes the hooks off.
    """

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._hooked: set[nn.Module] = set()
        self._waits_for: dict[nn.Module, nn.Module] = {}  # what the last call of a module waited for
        self._waiting: WeakSet[Awaited] = WeakSet()
        # what graphs call has no end, to which it would be held on to: the last call of each module, in each thread
        self._in_graphs: dict[tuple[nn.Module, int], Awaited] = {}

    def begin(self, awaited: Awaited) -> None:
        """Make what is wanted of a call that is about to run: now, or as soon as its module has made what it needs."""
        if (layer := self._waits_for.get(awaited.call.layer.module)) is None:
            self._go_on(awaited)
        else:
            self._wait_for(layer, awaited)

    def put_off(self, awaited: Awaited) -> None:
        """Leave it to the end of its call, though other calls of the module waited for a layer."""
        awaited.layer = None
        del self._waits_for[awaited.call.layer.module]
        self._waiting.add(awaited)

    def end(self, awaited: Awaited) -> bool:
        """Wait no more, since the module has run; whether it still waited, for a layer that was not called."""
        waited = awaited in self._waiting
        self._waiting.discard(awaited)
        return waited

    def _go_on(self, awaited: Awaited) -> None:
        call = awaited.call
        try:
            call.check_at_hand()
            # not `resumed`, which compares with the beginning of the call: since then FSDP may have written parameters anew
            with call.in_its_modes(), hearing(awaited.heard):
                source = source_by_recipe(call)
                formed = None if source is None else awaited.form(source)
        except AwaitedError as wanted:
            self._wait_for(wanted.layer, awaited, wanted.x)
        except Exception as reason:  # whatever it is, the user's forward goes on
            awaited.fail(reason)
        else:
            awaited.take(formed)

    def hear_in_graph(self, module: nn.Module, output: LayerOutput) -> None:
        """Hand what a graph tells that a layer has put out to the call of its module."""
        key = module, get_ident()
        awaited = self._in_graphs.get(key)
        if awaited is None or awaited.given is None or is_reading():
            return
        try:
            self._note_in_graph(key, awaited, awaited.given.tensors[output.number], output)
        except Exception as reason:  # whatever it is, the user's forward goes on
            self._in_graphs.pop(key, None)
            awaited.fail(reason)

    def _note_in_graph(self, key: tuple[nn.Module, int], awaited: Awaited, x: Tensor, output: LayerOutput) -> None:
        layers, is_awaited = [m for m in key[0].modules() if _is_linear_with(m, output.weight)], False
        for layer in layers:
            # run with another bias it is not what the layer would put out
            noted = _is_same_bias(getattr(layer, "bias", None), output.bias) and awaited.heard.note(layer, x, output.output)
            if layer is awaited.layer:
                is_awaited = True
                if not noted:
                    awaited.heard.await_no_more()
        if is_awaited:
            del self._in_graphs[key]
            self._go_on(awaited)
        if key in self._in_graphs:  # it waits for more, and the graph may write over what it has used
            for layer in layers:
                awaited.heard.copy(layer, x)

    def forget_in_graph(self, module: nn.Module) -> None:
        """Wait no more for layers of the last call of a module in this thread, which has ended or was broken off."""
        self._in_graphs.pop((module, get_ident()), None)

    def _wait_for(self, layer: nn.Module, awaited: Awaited, x: Tensor | None = None) -> None:
        if awaited.given is not None:
            self._wait_for_graph(awaited.given, layer, awaited, x)
            return
        # hooks stay on for the calls to come, which will wait for the same layers
        if layer not in self._hooked:
            self._hooked.add(layer)
            self._stack.enter_context(put_on(layer.register_forward_hook, Hook(self._hear)))
        awaited.layer = self._waits_for[awaited.call.layer.module] = layer
        self._waiting.add(awaited)

    def _wait_for_graph(self, given: Given, layer: nn.Module, awaited: Awaited, x: Tensor | None) -> None:
        module = awaited.call.layer.module
        told = [given.tensors[number] for weight, number in zip(given.weights, given.numbers) if _is_linear_with(layer, weight)]
        if told and (x is None or any(is_same(each, x) for each in told)):
            awaited.layer = self._waits_for[module] = layer
            self._in_graphs[module, awaited.thread] = awaited
        else:
            awaited.heard.await_no_more()
            self._go_on(awaited)

    def _hear(self, layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Forward hook of a layer: hand what it has put out to all in this thread that wait for it."""
        if is_reading():  # it is no part of the user's forward
            return
        for awaited in list(self._waiting):
            mine = awaited.thread == get_ident() and bool(args) and awaited.heard.note(layer, args[0], output)
            if mine and awaited.layer is layer:
                self._waiting.discard(awaited)
                self._go_on(awaited)


def _is_linear_with(layer: nn.Module, weight: Tensor) -> bool:
    own = getattr(layer, "weight", None)  # which layers of a class of their own may lack, such as quantised ones
    return isinstance(layer, nn.Linear) and isinstance(own, Tensor) and is_same(own, weight)


def _is_same_bias(bias: Tensor | None, other: Tensor | None) -> bool:
    return bias is other if bias is None or other is None else is_same(bias, other)


def take_heard(source: Source) -> Source:
    """A source with queries and keys in it that were heard, or an AwaitedError; what no layer puts out is not computed."""
    if isinstance(source, QK):
        return replace(source, q=_if_heard(source.q), k=_if_heard(source.k))
    return _of_heard(source) if isinstance(source, OfMap) else source


def _of_heard(derived: S) -> S:
    return replace(derived, source=take_heard(derived.source))


def _if_heard(factor: Tensor) -> Tensor:
    heard = factor.heard() if isinstance(factor, Projected) else None
    return factor if heard is None else heard
