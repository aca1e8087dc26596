"""Maps made while a module runs, of the queries and keys it makes itself: nothing is projected twice."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from threading import get_ident
from typing import Any

from torch import nn, overrides
from torch.overrides import TorchFunctionMode
from torch.utils._device import DeviceContext

from ..attention.overheard import AwaitedError, Heard, hearing
from ..calls.hooks import Hook
from ..calls.restore import is_reading
from ..errors import StaleMapError, UnreadableError
from ..maps.attention_map import AttentionMap
from ..maps.intercept import FORM_A_MAP, Watch
from ..maps.reading import described, naming

_WITH_A_FAST_PATH = (nn.MultiheadAttention, nn.TransformerEncoderLayer)  # which they leave if any mode is on
_push: Callable[[TorchFunctionMode], None] = overrides._push_mode
_pop: Callable[[], TorchFunctionMode] = overrides._pop_mode
_top: Callable[[], TorchFunctionMode | None] = overrides._get_current_function_mode
Put = Callable[[AttentionMap], None]


@dataclass(eq=False)
class _Awaited:
    """A map that is made once a layer of its module has been called."""

    captured: AttentionMap
    put: Put
    heard: Heard = field(init=False)
    layer: nn.Module | None = None

    def __post_init__(self) -> None:
        self.heard = Heard(self.captured.call.tensors)


class Overhearing(TorchFunctionMode):
    """Shows the modules that are watched what maps are formed of while they run.

    From the first call that needs it, it stays on until the recorder closes: a mode that each module put on and took off would
    stay where an interrupt keeps hooks from running.
    """

    def __init__(self) -> None:
        super().__init__()
        self.thread = get_ident()
        self.watched: list[tuple[AttentionMap, Put, Watch]] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if not self.watched or func not in FORM_A_MAP or is_reading():
            return func(*args, **(kwargs or {}))
        with ExitStack() as stack:
            for *_, watch in self.watched:
                stack.enter_context(watch)
            return func(*args, **(kwargs or {}))

    def begin(self, captured: AttentionMap, put: Put) -> None:
        """Watch the module of a call, from here to its end."""
        self.end(captured.call.target.module)  # an interrupt has kept it from its end
        self.watched.append((captured, put, Watch(captured.call.target.module, captured.call.tensors, as_called=True)))

    def end(self, module: nn.Module) -> tuple[AttentionMap, Put, Watch] | None:
        """Watch a module no longer, nor what was called within it, unless another thread or a reading has run it."""
        ended = None
        if get_ident() != self.thread or is_reading():
            return None
        while any(watch.module is module for *_, watch in self.watched):
            ended = self.watched.pop()
        return ended


class Passing:
    """What attention modules and their layers compute, for as long as a map is waiting for it.

    Args:
        stack: takes the hooks off the layers, and the mode off the thread.
        overhears: whether modules without a recipe are overheard; otherwise they are run again.
    """

    def __init__(self, stack: ExitStack, *, overhears: bool) -> None:
        self._stack, self._overhears = stack, overhears
        self._overhearing: Overhearing | None = None
        self._hooked: set[nn.Module] = set()
        self._awaited: dict[tuple[int, nn.Module], _Awaited] = {}

    def keep(self, captured: AttentionMap, put: Put) -> None:
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
        if (awaited := self._awaited.pop((get_ident(), module), None)) is not None:
            awaited.put(awaited.captured.computed())

    def _go_on(self, awaited: _Awaited) -> None:
        captured, call = awaited.captured, awaited.captured.call
        try:
            call.check_at_hand()
            with call.in_its_modes(), hearing(awaited.heard):
                source = described(call)
                attention = None if source is None else source.narrow().values()
        except AwaitedError as wanted:
            if wanted.layer not in self._hooked:
                self._hooked.add(wanted.layer)
                self._stack.enter_context(wanted.layer.register_forward_hook(Hook(self._hear)))
            awaited.layer = wanted.layer
            self._awaited[get_ident(), call.target.module] = awaited
        except (UnreadableError, StaleMapError) as reason:
            awaited.put(captured.lost(reason))
        else:
            if attention is not None:
                awaited.put(captured.kept(attention))
            elif self._overhears:
                self._listening().begin(captured, awaited.put)
            else:
                awaited.put(captured.computed())

    def _listening(self) -> Overhearing:
        """The mode that overhears, from now on until the recorder closes."""
        if self._overhearing is None:
            self._overhearing = Overhearing()
            _put_on(self._overhearing)
            self._stack.callback(_take_off, self._overhearing)
            self._stack.callback(self._overhearing.watched.clear)
        return self._overhearing

    def _make(self, captured: AttentionMap, put: Put, watch: Watch) -> None:
        """The map of what was overheard."""
        try:
            with naming(captured.call), captured.call.in_its_modes():
                put(captured.kept(watch.source().narrow().values()))
        except UnreadableError as reason:
            put(captured.lost(reason))

    def _hear(self, layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """The hook of a layer."""
        for key, awaited in list(self._awaited.items()):
            mine = key[0] == get_ident() and bool(args) and awaited.heard.note(layer, args[0], output)
            if mine and awaited.layer is layer:
                del self._awaited[key]
                self._go_on(awaited)


@contextmanager
def passing(model: nn.Module) -> Iterator[Passing]:
    """What makes maps while the modules of a model run, for as long as the block lasts."""
    with ExitStack() as stack:
        yield Passing(stack, overhears=not any(isinstance(m, _WITH_A_FAST_PATH) for m in model.modules()))


def _put_on(mode: TorchFunctionMode) -> None:
    """Put a mode on this thread below all others, which may go before it; but a device, which insists on that place, stays."""
    above = []
    while (top := _top()) is not None and not isinstance(top, DeviceContext):
        above.append(_pop())
    for each in (mode, *reversed(above)):
        _push(each)


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
