"""What the layers of a module put out while it runs, from which projections are taken instead of being computed twice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..conditions.setting import Setting


class AwaitedError(Exception):
    """Raised in a recipe where it needs a projection that the module, which is about to run, will make itself.

    The recipe is run again once the layer has been called.

    Attributes:
        layer: the layer that the module will call.
        x: what it will call it with.
    """

    def __init__(self, layer: nn.Module, x: Tensor) -> None:
        super().__init__(f"waits for {type(layer).__name__}")
        self.layer, self.x = layer, x


class Heard:
    """Outputs of the layers of a module since it was called, from which projections are taken instead of computed again."""

    def __init__(self, given: Sequence[Tensor]) -> None:
        self._given = given
        self._outputs: dict[tuple[nn.Module, int], Tensor] = {}
        self._awaits = True

    def note(self, layer: nn.Module, x: Any, output: Any) -> bool:
        """Note what a layer has put out, if it was called with something the module was; whether it was."""
        if (number := self._number_of(x)) is None or not isinstance(output, Tensor):
            return False
        self._outputs[layer, number] = output.detach()  # a map that is kept must not keep the graph
        return True

    def copy(self, layer: nn.Module, x: Tensor) -> None:
        """Have a copy of what a layer has put out, which is about to be written over."""
        if (number := self._number_of(x)) is not None and (layer, number) in self._outputs:
            self._outputs[layer, number] = self._outputs[layer, number].clone()

    def await_no_more(self) -> None:
        """From now on have what was not heard computed, instead of breaking off what needs it."""
        self._awaits = False

    def output(self, own: Own) -> Tensor | None:
        """The output a projection is part of, or AwaitedError; None if it is not of what the module was called with."""
        if (number := self._number_of(own.x)) is None:
            return None
        output = self._outputs.get((own.layer, number))
        if output is None and self._awaits:
            raise AwaitedError(own.layer, own.x)
        return output

    def _number_of(self, x: Any) -> int | None:
        if isinstance(x, Tensor):
            for number, t in enumerate(self._given):
                if x is t or is_same(x, t):
                    return number
        return None


# Set around a recipe, which knows nothing of it: `Projected.compute` looks here when something is computed with it.
heard_now: ContextVar[Heard | None] = ContextVar("heard", default=None)


def hearing(heard: Heard) -> Setting[Heard | None]:
    """Take projections from what was heard of a module's own layers, for as long as the block lasts."""
    return Setting(heard_now, heard)


class Own(NamedTuple):
    """The way a module makes a projection itself, by which it can be taken from what its layer puts out.

    Attributes:
        layer: the layer that it calls.
        x: what it calls it with.
        part: takes the projection from what the layer puts out.
    """

    layer: nn.Module
    x: Tensor
    part: Callable[[Tensor], Tensor]


def is_same(x: Tensor, other: Tensor) -> bool:
    """Whether two tensors show the same memory in the same way, as a tensor and itself detached do."""
    # Undocumented, torch 2.6 to 2.15: `data_ptr` is 0 or raises where there is no memory, which two tensors cannot share.
    if x.shape != other.shape or x.stride() != other.stride() or x.dtype != other.dtype:
        return False
    try:
        return x.data_ptr() == other.data_ptr() != 0
    except RuntimeError:
        return False
