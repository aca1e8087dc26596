"""Which call of a model is on the stack, told by its frame: PyTorch calls no hook where a KeyboardInterrupt ends a forward."""

from __future__ import annotations

import inspect
import sys
import weakref
from collections.abc import Callable
from types import CodeType, FrameType, FunctionType
from typing import Any

from torch import nn
from torch.nn.modules import module as nn_module


class Running:
    """Tells whether a call is still running, by its frame: true for as long as that is on the stack of whoever asks.

    Args:
        frame: the frame.
        held: whether to hold on to the frame, where the end of its call is announced. Otherwise it is marked, and the mark
            lives as long as the call does, unless a debugger takes it away: a reference to the frame would keep its variables
            alive.
    """

    def __init__(self, frame: FrameType, *, held: bool) -> None:
        self._frame = frame if held else None
        self._mark: Callable[[], object] | None = None
        # Python has no weak references to frames. `f_trace` is the one attribute of a frame that can be set; Python looks at
        # it only where a debugger is on in the thread, whose own is left there.
        if not held and frame.f_trace is None:
            frame.f_trace = _Mark()
        if not held and isinstance(frame.f_trace, _Mark):
            self._mark = weakref.ref(frame.f_trace)
        elif not held:  # where a debugger is, which holds on to frames itself
            self._frame = frame
        # how many frames above the one that asked last: the next layer is called from as deep, and no stack is walked for it
        self._above = 1

    def __bool__(self) -> bool:
        try:
            likely = sys._getframe(self._above)
        except ValueError:  # the stack is not that deep
            likely = sys._getframe(1)
        if self._frame is likely:
            return True
        mark = self._frame if self._mark is None else self._mark()
        if mark is None:
            return False
        if mark is likely.f_trace:
            return True
        frame, above = sys._getframe(1), 1  # not our own frame, which would hold itself
        while mark is not frame and mark is not frame.f_trace:
            if frame.f_back is None:
                return False
            frame, above = frame.f_back, above + 1
        self._above = above
        return True


_OURS = __package__.partition(".")[0]  # hookattn
_CALLERS = vars(nn_module)


class _Mark:
    """Lies in `f_trace` of a frame, and so lives as long as its call."""

    def __call__(self, *_: Any) -> None:
        """Do nothing: a debugger that is switched on while the call runs takes it for a trace function, and calls it."""


def caller_of_hook(module: nn.Module) -> FrameType:
    """The frame of PyTorch's that called a hook of a module, which we are in, and is there until the module has run.

    Where a compiled graph has taken the place of that call, the frame outside of PyTorch that called the graph.
    """
    # Undocumented, torch 2.6 to 2.15: hooks and the forward are called from one frame (`inner` in `Module._call_impl`). A graph
    # may be a module itself, with such frames of its own.
    frame, outside = sys._getframe(1), None
    while frame.f_globals is not _CALLERS or frame.f_locals.get("self") is not module:
        if outside is None and not str(frame.f_globals.get("__name__", "torch")).startswith((_OURS, "torch")):
            outside = frame
        if frame.f_back is None:
            return outside or frame
        frame = frame.f_back
    return frame


def code_of_methods(model: nn.Module) -> set[CodeType]:
    """Code of all methods that the model's classes define, by which a call of one is known on the stack.

    PyTorch's own are left out: `Module._call_impl` or `nn.Sequential.forward` runs in every model.
    """
    theirs = [cls for cls in type(model).__mro__ if not cls.__module__.startswith(("torch.", "builtins"))]
    own = (value for cls in theirs for value in vars(cls).values())
    # unwrapped: of a method under @torch.no_grad() or @torch.compile, what runs on the stack as the method is the inner one
    return {inspect.unwrap(value).__code__ for value in own if isinstance(value, FunctionType)}
