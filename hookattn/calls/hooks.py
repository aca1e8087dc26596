"""Hooks that a recorder puts on somebody else's modules: a copy or a saved file of a module does not carry them along."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

from torch import nn

from ..conditions.compiled import is_traced


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


def same_objects(values: Sequence[Any], others: Sequence[Any]) -> bool:
    """Whether hooks have left the arguments of a call what they were."""
    return len(values) == len(others) and all(a is b for a, b in zip(values, others))


def another_pre_hook_follows(module: nn.Module, ours: Hook | None) -> bool:
    """Whether somebody put a forward-pre-hook on after ours, which may change x once we have seen it."""
    hooks = list(module._forward_pre_hooks.values())
    while hooks and (last := hooks.pop()) is not ours:
        if not is_ours(last):
            return True
    return False
