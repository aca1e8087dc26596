"""What functions of PyTorch show of a forward that is taken down: softmaxes, factors of products, and the steps they are."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ...conditions.function_modes import OwnMode
from ..arrangement import Part
from ..formed import Fused, Softmaxed
from ..intercept import scores_and_axis, sdpa_arguments
from ..sites import Following, tensors_in

SOFTMAX = (torch.ops.aten._softmax.default, torch.ops.aten._safe_softmax.default)
_DROPOUT = {f for space in (torch, F) for name, f in vars(space).items() if "dropout" in name and callable(f)}


def first_line(error: Exception) -> str:
    """An error of somebody else's in a few words."""
    return f"{type(error).__name__}: {error}".partition("\n")[0][:250]


class Functions(OwnMode):
    """Looks into each function of PyTorch that a forward calls, dropout left out.

    Between the functions no dispatch mode is on, so that a forward can make tensor subclasses.

    Args:
        operations: the mode that they run under.
        in_full: what tensors are handed to them as.
    """

    def __init__(self, operations: TorchDispatchMode, in_full: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._operations, self._in_full = operations, in_full

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _DROPOUT:
            return args[0] if args else kwargs["input"]
        if func is F.scaled_dot_product_attention:
            args, kwargs = (), {**sdpa_arguments(args, kwargs), "dropout_p": 0.0}
        # such as a bias beside what is float32 by now, which convolutions compare before any operation of theirs
        args, kwargs = pytree.tree_map_only(Tensor, self._in_full, (args, kwargs))
        with self._operations:
            return func(*args, **kwargs)


class Seen(Following):
    """What of a forward functions of PyTorch show: softmaxes with the steps they are made of, and factors of products."""

    def __init__(self, steps: list[Any], *, as_called: bool) -> None:
        super().__init__(as_called=as_called)
        self._steps = steps
        self._spans: list[range] = []
        self._out: list[Tensor | None] = []
        self._factors_of: list[tuple[range, list[tuple[Tensor, int]]]] = []

    def fused(self, run: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Note which steps of the tape it is."""
        return self._note(Fused(**sdpa_arguments(args, kwargs)), lambda: run(*args, **kwargs))

    def softmax(self, run: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Note which steps of the tape it is, and what comes out."""
        out = self._note(Softmaxed(*scores_and_axis(*args, **kwargs)), lambda: run(*args, **kwargs))
        self._out[-1] = out.clone()  # the forward may write into it
        return out

    def multiply(self, run: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Note its factors."""
        first, factors = len(self._steps), [(t, _version_of(t)) for t in tensors_in((args, kwargs))]
        out = run(*args, **kwargs)
        self._factors_of.append((range(first, len(self._steps)), factors))
        return out

    def rows_of_softmaxes(self, of: Callable[[Any], Tensor]) -> Iterator[tuple[Part, Tensor, int]]:
        """Where rows stand in each softmax, the rows, and the step of the tape that has made them; `of` opens its slots."""
        for number, (site, span, out) in enumerate(zip(self.softmaxes, self._spans, self._out)):
            made = [n for n in span if self._steps[n].func in SOFTMAX]
            if made:
                part, p = site.part(number), of(self._steps[made[-1]].outs[0]) if out is None else out
                yield part, part.as_rows(p.reshape(part.shape)), made[-1]

    def factors_of(self, steps: Collection[int]) -> Iterator[tuple[int, int, Tensor]]:
        """Of the multiplications that are some steps: the number, which factor, and the factor, if it is still as it was."""
        for number, (span, factors) in enumerate(self._factors_of):
            if any(step in span for step in steps):
                yield from ((number, n, t) for n, (t, version) in enumerate(factors) if _version_of(t) == version)

    def _note(self, site: Fused | Softmaxed, run: Callable[[], Any]) -> Any:
        first = len(self._steps)
        out = run()
        self.softmaxes.append(site)
        self._spans.append(range(first, len(self._steps)))
        self._out.append(None)
        return out


def _version_of(t: Tensor) -> int:
    return -1 if t.is_inference() else t._version  # those made in inference mode, parameters here, count none
