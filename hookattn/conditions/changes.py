"""What tells that a tensor has changed: its version, where it lies, the steps of optimizers on it, some of its values."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

SAMPLES = 4096
_FEW = 16
_AT_HAND = ("cpu",)  # where values are read without waiting for anything
_BITS = {torch.float64: torch.int64, torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}


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


def stamps(tensors: Sequence[Tensor], steps: Steps) -> list[tuple[int, int, int]]:
    """What changes when a tensor is written to, moved or stepped on."""
    try:
        return _quick_stamps(tensors, steps.taken)
    except RuntimeError:
        return [_stamp(t, steps) for t in tensors]


def stamps_of_arguments(tensors: Sequence[Tensor], steps: Steps) -> list[tuple[Any, ...]]:
    """The same of arguments; inference tensors count no versions, so up to 4096 of their values are kept and compared."""
    try:
        return [*_quick_stamps(tensors, steps.taken)]
    except RuntimeError:
        return [(_many_values(t), *_stamp(t, steps)) for t in tensors]


def _quick_stamps(tensors: Sequence[Tensor], taken: dict[int, int]) -> list[tuple[int, int, int]]:
    """An inference tensor raises, since it counts no versions, and a fake or wrapped one, since it has no address."""
    if not taken:
        return [(t._version, t.data_ptr(), 0) for t in tensors]
    return [(t._version, (at := t.data_ptr()), taken.get(at or id(t), 0)) for t in tensors]


def _many_values(tensor: Tensor) -> Values | None:
    if not tensor.is_inference() or tensor.device.type == "meta" or tensor.is_nested:
        return None
    values = tensor.reshape(-1)
    return Values(values[:: max(1, values.numel() // SAMPLES)].clone())


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


class Samples:
    """Some values of each parameter, which tell of writes that count no version: through `.data`, or by a CUDA graph.

    They are bits of the parameters themselves, so that NaN equals NaN. On the CPU they are read without an operator and kept as
    numbers; on other devices one kernel for all values of a size puts them side by side, and nobody waits for it.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self._of = [p for p in parameters if type(p) is nn.Parameter]
        self._look_up()

    def _look_up(self) -> None:
        """Find where the values lie."""
        self._parameters = [p for p in self._of if p.dtype in _BITS and p.device.type != "meta" and p.is_contiguous()]
        self._addresses = [p.data_ptr() for p in self._parameters]
        few = [_few_bits(p) for p in self._parameters]
        self._at_hand = [bits for bits in few if bits.device.type in _AT_HAND]
        elsewhere: dict[Any, list[Tensor]] = {}
        for bits in few:
            if bits.device.type not in _AT_HAND:
                elsewhere.setdefault((bits.dtype, bits.device), []).append(bits)
        self._elsewhere = list(elsewhere.values())

    def take(self) -> tuple[list[list[int]], Values | None]:
        """The values as they are now."""
        if [*map(Tensor.data_ptr, self._parameters)] != self._addresses:  # the model was moved, or has got another dtype
            self._look_up()
        try:
            numbers: list[list[int]] = [*map(Tensor.tolist, self._at_hand)]
        except RuntimeError:  # older versions of PyTorch, inside a transform of torch.func
            with torch._C._DisableFuncTorch():
                numbers = [*map(Tensor.tolist, self._at_hand)]
        return numbers, Values(*map(torch.cat, self._elsewhere)) if self._elsewhere else None


def _few_bits(parameter: Tensor) -> Tensor:
    """A view of some values as integers; the step is odd, to meet many columns."""
    return parameter.detach().view(-1)[:: max(1, parameter.numel() // _FEW - 1 | 1)].view(_BITS[parameter.dtype])
