"""Other maps in place of a module's own, in the real forward: knock out a head or an edge and see the logits move."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from threading import get_ident
from typing import Any

from torch import Tensor, nn

from .calls import Call, Target, as_received, capture, in_backward, is_reading, target
from .discovery import Layer, choose
from .hooks import Hook, same_objects
from .maps import source_of
from .replay import replaced
from .threads import Here

Edit = Callable[[Tensor], Tensor]


class Edits:
    """The edits of a recorder that are on: those of one module follow each other in the order they were opened.

    Args:
        model: whose maps are edited.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._on: dict[str, _Editing] = {}

    @contextmanager
    def open(self, edits: Mapping[Layer, Edit]) -> Iterator[None]:
        """Put edited maps in place of modules' own; see `AttentionRecorder.edit`.

        Raises:
            LayerNotFoundError, UnreadableError: an edit is meant for a layer that is not there, or that forms no map.
        """
        modules = {name or type(self._model).__name__: module for name, module in self._model.named_modules()}
        with ExitStack() as stack:
            for layer, edit in edits.items():
                for name in choose(self._model, layer).readable:
                    if name not in self._on:
                        self._on[name] = _Editing(target(name, modules[name]))
                    stack.enter_context(self._on[name].with_one_more(edit))
            yield


class _Editing:
    """The hooks of one module: one that keeps what it is called with, one that replaces its output.

    Forwards of other threads and tasks are let through as they are.
    """

    def __init__(self, chosen: Target) -> None:
        self._target = chosen
        self._here = Here()
        self._edits: list[Edit] = []
        self._hooks = ExitStack()
        self._running: dict[int, tuple[Call, list[Any]]] = {}

    @contextmanager
    def with_one_more(self, edit: Edit) -> Iterator[None]:
        """The hooks are on as long as there is an edit."""
        module = self._target.module
        if not self._edits:
            self._target, self._here = target(self._target.name, module), Here()  # as it is now
            self._hooks.enter_context(module.register_forward_pre_hook(Hook(self._begin), with_kwargs=True))
            self._hooks.enter_context(module.register_forward_hook(Hook(self._end, takes=4), prepend=True, with_kwargs=True))
        self._edits.append(edit)
        try:
            yield
        finally:
            del self._edits[self._edits.index(edit)]
            if not self._edits:
                self._hooks.close()

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module is self._target.module and not is_reading() and (self._here() or in_backward()):
            self._running[get_ident()] = capture(self._target, args, kwargs, detach=False), [*args, *kwargs.values()]

    def _end(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if is_reading() or module is not self._target.module or get_ident() not in self._running:
            return None
        call, seen = self._running.pop(get_ident())
        if not same_objects([*args, *kwargs.values()], seen):  # a hook that came after ours
            call = as_received(call, args, kwargs, detach=False)
        with call.resumed():
            attention = source_of(call).narrow().probabilities()
        return replaced(call, self._edited(attention))

    def _edited(self, attention: Tensor) -> Tensor:
        edited = attention.clone()  # what is written into is not what autograd has saved
        for edit in self._edits:
            edited = edit(edited)
            if not isinstance(edited, Tensor) or edited.shape != attention.shape:
                got = f"one of shape {tuple(edited.shape)}" if isinstance(edited, Tensor) else type(edited).__name__
                raise ValueError(
                    f"the edit of {self._target.name!r} returned no map of shape {tuple(attention.shape)} but {got}: take the "
                    "map, change it, and return it."
                )
        return edited.to(attention)
