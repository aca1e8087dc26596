"""What runs while a mode of torch looks on: the functions that are called, and the operators below them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from itertools import accumulate
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

See = Callable[[Any, Any, Any, Any], Any]


class Functions(TorchFunctionMode):
    """Shows `see(func, out, args, kwargs)` each function of torch and what it puts out; what `see` returns takes its place."""

    def __init__(self, see: See) -> None:
        super().__init__()
        self.see = see

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        instead = self.see(func, out, args, kwargs or {})
        return out if instead is None else instead


@contextmanager
def hooks_in_sight() -> Iterator[None]:
    """Let dispatch modes see what hooks of a recorder run, from which they hide."""
    with mock.patch("hookattn.conditions.dispatch_modes._disable_current_modes", nullcontext):
        yield


class Operators(TorchDispatchMode):
    """Shows `see(func, out, args, kwargs)` each operator of torch and what it puts out, those of a recorder's hooks too."""

    def __init__(self, see: See) -> None:
        super().__init__()
        self.see = see
        self.on = ExitStack()

    def __enter__(self) -> Any:
        self.on.enter_context(hooks_in_sight())
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.on.close()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.see(func, out, args, kwargs or {})
        return out


class Largest(Operators):
    """How many elements the largest piece of memory has that comes into being."""

    def __init__(self) -> None:
        super().__init__(self.measure)
        self.elements = 0

    def measure(self, func: Any, out: Any, args: Any, kwargs: Any) -> None:
        there = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in there:  # and is no view
                self.elements = max(self.elements, t.untyped_storage().nbytes() // t.element_size())


def operators_of(run: Callable[[], Any]) -> list[str]:
    """The operators that are called while something runs, in order."""
    names: list[str] = []
    with Operators(lambda func, *_: names.append(str(func))):
        run()
    return names


def peak_of(run: Callable[[], Any]) -> int:
    """Bytes that are allocated at the same time while something runs, above what was before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True) as p:
        run()
    events = [e for e in p.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))


def operations_of(run: Callable[[], Any]) -> int:
    """Multiplications and additions of products, as PyTorch's counter has them, whose hooks would be hooks of others here."""
    counts: list[int] = []

    def count(func: Any, out: Any, args: Any, kwargs: Any) -> None:
        if func.overloadpacket in flop_registry:
            counts.append(flop_registry[func.overloadpacket](*args, **kwargs, out_val=out))

    with Operators(count):
        run()
    return sum(counts)


class KernelCalls(Functions):
    """Keeps the queries and keys that `scaled_dot_product_attention` is called with."""

    def __init__(self) -> None:
        super().__init__(self.note)
        self.seen: list[tuple[Tensor, Tensor]] = []

    def note(self, func: Any, out: Any, args: Any, kwargs: Any) -> None:
        if func is F.scaled_dot_product_attention:
            self.seen.append((args[0], args[1]))
