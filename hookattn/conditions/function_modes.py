"""Function modes of the user's: in force when a module was called, they are in force again when the call is read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import overrides
from torch.overrides import TorchFunctionMode
from torch.utils._device import DeviceContext

SDPA = F.scaled_dot_product_attention

# Undocumented, torch 2.6 to 2.15: the stack of modes of a thread. `with mode` puts one on top only, to be taken off in turn.
_push: Callable[[TorchFunctionMode], None] = overrides._push_mode
_pop: Callable[[], TorchFunctionMode] = overrides._pop_mode
_top: Callable[[], TorchFunctionMode | None] = overrides._get_current_function_mode


class OwnMode(TorchFunctionMode):
    """A mode of ours, which changes nothing of what the user's see.

    Attributes:
        over: it was taken off, in another thread than it is on: it lies there, does nothing and goes with the next of ours.
    """

    over = False


def modes_in_force() -> tuple[TorchFunctionMode, ...]:
    """The user's modes that are on in this thread, the outermost first; a default device is left out."""
    if not torch._C._len_torch_function_stack():  # nearly always, and asked at each call
        return ()
    stack: list[TorchFunctionMode] = overrides._get_current_function_mode_stack()  # type: ignore[no-untyped-call]
    return tuple([mode for mode in stack if not isinstance(mode, (OwnMode, DeviceContext))])


@contextmanager
def modes_resumed(modes: tuple[TorchFunctionMode, ...]) -> Iterator[None]:
    """Have these modes of the user's on and no others, for as long as the block lasts."""
    if modes_in_force() == modes:
        yield
        return
    stack = _take_all_off()
    ours = [mode for mode in stack if isinstance(mode, (OwnMode, DeviceContext))]
    try:
        _put_all_on([*ours, *modes])
        yield
    finally:
        _take_all_off()
        _put_all_on(stack)


def put_below_others(mode: OwnMode) -> None:
    """Put a mode on this thread below all others, which may be taken off before it; above a device alone."""
    # Undocumented, torch 2.6 to 2.15: `with torch.device(...)` and set_default_device are a mode that puts itself lowest, and
    # fails on leaving if it is not.
    mode.over = False
    stack = [each for each in _take_all_off() if not (isinstance(each, OwnMode) and each.over)]
    devices = [each for each in stack if isinstance(each, DeviceContext)]
    _put_all_on([*devices, mode, *[each for each in stack if each not in devices]])


@contextmanager
def lowest(mode: OwnMode) -> Iterator[None]:
    """Have a mode on that sees what the user's modes have made of a call, for as long as the block lasts."""
    put_below_others(mode)
    try:
        yield
    finally:
        take_off(mode)


def take_off(mode: OwnMode) -> None:
    """Take a mode off this thread, wherever it stands among others; a device may have been put below it since."""
    mode.over = True  # no thread can reach the stack of another, where a recorder that is closed elsewhere has put it
    _put_all_on([each for each in _take_all_off() if each is not mode])


def _take_all_off() -> list[TorchFunctionMode]:
    """Empty the stack of this thread, the outermost mode first."""
    found = []
    while _top() is not None:
        found.append(_pop())
    return found[::-1]


def _put_all_on(modes: list[TorchFunctionMode]) -> None:
    for mode in modes:
        _push(mode)
