"""Other maps in place of a module's own, in the real forward: knock out a head or an edge and see the logits move."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from threading import RLock
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from ..calls.call import Call, capture, recaptured
from ..calls.hooks import Args, Around, Kwargs
from ..calls.layer import look_up
from ..conditions.checkpoints import checkpoint_around, fingerprint, in_backward
from ..conditions.compiled import COMPILED
from ..conditions.modules import walk
from ..conditions.threads import Here
from ..errors import LayerNotFoundError
from ..maps.reading import source_of
from ..maps.replay import run_with_map
from .selection import Layer, choose

Edit = Callable[[Tensor], Tensor]


class Edits:
    """The edits that a recorder has opened; their hooks stay on until it closes, for checkpoints that backward runs again."""

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
        with ExitStack() as stack, COMPILED:  # which runs eagerly: graphs put out what they always do
            for layer, edit in edits.items():
                for name in self._named(layer, recorded):
                    module = modules[name]
                    if module not in self._modules:
                        self._held.enter_context(_held(name, module))
                        self._modules.add(module)
                    else:
                        edit_before_others(module)
                    stack.enter_context(_ON[module].with_one_more(edit))
            yield

    def close(self) -> None:
        """Take the hooks off, unless another recorder edits the module too."""
        self._modules.clear()
        self._held.close()

    def _named(self, layer: Layer, recorded: list[str]) -> list[str]:
        if not isinstance(layer, int) or isinstance(layer, bool):
            return list(choose(walk(self._model), layer).readable)
        if not -len(recorded) <= layer < len(recorded):
            raise LayerNotFoundError(f"there is no layer {layer} to edit: {len(recorded)} are recorded.")
        return [recorded[layer]]


@contextmanager
def _held(name: str, module: nn.Module) -> Iterator[None]:
    """Hold the pair of hooks that edits a module, which is put on by the first who asks and taken off with the last."""
    # one pair for all recorders: each pair would replace what the one before has made, and edits could not follow each other
    with _CHANGING:
        if (editing := _ON.get(module)) is None:
            editing = _ON[module] = _Editing(name, module)
            editing.hook()
        else:
            editing.come_closest()
        editing.holders += 1
    try:
        yield
    finally:
        with _CHANGING:
            editing.holders -= 1
            if editing.holders == 0:
                _ON.pop(module).close()


def edit_before_others(module: nn.Module) -> None:
    """Have the hooks that edit a module run before those that were put on just now, which then see its edited output."""
    # Forward hooks are called in order, each with what the one before has returned.
    with _CHANGING:
        if (editing := _ON.get(module)) is not None:
            editing.come_closest()


def is_edited(module: nn.Module) -> bool:
    """Whether a forward of this module that runs now, in this thread and task, is edited."""
    editing = _ON.get(module)
    return editing is not None and bool(editing.edits_here())


class _Editing(Around):
    """The hooks that edit one module: one keeps what it is called with, one replaces its output.

    Each edit is for the forwards of the thread and task that opened it, and for what checkpoints run again of them.
    """

    def __init__(self, name: str, module: nn.Module) -> None:
        super().__init__(module)
        self.holders = 0
        self._name = name
        self._open: dict[object, tuple[Edit, Here]] = {}  # each put in and taken out in one step, for other threads
        # what was done in a forward, for when backward makes it again, be it in another thread or after the edit has closed
        self._in_checkpoints: WeakKeyDictionary[Any, dict[bytes, list[Edit]]] = WeakKeyDictionary()

    @contextmanager
    def with_one_more(self, edit: Edit) -> Iterator[None]:
        """Edit the module in one more way, for as long as the block lasts."""
        key = object()
        self._open[key] = (edit, Here())
        try:
            yield
        finally:
            del self._open[key]

    def edits_here(self) -> list[Edit]:
        """The edits that are open in this thread and task."""
        return [edit for edit, is_here in list(self._open.values()) if is_here()]

    def begin(self, args: Args, kwargs: Kwargs) -> tuple[Call, list[Edit]] | None:
        """Keep what the module is called with, if it is to be edited."""
        edits = self.edits_here()
        checkpoint = checkpoint_around()
        if not edits and (checkpoint is None or checkpoint not in self._in_checkpoints):
            return None
        call = capture(look_up(self._name, self.module), args, kwargs, detach=False)
        if checkpoint is not None:
            edits = self._edits_in(checkpoint, fingerprint(call.tensors, checkpoint), edits)
        return (call, edits) if edits else None

    def end(self, state: tuple[Call, list[Edit]], args: Args, kwargs: Kwargs, changed: bool, output: Any) -> Any:
        """Run the module once more with the edited map, and put what it returns in place of its output."""
        if output is None:  # it raised
            return None
        call, edits = state
        if changed:
            call = recaptured(call, args, kwargs, detach=False)
        call = call.restamped()
        call.check_at_hand()
        with call.in_its_modes():  # whether it is stale is asked when the module runs once more
            attention = source_of(call).narrow().values()
        return run_with_map(call, self._edited(attention, edits))

    def has_failed(self, error: Exception, state: Any = None) -> Any:
        """What an edit raises is the user's to see: a forward without it would be another one than was asked for."""
        raise error

    def _edits_in(self, checkpoint: Any, call: bytes, edits: list[Edit]) -> list[Edit]:
        """Edits of a call in a checkpoint: noted in the forward, and the same ones when backward makes it again."""
        if in_backward():
            return self._in_checkpoints.get(checkpoint, {}).get(call, [])
        if edits:
            self._in_checkpoints.setdefault(checkpoint, {})[call] = edits
        return edits

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


# One for the process: recorders that edit the same module share its hooks, which go with the last of them.
_ON: dict[nn.Module, _Editing] = {}
_CHANGING = RLock()  # while it is looked up who edits a module, and hooks are put on, in order or off
