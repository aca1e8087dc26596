"""What tells that a tensor has changed: its version, where it lies, the steps of optimizers on it, some of its values."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Iterable, Sequence
from contextvars import ContextVar
from operator import attrgetter
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from .cuda_graphs import is_capturing
from .setting import Setting

SAMPLES = 4096
_FEW = 16
_AT_HAND = ("cpu",)  # where values are read without waiting for anything
_number_at = ctypes.c_uint64.from_address
# By their width. Integers: compared bit by bit a NaN equals itself. On a device those of other widths are not sampled.
_BITS = {8: torch.int64, 4: torch.int32, 2: torch.int16}
_WORDS: dict[int, Literal["Q", "I", "H", "B"]] = {8: "Q", 4: "I", 2: "H", 1: "B"}
_memory = ctypes.pythonapi.PyMemoryView_FromMemory
_memory.argtypes, _memory.restype = (ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int), ctypes.py_object
_READ_ONLY = 0x100  # PyBUF_READ
# Undocumented, torch 2.6 to 2.15: `_version`, the counter by which autograd finds saved tensors that were written to. All
# views of a tensor share it; a write through `.data`, by a fused optimizer or by a CUDA graph does not count.
_VERSION = attrgetter("_version")
# Undocumented, torch 2.6 to 2.15: it raises a RuntimeError where there is no storage. In 2.14 fake and meta tensors and
# wrappers give 0 instead, so steps on them are told by id.
_ADDRESS = Tensor.data_ptr
_NO_VERSION = -1
Stamps = tuple[list[int], list[int], list[int]]
"""Versions, addresses and optimizer steps of tensors: differ later if one was written to, moved or stepped on."""


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


def stamps(tensors: Sequence[Tensor], steps: Steps) -> Stamps:
    """Versions, addresses and optimizer steps of tensors, as they are now."""
    # Tensors of inference mode have no version, and to ask for it raises, which takes as long as all else that is done here:
    # where there is one the first, which is x, is nearly always one, too.
    try:
        versions = _versions(tensors) if tensors and tensors[0].is_inference() else [*map(_VERSION, tensors)]
    except RuntimeError:
        versions = _versions(tensors)
    try:
        addresses = [*map(_ADDRESS, tensors)]
    except RuntimeError:
        addresses = [*map(_address, tensors)]
    if not (taken := steps.taken):
        return versions, addresses, [0] * len(addresses)
    return versions, addresses, [taken.get(at or id(t), 0) for t, at in zip(tensors, addresses)]


def values_of_arguments(tensors: Sequence[Tensor], versions: list[int], addresses: list[int]) -> list[Any]:
    """Values of what a module was called with, by which a write is known that counts no version.

    Many of tensors in memory that PyTorch has not allocated, such as an array of NumPy, and of tensors made in inference mode;
    a few of all others on the CPU, which `.data` may have written to.

    Args:
        versions, addresses: of these tensors, and of others behind them.
    """
    values: list[Any] = []
    try:
        for tensor, version, start in zip(tensors, versions, addresses):
            # Undocumented, torch 2.6 to 2.15: a storage around memory of somebody else's cannot be resized.
            if version == _NO_VERSION or not tensor.untyped_storage().resizable():
                break
            if tensor.is_cpu and start:
                # By address and not by an operator, since it is done at every recorded call: twice 8 bytes of its own part of
                # the storage. One that is not contiguous may be smaller, or reach further, than it has bytes.
                size = tensor.nbytes if tensor.is_contiguous() else _bytes_behind(tensor, start)
                if size >= 64:
                    fifth = size // 5 & ~7  # a multiple of 8, where numbers begin
                    values += _number_at(start + fifth).value, _number_at(start + 3 * fifth).value
        else:
            return values
    except (RuntimeError, NotImplementedError):  # without storage
        pass
    return [_many_values(t) for t in tensors]


def _bytes_behind(tensor: Tensor, start: int) -> int:
    """How many bytes of the storage a tensor may read from where it begins, at most as many as it has."""
    storage = tensor.untyped_storage()
    return min(tensor.nbytes, storage.data_ptr() + storage.nbytes() - start)


def _many_values(tensor: Tensor) -> bytes | Values | None:
    """Up to 4096 values of a tensor that nothing else tells apart; a copy costs an operator, which other tensors are spared."""
    if tensor.device.type == "meta" or tensor.is_nested or not (tensor.is_inference() or _is_of_others(tensor)):
        return None
    values, step = tensor.detach(), max(1, (count := tensor.numel()) // SAMPLES)
    some = values.as_strided((-(-count // step),), (step,)) if tensor.is_contiguous() else values.reshape(-1)[::step]
    some = some.clone()
    if some.is_cpu and (start := _address(some)):
        return bytes(_memory(start, some.nbytes, _READ_ONLY))
    return Values(some.view(torch.uint8))  # as bytes, too, by which a NaN is itself


def _is_of_others(tensor: Tensor) -> bool:
    try:
        return not tensor.untyped_storage().resizable()
    except (RuntimeError, NotImplementedError):  # without storage
        return False


def _versions(tensors: Sequence[Tensor]) -> list[int]:
    """Versions of tensors of any kind."""
    return [_NO_VERSION if tensor.is_inference() else tensor._version for tensor in tensors]


def _address(tensor: Tensor) -> int:
    try:
        return tensor.data_ptr()
    except RuntimeError:  # a tensor without storage: batched, functional or sparse
        return 0


class Values:
    """Values of tensors, as integers, to be compared later with others; equal when all are.

    Nobody waits for a device when they are taken, only when they are compared, or later in `comparing_later`; not even then
    while a CUDA graph is captured, where they are values that nothing has computed yet.
    """

    def __init__(self, *values: Tensor) -> None:
        self.values = values

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Values):
            return False
        pairs = zip(self.values, other.values)
        if is_capturing():
            return True
        if (doubts := _doubts.get()) is None:
            return are_equal(pairs)
        doubts += pairs
        return True

    __hash__ = object.__hash__  # which Python takes from a class that defines `__eq__`


NOT_LOOKED_AT = Values()
Pair = tuple[Tensor, Tensor]
"""Values of before, and of now."""
_doubts: ContextVar[list[Pair] | None] = ContextVar("doubts", default=None)


def comparing_later() -> Setting[list[Pair] | None]:
    """A block in which values count as equal, and nobody waits for a device: whether they are is told by `are_equal`."""
    return Setting(_doubts, [])


def are_equal(pairs: Iterable[Pair]) -> bool:
    """Whether values are what they were; waits once for all that are of a kind."""
    by_kind: dict[Any, list[Pair]] = {}
    for pair in pairs:
        by_kind.setdefault((pair[0].device, pair[0].dtype), []).append(pair)
    with torch._C.DisableTorchFunction():  # undocumented, torch 2.6 to 2.15; modes of the user's see nothing of it
        return all(torch.equal(*(each[0] if len(each) == 1 else map(torch.cat, zip(*each)))) for each in by_kind.values())


class Samples:
    """About 16 values of each parameter, which tell of writes that count no version: by `.data`, or a CUDA graph.

    On the CPU they are read from memory, without an operator, and kept as bytes; on other devices one kernel for all values
    of a width puts them side by side, and nobody waits for it.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        # no subclasses: quantised or distributed ones need not hold in their memory what they show
        self._of = [p for p in parameters if type(p) is nn.Parameter]
        self._addresses: list[int] | None = None  # nothing is looked up before it is asked for

    def take(self, addresses: list[int], by_kernel: bool = True) -> tuple[bytes, Values | None]:
        """Read the values as they are now; called at every recorded call, and again when its map is read.

        Args:
            addresses: of all tensors that the module reads, these parameters among them, as they are now.
            by_kernel: those on other devices, too; else `NOT_LOOKED_AT` stands for them.
        """
        if addresses != self._addresses:  # some have got other memory
            self._look_up()
            self._addresses = addresses
        few = b"".join(map(memoryview.tobytes, self._at_hand))
        if not self._elsewhere:
            return few, None
        return few, Values(*map(torch.cat, self._elsewhere)) if by_kernel else NOT_LOOKED_AT

    def _look_up(self) -> None:
        """Find where the values to be read lie."""
        self._at_hand: list[memoryview] = []
        self._elsewhere: list[list[Tensor]] = []
        elsewhere: dict[Any, list[Tensor]] = {}
        with torch._C.DisableTorchFunction():  # undocumented, torch 2.6 to 2.15; modes of the user's see nothing of it
            for p in self._of:
                if not p.is_meta and p.layout is torch.strided and (p.is_contiguous() or _in_memory_order(p).is_contiguous()):
                    if p.device.type in _AT_HAND:
                        self._at_hand += _few_words(p)
                    elif p.element_size() in _BITS:
                        elsewhere.setdefault((p.element_size(), p.device), []).append(_few_bits(p))
        self._elsewhere = list(elsewhere.values())


def _in_memory_order(tensor: Tensor) -> Tensor:
    """A view whose last axis is the one along which values lie side by side: contiguous if the tensor is dense."""
    return tensor.permute(sorted(range(tensor.dim()), key=tensor.stride().__getitem__, reverse=True))


def _step_through(count: int) -> int:
    """From one value to the next of those that are looked at."""
    # odd: widths are even, so an even step would meet a few columns of a matrix alone, and miss a write to others
    return max(1, count // _FEW - 1 | 1)


def _few_words(parameter: Tensor) -> list[memoryview]:
    """Some values of a dense parameter, as words of their width, spread over its memory; none where it has none.

    Nothing holds that memory: it is there as long as the parameter still has the address, and not to be read otherwise.
    """
    # not by NumPy, nor by a view of PyTorch's: memory that was shown to it cannot be freed or resized, as FSDP does
    width, size = parameter.element_size(), parameter.nbytes
    if not size or width not in _WORDS or parameter.untyped_storage().nbytes() < size:
        return []
    words: memoryview = _memory(parameter.data_ptr(), size, _READ_ONLY)
    return [words.cast(_WORDS[width])[:: _step_through(parameter.numel())]]


def _few_bits(parameter: Tensor) -> Tensor:
    """A view of some values of a parameter as integers, spread over all of it."""
    step = _step_through(count := parameter.numel())  # through its memory, in which it is dense
    return parameter.detach().as_strided((-(-count // step),), (step,)).view(_BITS[parameter.element_size()])
