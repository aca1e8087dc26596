"""What a recorder puts on somebody else's modules: a hook that copies do not carry along, and pairs of them around a call."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from threading import get_ident
from types import FrameType
from typing import Any

from torch import nn

from ..conditions.compiled import is_traced
from .restore import reading

Args = tuple[Any, ...]
Kwargs = dict[str, Any]


class Hook:
    """A hook on a module that is not there for a compiler, an export or a trace.

    Copied or pickled with its module it becomes a function of the standard library that does nothing.

    Args:
        run: what PyTorch is to call.
        takes: with how many arguments. It gives a hook fewer, without the keyword arguments, while another thread or another
            hook puts it on or takes it off.
    """

    __slots__ = ("__weakref__", "run", "takes")

    def __init__(self, run: Callable[..., Any], takes: int = 3) -> None:
        self.run, self.takes = run, takes

    def __call__(self, *given: Any) -> Any:
        return None if is_traced() or len(given) != self.takes else self.run(*given)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (nullcontext(), "__exit__")  # takes whatever it is given and returns None


def is_ours(hook: Any) -> bool:
    """Whether a hook is a recorder's."""
    return isinstance(hook, Hook)


class Around:
    """A pair of hooks on one module, and what the first hands to the second for the time of a call.

    What makes such a pair hard is handled here, once. Neither hook does anything in a copy of the module that shares its hooks,
    nor when the module runs again to be read. What is handed over stays in its thread, and belongs to the innermost call where
    a module calls itself. A call that was interrupted never ends: what it left is dropped when the next one begins. And the
    second hook gets the arguments that the module really received, with whether hooks that came after ours have changed them.

    Args:
        module: what the hooks are put on.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._hooks = ExitStack()
        self._begins, self._ends = -1, False
        self._running: dict[int, list[tuple[Any, list[Any]]]] = {}

    def begin(self, args: Args, kwargs: Kwargs) -> Any:
        """A call begins. What is returned is kept until it ends; None for a call that is to end unnoticed."""
        raise NotImplementedError

    def end(self, state: Any, args: Args, kwargs: Kwargs, changed: bool, output: Any) -> Any:
        """A call has ended. What is returned takes the place of the output, unless it is None.

        Args:
            state: what `begin` returned.
            args, kwargs: what the module received.
            changed: whether that is something else than `begin` was given.
            output: what it returned; None if it raised.
        """
        raise NotImplementedError

    def hook(self, *, outermost: bool = False, ends: bool = True) -> None:
        """Put the hooks on, or on again.

        Args:
            outermost: whether they come before and after all that are on already, and not between them and the module.
            ends: False leaves the second hook off until `begin` has returned something for the first time.
        """
        self._hooks.close()
        handle = self.module.register_forward_pre_hook(Hook(self._begin), prepend=outermost, with_kwargs=True)
        self._begins, self._ends = handle.id, False
        self._hooks.enter_context(handle)
        if ends:
            self._hook_end(prepend=not outermost)

    def close(self) -> None:
        """Take the hooks off, and drop what calls that never ended have left."""
        self._hooks.close()
        self._ends = False
        self._running.clear()

    def is_followed(self) -> bool:
        """Whether somebody put a forward-pre-hook on after ours, which may change the arguments once we have seen them."""
        hooks = self.module._forward_pre_hooks
        for key in reversed(list(hooks)):
            if key == self._begins:
                return False
            if not is_ours(hooks.get(key)):
                return True
        return False

    def _hook_end(self, *, prepend: bool) -> None:
        end = Hook(self._end, takes=4)
        self._hooks.enter_context(self.module.register_forward_hook(end, prepend=prepend, with_kwargs=True, always_call=True))
        self._ends = True

    def _begin(self, module: nn.Module, args: Args, kwargs: Kwargs) -> None:
        if module is not self.module or reading.get():
            return
        state = self.begin(args, kwargs)
        if state is None and not self._ends:
            return
        if not self._ends:
            self._hook_end(prepend=True)
        calls = self._running.setdefault(get_ident(), [])
        if calls:  # of a call around this one, or of one that was interrupted
            del calls[_depth(module) - 1 :]
        calls.append((state, [*args, *kwargs.values()]))

    def _end(self, module: nn.Module, args: Args, kwargs: Kwargs, output: Any) -> Any:
        if module is not self.module or reading.get() or not (calls := self._running.get(get_ident())):
            return None
        if output is None and len(calls) < _depth(module):  # a hook before ours raised, and this call never began
            return None
        state, given = calls.pop()
        if state is None:
            return None
        received = [*args, *kwargs.values()]
        changed = len(received) != len(given) or any(a is not b for a, b in zip(received, given))
        return self.end(state, args, kwargs, changed, output)


def _depth(module: nn.Module) -> int:
    """How many calls of a module run in this thread, one inside the other."""
    frame: FrameType | None = sys._getframe(1)
    depth = 0
    while frame is not None:
        # not documented: PyTorch calls hooks, and the forward, inside of this method, in all versions so far
        depth += frame.f_code is nn.Module._call_impl.__code__ and frame.f_locals.get("self") is module
        frame = frame.f_back
    return max(1, depth)
