"""What a recorder puts on somebody else's modules: a hook that is not copied with them, and pairs of them around a call."""

from __future__ import annotations

import sys
from collections.abc import Callable
from threading import RLock, get_ident
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..conditions.compiled import is_compiled, is_traced
from ..conditions.dispatch_modes import unseen_by_modes
from ..conditions.graphs import Given, LayerOutput, give_back, put_operator, ticket_for
from ..errors import RecorderError
from .copies import NotCopied
from .restore import reading

Args = tuple[Any, ...]
Kwargs = dict[str, Any]


class Hook(NotCopied):
    """A hook that recorders put on modules: calls `run`, but not while the module is compiled, exported or traced."""

    __slots__ = ("__weakref__", "module", "run", "takes", "ticket")

    def __init__(self, run: Callable[..., Any], takes: int = 3) -> None:
        self.run, self.takes = run, takes
        self.ticket: Tensor | None = None  # by which compiled graphs call it, if they do
        self.module: nn.Module | None = None  # where they do; not where a copy is called that shares the hooks

    def __call__(self, *given: Any) -> Any:
        # Undocumented, torch 2.6 to 2.15: which hooks take keyword arguments stands in a dict beside that of the hooks, and the
        # two are filled and emptied one after the other. Called in between, while another thread or a hook puts ours on or
        # takes it off, it is given fewer arguments.
        if is_traced() or len(given) != self.takes:
            if self.ticket is not None and is_compiled() and given[0] is self.module:
                put_operator(self.ticket, given[1], given[2])
            return None
        if not torch._C._len_torch_dispatch_stack():  # nearly always
            return self.run(*given)
        with unseen_by_modes():  # of a checkpoint that caches operators, of somebody who counts them
            return self.run(*given)

    def __getattr__(self, name: str) -> Any:
        """Called for what a hook does not have; its `__name__` is the first thing that torch.jit.script asks of it.

        Raises:
            RecorderError: that is who asks.
        """
        # Undocumented, torch 2.6 to 2.15: the hooks of a module are compiled with it, and that in this file.
        if name == "__name__" and sys._getframe(1).f_globals.get("__name__") == "torch.jit._recursive":
            raise RecorderError(
                "torch.jit.script compiles the hooks of a model with it, and those of a recorder are not made for that: script "
                "the model outside of the block, or inside it a copy, torch.jit.script(copy.deepcopy(model)), which has none."
            )
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}", name=name, obj=self)


def put_on(register: Callable[..., RemovableHandle], hook: Callable[..., Any], **options: Any) -> RemovableHandle:
    """Put a hook on, by a method such as `register_forward_hook`, while no other recorder does, in whichever thread."""
    # Undocumented, torch 2.6 to 2.15: hooks are counted by an attribute of a class, without a lock. Two that are put on at
    # once may get one number, and where that is on one module, one of them is gone.
    with _NUMBERING:
        return register(hook, **options)


_NUMBERING = RLock()


def is_ours(hook: Any) -> bool:
    """Whether a hook was put on by a recorder, this one or another."""
    return isinstance(hook, Hook)


def is_hooked_by_others(module: nn.Module) -> bool:
    """Whether somebody has put hooks on a module that run with its forward."""
    # Undocumented, torch 2.6 to 2.15: dicts of hooks by their keys.
    return any(not is_ours(hook) for hooks in (module._forward_pre_hooks, module._forward_hooks) for hook in hooks.values())


class Around:
    """A pair of hooks on one module, one before and one after its forward, with a state that the first hands to the second.

    What makes such a pair hard is handled here, once: copies of the module that share its hooks, readings that run it again,
    threads, modules that call themselves, calls that never end, and hooks of others that change the arguments after ours.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._handles: list[RemovableHandle] = []
        self._first: Hook | None = None
        self._last: Hook | None = None
        self._begins = -1
        self._ends: int | None = None
        # by thread, calls that run, the innermost last, each with its arguments by identity
        self._running: dict[int, list[tuple[Any, list[Any]]]] = {}

    def begin(self, args: Args, kwargs: Kwargs) -> Any:
        """Called before the forward. What is returned is handed to `end`; None for a call that is to end unnoticed."""
        raise NotImplementedError

    def end(self, state: Any, args: Args, kwargs: Kwargs, changed: bool, output: Any) -> Any:
        """Called when the forward has returned or raised. What is returned takes the place of the output, unless it is None.

        Args:
            state: what `begin` returned.
            args, kwargs: what the module received.
            changed: whether that is something else than `begin` was given.
            output: what it returned; None if it raised.
        """
        raise NotImplementedError

    def has_failed(self, error: Exception, state: Any = None) -> Any:
        """Something went wrong in `begin`, or in `end` of what it had returned: ours, so the user's forward goes on."""

    def hook(self, *, outermost: bool = False, ends: bool = True) -> None:
        """Put the hooks on.

        Args:
            outermost: whether they come before and after all that are on already, and not between them and the module.
            ends: False leaves the second hook off until `begin` has returned something for the first time.
        """
        self._first = Hook(self._begin)
        handle = put_on(self.module.register_forward_pre_hook, self._first, prepend=outermost, with_kwargs=True)
        # Undocumented, torch 2.6 to 2.15: the handle's `id` is the hook's key in `_forward_pre_hooks`, see `is_followed`.
        self._begins, self._ends = handle.id, None
        self._handles.append(handle)
        if ends:
            self._hook_end(prepend=not outermost)

    def join_graphs(self) -> None:
        """Let compiled graphs call the hooks, until they come off."""
        assert self._first is not None
        self._first.module, self._first.ticket = self.module, ticket_for(self.begin_in_graph, self.hear_in_graph)
        if self._last is not None:
            self._last.module, self._last.ticket = self.module, ticket_for(lambda _: self._end(self.module, (), {}, ...))

    def begin_in_graph(self, given: Given) -> None:
        """Called before the forward where a compiled graph calls the hook, which writes into the tensors later on."""
        try:
            args, kwargs = given.arguments()
        except Exception as error:
            self.has_failed(error)
        else:
            self._begin(self.module, args, kwargs)

    def hear_in_graph(self, output: LayerOutput) -> None:
        """Called where a graph has run a linear layer that it had told of, with what the module was called with."""

    def come_closest(self) -> None:
        """Come between the module and all hooks that others have put on since; without a moment at which ours are off."""
        if self._begins not in self.module._forward_pre_hooks:  # somebody has cleared the dicts
            self.close()
            self.hook()
            return
        # Undocumented, torch 2.6 to 2.15: ordered dicts by key of the hook, which PyTorch itself puts in order like this.
        self.module._forward_pre_hooks.move_to_end(self._begins)  # type: ignore[attr-defined]
        if self._ends in self.module._forward_hooks:
            self.module._forward_hooks.move_to_end(self._ends, last=False)  # type: ignore[attr-defined]

    def close(self) -> None:
        """Take the hooks off, and drop what calls that were interrupted have left."""
        while self._handles:
            self._handles.pop().remove()
        for hook in (self._first, self._last):
            if hook is not None and hook.ticket is not None:
                give_back(hook.ticket)
        self._first = self._last = self._ends = None
        self._running.clear()

    def is_followed(self) -> bool:
        """Whether somebody put a forward-pre-hook on after ours, which may change the arguments once we have seen them."""
        # Undocumented, torch 2.6 to 2.15: an ordered dict by key of the hook, in the order in which hooks are called.
        hooks = self.module._forward_pre_hooks
        for key in reversed(list(hooks)):  # a copy: another thread may put hooks on meanwhile
            if key == self._begins:
                return False
            if not is_ours(hooks.get(key)):
                return True
        return False

    def is_preceded(self) -> bool:
        """Whether somebody's forward hook comes before ours, which is then given what that one has made of the output."""
        hooks = self.module._forward_hooks
        for key in list(hooks):
            if key == self._ends:
                return False
            if not is_ours(hooks.get(key)):
                return True
        return False

    def _hook_end(self, *, prepend: bool) -> None:
        # Undocumented, torch 2.6 to 2.15: "always" is where an `Exception` ends the forward. Where a KeyboardInterrupt does, no
        # hook is called, and the next `_begin` has to clear up.
        self._last = Hook(self._end, takes=4)
        handle = put_on(self.module.register_forward_hook, self._last, prepend=prepend, with_kwargs=True, always_call=True)
        self._handles.append(handle)
        self._ends = handle.id

    def _begin(self, module: nn.Module, args: Args, kwargs: Kwargs) -> None:
        # Copies by copy.copy, and the replicas of DataParallel, share the module's dicts of hooks: ours are called with them.
        if module is not self.module or reading.get():
            return
        try:
            state = self.begin(args, kwargs)
        except Exception as error:
            state = self.has_failed(error)
        if state is None and self._ends is None:
            return
        # Undocumented, torch 2.6 to 2.15: which forward hooks to call is looked up after the forward, so one that is put on
        # now is called at the end of this very call.
        if self._ends is None:
            self._hook_end(prepend=True)
        calls = self._running.setdefault(get_ident(), [])
        if calls:  # of calls around this one, or of some that were interrupted, which only the stack can tell apart
            del calls[_depth(module) - 1 :]
        calls.append((state, [*args, *kwargs.values()]))

    def _end(self, module: nn.Module, args: Args, kwargs: Kwargs, output: Any) -> Any:
        if module is not self.module or reading.get() or not (calls := self._running.get(get_ident())):
            return None
        # Undocumented, torch 2.6 to 2.15: `always_call` includes calls in which a pre-hook of somebody else raised before ours
        # came. They never began here, and the last state is that of a call around them.
        if output is None and len(calls) < _depth(module):
            return None
        state, given = calls.pop()
        if state is None:
            return None
        received = [*args, *kwargs.values()]
        changed = len(received) != len(given) or any(a is not b for a, b in zip(received, given))
        try:
            return self.end(state, args, kwargs, changed, output)
        except Exception as error:
            return self.has_failed(error, state)


def _depth(module: nn.Module) -> int:
    """Count the calls of a module that run in this thread, one inside the other, by the frames on the stack."""
    frame: FrameType | None = sys._getframe(1)
    depth = 0
    while frame is not None:
        # Undocumented, torch 2.6 to 2.15: PyTorch calls hooks, and the forward, inside of this method.
        depth += frame.f_code is nn.Module._call_impl.__code__ and frame.f_locals.get("self") is module
        frame = frame.f_back
    return max(1, depth)
