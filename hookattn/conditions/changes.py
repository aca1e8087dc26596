"""What tells that a tensor has changed: its version, where it lies, the steps of optimizers on it, some of its values."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

SAMPLES = 4096
_FEW = 16
_number_at = ctypes.c_uint64.from_address
_AT_HAND = ("cpu",)  # where values are read without waiting for anything
# Integers of the same width: compared bit by bit a NaN equals itself. Other dtypes (8 bits, complex) are not sampled.
_BITS = {torch.float64: torch.int64, torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}


class Steps:
    """How often optimizers have stepped on each tensor, counted for as long as somebody holds this object.

    Needed beside versions, since fused optimizers and compiled steps write into parameters without counting one.

    Attributes:
        taken: steps by the address of a parameter. An address that is used again for another tensor starts with the count
            of the one before, so only a difference tells anything.
    """

    def __init__(self) -> None:
        self.taken: dict[int, int] = {}
        taken = self.taken  # the hook, which lives as long as the process unless it is removed, must not hold `self`

        def count(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        # by address: a parameter that is an argument is kept detached, as another object
                        at = _address(parameter) or id(parameter)
                        taken[at] = taken.get(at, 0) + 1

        weakref.finalize(self, register_optimizer_step_post_hook(count).remove)


# One count for all recorders: each would register a hook that runs in every step of every optimizer of the process.
_current: weakref.ref[Steps] | None = None


def counted_steps() -> Steps:
    """The count of optimizer steps that all layers share; it begins with the first who asks and ends with its last holder."""
    global _current
    found = None if _current is None else _current()
    if found is None:
        found = Steps()
        _current = weakref.ref(found)
    return found


def stamps(tensors: Sequence[Tensor], steps: Steps) -> list[tuple[int, int, int]]:
    """(version, address, optimizer steps) of each tensor: differs later if it was written to, moved or stepped on."""
    try:
        return _quick_stamps(tensors, steps.taken)
    except RuntimeError:
        return [_stamp(t, steps) for t in tensors]


def stamps_of_arguments(tensors: Sequence[Tensor], steps: Steps) -> list[tuple[Any, ...]]:
    """Stamps of what a module was called with: as `stamps`, and values of those that are written to without being counted.

    Many of tensors in memory that PyTorch has not allocated, such as an array of NumPy, and of tensors made in inference mode;
    a few of all others on the CPU, which `.data` may have written to.
    """
    try:
        quick: list[tuple[Any, ...]] = []
        for tensor, stamp in zip(tensors, _quick_stamps(tensors, steps.taken)):
            storage = tensor.untyped_storage()
            # Undocumented, torch 2.6 to 2.14: a storage around memory of somebody else's cannot be resized.
            if not storage.resizable():
                break
            quick.append((*stamp, *_few_bytes(tensor, stamp[1], storage)) if tensor.is_cpu else stamp)
        else:
            return quick
    except RuntimeError:
        pass
    return [(*_stamp(t, steps), _many_values(t)) for t in tensors]


def _few_bytes(tensor: Tensor, start: int, storage: torch.UntypedStorage) -> tuple[int, ...]:
    """Twice 8 bytes of a tensor as they are now: read at every recorded call, so by address and not by an operator."""
    # of its own part of the storage; one that is not contiguous may be smaller, or reach further, than it has bytes
    size = min(tensor.nbytes, storage.data_ptr() + storage.nbytes() - start)
    if size < 64 or not start:  # nothing, or a tensor that only seems to be there
        return ()
    fifth = size // 5 & ~7  # a multiple of 8, where numbers begin
    return _number_at(start + fifth).value, _number_at(start + 3 * fifth).value


def _quick_stamps(tensors: Sequence[Tensor], taken: dict[int, int]) -> list[tuple[int, int, int]]:
    """Stamps without a look at what kind of tensors they are of, for the path of every call.

    Raises:
        RuntimeError: a tensor counts no versions (made in inference mode) or has no address (batched, functional, sparse).
    """
    # Undocumented, torch 2.6 to 2.14: `_version`, the counter by which autograd finds saved tensors that were written to. All
    # views of a tensor share it; a write through `.data`, by a fused optimizer or by a CUDA graph does not count.
    # Undocumented, torch 2.6 to 2.14: `data_ptr` raises a RuntimeError where there is no storage. In 2.14 fake and meta tensors
    # and wrappers give 0 instead, so steps on them are told by id.
    if not taken:
        return [(t._version, t.data_ptr(), 0) for t in tensors]
    return [(t._version, (at := t.data_ptr()), taken.get(at or id(t), 0)) for t in tensors]


def _many_values(tensor: Tensor) -> Values | None:
    """Up to 4096 values of a tensor that nothing else tells apart; a copy costs an operator, which other tensors are spared."""
    if tensor.device.type == "meta" or tensor.is_nested or not (tensor.is_inference() or _is_of_others(tensor)):
        return None
    values = tensor.detach().reshape(-1)
    return Values(values[:: max(1, values.numel() // SAMPLES)].clone())


def _is_of_others(tensor: Tensor) -> bool:
    try:
        return not tensor.untyped_storage().resizable()
    except (RuntimeError, NotImplementedError):  # without storage
        return False


def _stamp(tensor: Tensor, steps: Steps) -> tuple[int, int, int]:
    """(version, address, optimizer steps) of one tensor of any kind; an inference tensor, without versions, has -1."""
    at = _address(tensor)
    return -1 if tensor.is_inference() else tensor._version, at, steps.taken.get(at or id(tensor), 0)


def _address(tensor: Tensor) -> int:
    try:
        return tensor.data_ptr()
    except RuntimeError:  # a tensor without storage: batched, functional or sparse
        return 0


class Values:
    """Values of tensors to be compared later with others; equal when all are, NaN with NaN.

    Nobody waits for a device when they are taken, only when they are compared.
    """

    def __init__(self, *values: Tensor) -> None:
        self.values = values

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Values) and all(
            torch.equal(a, b) or bool(((a == b) | (a.isnan() & b.isnan())).all()) for a, b in zip(self.values, other.values)
        )

    __hash__ = object.__hash__  # which Python takes from a class that defines `__eq__`


class Samples:
    """About 16 values of each parameter, which tell of writes that count no version: by `.data`, or a CUDA graph.

    On the CPU they are read without an operator and kept as numbers; on other devices one kernel for all values of a dtype
    puts them side by side, and nobody waits for it.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        # no subclasses: quantised or distributed ones need not hold in their memory what they show
        self._of = [p for p in parameters if type(p) is nn.Parameter]
        self._addresses: list[int] = []
        self._look_up()

    def _look_up(self) -> None:
        """Make views of the values to be read; anew whenever a parameter has got other memory, which views do not follow."""
        with torch._C.DisableTorchFunction():  # undocumented, torch 2.6 to 2.14; modes of the user's see nothing of it
            self._parameters = [
                p for p in self._of if p.dtype in _BITS and p.device.type != "meta" and _in_memory_order(p).is_contiguous()
            ]
            self._lie_at = [p.data_ptr() for p in self._parameters]
            few = [_few_bits(p) for p in self._parameters]
            self._at_hand = [bits for bits in few if bits.device.type in _AT_HAND]
            elsewhere: dict[Any, list[Tensor]] = {}
            for bits in few:
                if bits.device.type not in _AT_HAND:
                    elsewhere.setdefault((bits.dtype, bits.device), []).append(bits)
            self._elsewhere = list(elsewhere.values())

    def take(self, addresses: list[int]) -> tuple[list[list[int]], Values | None]:
        """Read the values as they are now; called at every recorded call, and again when its map is read.

        Args:
            addresses: of all tensors that the module reads, these parameters among them.
        """
        if addresses != self._addresses:
            if [*map(Tensor.data_ptr, self._parameters)] != self._lie_at:  # the model was moved, or has got another dtype
                self._look_up()
            self._addresses = addresses
        # not by NumPy, which is faster: PyTorch cannot free or resize memory that was shown to it, as FSDP does
        try:
            numbers: list[list[int]] = [*map(Tensor.tolist, self._at_hand)]
        except RuntimeError:
            # torch 2.6 refuses `tolist` inside a transform of torch.func, also of a tensor the transform has nothing to do
            # with; 2.14 does not. Undocumented, torch 2.6 to 2.14: `_DisableFuncTorch` takes the transforms off meanwhile.
            with torch._C._DisableFuncTorch():
                numbers = [*map(Tensor.tolist, self._at_hand)]
        return numbers, Values(*map(torch.cat, self._elsewhere)) if self._elsewhere else None


def _in_memory_order(tensor: Tensor) -> Tensor:
    """A view whose last axis is the one along which values lie side by side: contiguous if the tensor is dense."""
    return tensor.permute(sorted(range(tensor.dim()), key=tensor.stride().__getitem__, reverse=True))


def _few_bits(parameter: Tensor) -> Tensor:
    """A view of some values of a parameter as integers, spread over all of it."""
    # an odd step: widths are even, so an even one would meet a few columns of a matrix alone, and miss a write to others
    return (
        _in_memory_order(parameter.detach()).view(-1)[:: max(1, parameter.numel() // _FEW - 1 | 1)].view(_BITS[parameter.dtype])
    )
