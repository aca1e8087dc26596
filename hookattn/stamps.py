"""What tells that a tensor has changed: its version, where it lies, the steps of optimizers on it, some of its values."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

SAMPLES = 4096


class Steps:
    """How often optimizers have stepped on each tensor, counted for as long as somebody holds this object.

    A fused optimizer writes into parameters without counting a version.

    Attributes:
        taken: steps by the address of a parameter. An address that is used again for another tensor starts with the count
            of the one before, so only a difference tells anything.
    """

    def __init__(self) -> None:
        self.taken: dict[int, int] = {}
        taken = self.taken

        def count(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        at = _address(parameter) or id(parameter)
                        taken[at] = taken.get(at, 0) + 1

        weakref.finalize(self, register_optimizer_step_post_hook(count).remove)


_current: weakref.ref[Steps] | None = None


def counted_steps() -> Steps:
    """The count that is kept now; it begins with the first who asks and ends with the last who holds it."""
    global _current
    found = None if _current is None else _current()
    if found is None:
        found = Steps()
        _current = weakref.ref(found)
    return found


def stamps(tensors: list[Tensor], steps: Steps) -> list[tuple[int, int, int]]:
    """What changes when a tensor is written to, moved or stepped on."""
    taken = steps.taken
    try:
        return [(t._version, (at := t.data_ptr()), taken.get(at or id(t), 0)) for t in tensors]
    except RuntimeError:  # an inference tensor counts no versions, a fake or wrapped one has no address
        return [_stamp(t, steps) for t in tensors]


def stamp_of_argument(tensor: Tensor, steps: Steps) -> tuple[Any, ...]:
    """The same of an argument; inference tensors count no versions, so up to 4096 of their values are kept and compared."""
    if not tensor.is_inference() or tensor.device.type == "meta" or tensor.is_nested:
        return _stamp(tensor, steps)
    values = tensor.reshape(-1)
    return (Values(values[:: max(1, values.numel() // SAMPLES)].clone()), *_stamp(tensor, steps))


def _stamp(tensor: Tensor, steps: Steps) -> tuple[int, int, int]:
    """The stamp of one tensor of any kind; an inference tensor tells of moves alone."""
    at = _address(tensor)
    return -1 if tensor.is_inference() else tensor._version, at, steps.taken.get(at or id(tensor), 0)


def _address(tensor: Tensor) -> int:
    try:
        return tensor.data_ptr()
    except RuntimeError:  # a tensor without storage: fake, functional or a wrapper
        return 0


class Values:
    """Values of tensors that compare equal when all are, NaN with NaN."""

    def __init__(self, *values: Tensor) -> None:
        self.values = values

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Values) and all(
            torch.equal(a, b) or bool(((a == b) | (a.isnan() & b.isnan())).all()) for a, b in zip(self.values, other.values)
        )

    __hash__ = object.__hash__
