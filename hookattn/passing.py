"""Maps made while a module runs, of the queries and keys it makes itself: nothing is projected twice."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from threading import get_ident
from typing import Any

from torch import nn, overrides
from torch.overrides import TorchFunctionMode

from .calls import is_reading
from .errors import StaleMapError, UnreadableError
from .hooks import Hook
from .maps import AttentionMap, CapturedMap, described
from .modes import FORM_A_MAP, Watch
from .projected import AwaitedError, Heard, hearing
from .recipes import find_recipe

_WITH_A_FAST_PATH = (nn.MultiheadAttention, nn.TransformerEncoderLayer)  # which they leave if any mode is on
_push: Callable[[TorchFunctionMode], None] = overrides._push_mode
_pop: Callable[[], TorchFunctionMode] = overrides._pop_mode
_top: Callable[[], TorchFunctionMode | None] = overrides._get_current_function_mode
Put = Callable[[AttentionMap], None]


@dataclass(eq=False)
class _Awaited:
    """A map that is made once a layer of its module has been called."""

    captured: CapturedMap
    put: Put
    heard: Heard = field(init=False)

    def __post_init__(self) -> None:
        self.heard = Heard(self.captured.call.tensors)


class Overhearing(TorchFunctionMode):
    """Shows the modules that are watched what maps are formed of while they run.

    It is on for as long as a recorder is open: a mode that each module put on and took off would stay where an interrupt keeps
    hooks from running.
    """

    def __init__(self) -> None:
        super().__init__()
        self.watched: list[tuple[CapturedMap, Put, Watch]] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if not self.watched or func not in FORM_A_MAP or is_reading():
            return func(*args, **(kwargs or {}))
        with ExitStack() as stack:
            for *_, watch in self.watched:
                stack.enter_context(watch)
            return func(*args, **(kwargs or {}))

    def begin(self, captured: CapturedMap, put: Put) -> None:
        """Watch the module of a call, from here to its end."""
        self.end(captured.call.target.module)  # an interrupt has kept it from its end
        self.watched.append((captured, put, Watch(captured.call.target.module, captured.call.tensors, as_called=True)))

    def end(self, module: nn.Module) -> tuple[CapturedMap, Put, Watch] | None:
        """Watch a module no longer, nor what was called within it."""
        ended = None
        while any(watch.module is module for *_, watch in self.watched):
            ended = self.watched.pop()
        return ended


class Passing:
    """What attention modules and their layers compute, for as long as a map is waiting for it.

    Args:
        stack: takes the hooks off the layers.
        overhearing: sees what modules without a recipe compute; without it, they are run again.
    """

    def __init__(self, stack: ExitStack, overhearing: Overhearing | None) -> None:
        self._stack, self._overhearing = stack, overhearing
        self._hooked: set[nn.Module] = set()
        self._awaited: dict[tuple[int, nn.Module], _Awaited] = {}

    def keep(self, captured: CapturedMap, put: Put) -> None:
        """Make the map of a call that is about to run: now, or as soon as the module has projected its queries and keys.

        Args:
            captured: the map, of a call in eval mode.
            put: is given the map that was made.
        """
        self._go_on(_Awaited(captured, put))

    def end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """A module has run: make its map of what was overheard, or what still waits for a layer that it did not call."""
        if self._overhearing is not None:
            ended = self._overhearing.end(module)
            if ended is not None and output is not None:  # it did not raise
                self._make(*ended)
        for key, awaited in list(self._awaited.items()):
            if key[0] == get_ident() and awaited.captured.call.target.module is module:
                del self._awaited[key]
                awaited.put(awaited.captured.at_once())

    def _go_on(self, awaited: _Awaited) -> None:
        captured, call = awaited.captured, awaited.captured.call
        try:
            call.check_at_hand()
            with call.in_its_modes(), hearing(awaited.heard):
                source = described(call)
                attention = None if source is None else source.narrow().probabilities()
        except AwaitedError as wanted:
            if wanted.layer not in self._hooked:
                self._hooked.add(wanted.layer)
                self._stack.enter_context(wanted.layer.register_forward_hook(Hook(self._hear)))
            self._awaited[get_ident(), wanted.layer] = awaited
        except (UnreadableError, StaleMapError) as reason:
            awaited.put(captured.lost(reason))
        else:
            if attention is not None:
                awaited.put(captured.kept(attention))
            elif self._overhearing is not None:
                self._overhearing.begin(captured, awaited.put)
            else:
                awaited.put(captured.at_once())

    def _make(self, captured: CapturedMap, put: Put, watch: Watch) -> None:
        """The map of what was overheard."""
        try:
            with captured.call.in_its_modes():
                put(captured.kept(watch.source().narrow().probabilities()))
        except UnreadableError as reason:
            put(captured.lost(UnreadableError(f"{captured.call.target.name!r}: {reason}")))

    def _hear(self, layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """The hook of a layer."""
        awaited = self._awaited.get((get_ident(), layer))
        if awaited is not None and args and awaited.heard.note(layer, args[0], output):
            del self._awaited[get_ident(), layer]
            self._go_on(awaited)


@contextmanager
def passing(model: nn.Module, chosen: Collection[nn.Module]) -> Iterator[Passing]:
    """What makes maps while modules run, for as long as the block lasts.

    Args:
        model: what the modules are in.
        chosen: the modules; none if they are still to be found.
    """
    with ExitStack() as stack:
        overhearing = None
        needed = not chosen or any(find_recipe(module) is None for module in chosen)
        if needed and not any(isinstance(m, _WITH_A_FAST_PATH) for m in model.modules()):
            overhearing = Overhearing()
            _push(overhearing)
            stack.callback(_take_off, overhearing)
        yield Passing(stack, overhearing)


def _take_off(mode: TorchFunctionMode) -> None:
    """Take a mode off this thread, wherever it stands among others."""
    above = []
    while (top := _top()) is not None:
        _pop()
        if top is mode:
            break
        above.append(top)
    for other in reversed(above):
        _push(other)
