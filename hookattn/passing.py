"""Maps made while a module runs, of the queries and keys it projects itself: nothing is projected twice."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from threading import get_ident
from typing import Any

from torch import nn

from .errors import StaleMapError, UnreadableError
from .hooks import Hook
from .maps import AttentionMap, CapturedMap, source_of
from .projected import AwaitedError, Heard, hearing

Put = Callable[[AttentionMap], None]


@dataclass(eq=False)
class _Awaited:
    """A map that is made once a layer of its module has been called."""

    captured: CapturedMap
    put: Put
    heard: Heard = field(init=False)

    def __post_init__(self) -> None:
        self.heard = Heard(self.captured.call.tensors)


class Passing:
    """What the layers of attention modules put out, for as long as a map is waiting for it.

    Args:
        stack: takes the hooks off these layers.
    """

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._hooked: set[nn.Module] = set()
        self._awaited: dict[tuple[int, nn.Module], _Awaited] = {}

    def keep(self, captured: CapturedMap, put: Put) -> None:
        """Make the map of a call that is about to run: now, or as soon as the module has projected its queries and keys.

        Args:
            captured: the map, of a call in eval mode.
            put: is given the map that was made.
        """
        self._go_on(_Awaited(captured, put))

    def end(self, module: nn.Module, *_: Any) -> None:
        """A module has run: make what still waits for a layer that it did not call."""
        for key, awaited in list(self._awaited.items()):
            if key[0] == get_ident() and awaited.captured.call.target.module is module:
                del self._awaited[key]
                awaited.put(awaited.captured.at_once())

    def _go_on(self, awaited: _Awaited) -> None:
        captured = awaited.captured
        try:
            captured.call.check_at_hand()
            with captured.call.in_its_modes(), hearing(awaited.heard):
                attention = source_of(captured.call).narrow().probabilities()
        except AwaitedError as wanted:
            if wanted.layer not in self._hooked:
                self._hooked.add(wanted.layer)
                self._stack.enter_context(wanted.layer.register_forward_hook(Hook(self._hear)))
            self._awaited[get_ident(), wanted.layer] = awaited
        except (UnreadableError, StaleMapError) as reason:
            awaited.put(captured.lost(reason))
        else:
            awaited.put(captured.kept(attention))

    def _hear(self, layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """The hook of a layer."""
        awaited = self._awaited.get((get_ident(), layer))
        if awaited is not None and args and awaited.heard.note(layer, args[0], output):
            del self._awaited[get_ident(), layer]
            self._go_on(awaited)
