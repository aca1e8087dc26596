"""Other maps in place of a module's own, in the real forward: knock out a head or an edge and see the logits move."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from threading import get_ident
from typing import Any

from torch import Tensor, nn

from ..calls.call import Call, capture, recaptured
from ..calls.hooks import Hook, same_objects
from ..calls.layer import target
from ..calls.restore import is_reading
from ..conditions.checkpoints import checkpoint_around, fingerprint, in_backward
from ..conditions.threads import Here
from ..errors import LayerNotFoundError
from ..maps.reading import source_of
from ..maps.replay import replaced
from .selection import Layer, choose

Edit = Callable[[Tensor], Tensor]


class Edits:
    """The edits that a recorder has opened. Their hooks stay on until it closes, for checkpoints that backward runs again.

    Args:
        model: whose maps are edited.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._held = ExitStack()
        self._modules: set[nn.Module] = set()

    @contextmanager
    def open(self, edits: Mapping[Layer, Edit], recorded: list[str]) -> Iterator[None]:
        """Put edited maps in place of modules' own; see `AttentionRecorder.edit`.

        Args:
            edits: by layer.
            recorded: what positions count.

        Raises:
            LayerNotFoundError, UnreadableError: an edit is meant for a layer that is not there, or that forms no map.
        """
        modules = {name or type(self._model).__name__: module for name, module in self._model.named_modules()}
        with ExitStack() as stack:
            for layer, edit in edits.items():
                for name in self._named(layer, recorded):
                    module = modules[name]
                    if module not in self._modules:
                        self._held.enter_context(_held(name, module))
                        self._modules.add(module)
                    stack.enter_context(_ON[module].with_one_more(edit))
            yield

    def close(self) -> None:
        """Take the hooks off, unless another recorder edits the module too."""
        self._modules.clear()
        self._held.close()

    def _named(self, layer: Layer, recorded: list[str]) -> list[str]:
        if not isinstance(layer, int) or isinstance(layer, bool):
            return list(choose(self._model, layer).readable)
        if not -len(recorded) <= layer < len(recorded):
            raise LayerNotFoundError(f"there is no layer {layer} to edit: {len(recorded)} are recorded.")
        return [recorded[layer]]


@contextmanager
def _held(name: str, module: nn.Module) -> Iterator[None]:
    """A module has one pair of hooks, whoever edits it."""
    editing = _ON.setdefault(module, _Editing(name, module))
    editing.holders += 1
    editing.hook()
    try:
        yield
    finally:
        editing.holders -= 1
        if editing.holders == 0:
            _ON.pop(module).hooks.close()


def rehook_before_others(module: nn.Module) -> None:
    """What hooks that were put on just now see of a module is its edited output."""
    if (editing := _ON.get(module)) is not None:
        editing.hook()


class _Editing:
    """The hooks of one module: one that keeps what it is called with, one that replaces its output.

    Each edit is for the forwards of the thread and task that opened it, and for what checkpoints run again of them.
    """

    def __init__(self, name: str, module: nn.Module) -> None:
        self.holders, self.hooks = 0, ExitStack()
        self._name, self._module = name, module
        self._open: list[tuple[Edit, Here]] = []
        self._running: dict[int, tuple[Call, list[Any], list[Edit]]] = {}
        self._in_checkpoints: dict[bytes, list[Edit]] = {}

    def hook(self) -> None:
        """Put the hooks on, or on again: the one at the end before those of others."""
        self.hooks.close()
        self.hooks.enter_context(self._module.register_forward_pre_hook(Hook(self._begin), with_kwargs=True))
        self.hooks.enter_context(self._module.register_forward_hook(Hook(self._end, takes=4), prepend=True, with_kwargs=True))

    @contextmanager
    def with_one_more(self, edit: Edit) -> Iterator[None]:
        opened = (edit, Here())
        self._open.append(opened)
        try:
            yield
        finally:
            self._open = [each for each in self._open if each is not opened]

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if is_reading() or module is not self._module:
            return
        self._running.pop(get_ident(), None)  # of a forward that raised
        edits = [edit for edit, is_here in self._open if is_here()]
        checkpoint = checkpoint_around()
        if not edits and checkpoint is None:
            return
        call = capture(target(self._name, module), args, kwargs, detach=False)
        if checkpoint is not None and in_backward():
            edits = self._in_checkpoints.get(fingerprint(call.tensors, checkpoint), [])
        elif checkpoint is not None and edits:
            self._in_checkpoints[fingerprint(call.tensors, checkpoint)] = edits
        elif checkpoint is not None:
            self._in_checkpoints.pop(fingerprint(call.tensors, checkpoint), None)  # of a checkpoint that had the same number
        if edits:
            self._running[get_ident()] = call, [*args, *kwargs.values()], edits

    def _end(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if is_reading() or module is not self._module or get_ident() not in self._running:
            return None
        call, given, edits = self._running.pop(get_ident())
        if not same_objects([*args, *kwargs.values()], given):  # a hook that came after ours
            call = recaptured(call, args, kwargs, detach=False)
        call = call.renewed()
        with call.resumed():
            attention = source_of(call).narrow().values()
        return replaced(call, self._edited(attention, edits))

    def _edited(self, attention: Tensor, edits: list[Edit]) -> Tensor:
        edited = attention.clone()  # what is written into is not what autograd has saved
        for edit in edits:
            edited = edit(edited)
            if not isinstance(edited, Tensor) or edited.shape != attention.shape:
                got = f"one of shape {tuple(edited.shape)}" if isinstance(edited, Tensor) else type(edited).__name__
                raise ValueError(
                    f"the edit of {self._name!r} returned no map of shape {tuple(attention.shape)} but {got}: take the map, "
                    "change it, and return it."
                )
        return edited.to(attention)


_ON: dict[nn.Module, _Editing] = {}
