"""Copies of a module made while a recorder's hooks are on it, by `copy.deepcopy`, `pickle` or `torch.save`: they have none."""

from __future__ import annotations

import copy
import copyreg
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from operator import getitem
from typing import Any

from torch import nn

from ..conditions.modules import walk

# Undocumented, torch 2.6 to 2.15: dicts of a module by the number of a hook, first the one that holds the hooks. The others say
# how hooks are called, and what was left there would be said of whichever hook gets the same number in another process.
_HOOKS = (
    ("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"),
)
_lock = threading.RLock()  # the garbage collector may close a recorder while this thread holds it
_counts: Counter[type[nn.Module]] = Counter()


class NotCopied:
    """Base of hooks that copies of a module are made without, inside of `copied_without_hooks`."""

    __slots__ = ()

    def __reduce__(self) -> tuple[Any, ...]:
        # What is in a copy until it is taken out, and stays where a class copies itself in a way of its own: it takes whatever
        # it is given and returns None, holds nothing of the recorder and loads without hookattn.
        return getattr, (nullcontext(), "__exit__")


@contextmanager
def copied_without_hooks(module: nn.Module) -> Iterator[None]:
    """Have a module and all below it copied and pickled without hooks that are `NotCopied`, for as long as the block lasts."""
    # in the table that copy and pickle look into for a class; one that somebody else has put there stays
    classes = {*map(type, walk(module).values())}
    with _lock:
        ours = {cls for cls in classes if copyreg.dispatch_table.setdefault(cls, _reduce) is _reduce}
        _counts.update(ours)
    try:
        yield
    finally:
        with _lock:
            _counts.subtract(ours)
            for cls in [cls for cls in ours if not _counts[cls]]:
                del _counts[cls]
                if copyreg.dispatch_table.get(cls) is _reduce:
                    del copyreg.dispatch_table[cls]


class _Called:
    """Copied, and loaded from a file, as what a function returns then; the file needs nothing but that function."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.reduced = function, args

    def __reduce__(self) -> tuple[Any, ...]:
        return self.reduced


def _reduce(module: nn.Module) -> tuple[Any, ...]:
    """What copy and pickle make a copy of a module from: what it says itself, without our hooks in its state."""
    reduced = module.__reduce_ex__(4)
    # A shallow copy shares the dicts of hooks with its original; `Around` handles that.
    if sys._getframe(1).f_code is copy.copy.__code__ or type(reduced) is not tuple or len(reduced) < 3:
        return reduced  # type: ignore[return-value]
    make, args, state, *rest = reduced
    if type(state) is not dict or not state.keys() >= {name for names in _HOOKS for name in names}:
        return reduced
    state = {**state}
    for names in _HOOKS:
        if state[names[0]] and all(isinstance(hook, NotCopied) for hook in list(state[names[0]].values())):
            state.update({name: type(state[name])() for name in names})
        elif ours := [number for number, hook in list(state[names[0]].items()) if isinstance(hook, NotCopied)]:
            state.update({name: _without(state[name], ours) for name in names})
    return make, args, state, *rest


def _without(held: dict[int, Any], numbers: list[int]) -> _Called:
    """A dict that is copied as the very one that handles of others' hooks refer to, and then has numbers taken out."""
    pops = [_Called(type(held).pop, held, number, None) for number in numbers]
    return _Called(getitem, (held, *pops), 0)  # a tuple, since its elements are copied and loaded in order
