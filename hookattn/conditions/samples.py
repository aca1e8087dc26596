"""Some values of tensors, by which a write is known that counts no version: by `.data`, or a CUDA graph."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from contextvars import ContextVar
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .cuda_graphs import is_capturing

_FEW = 16
_AT_HAND = ("cpu",)  # where values are read without waiting for anything
# By their width. Integers: compared bit by bit a NaN equals itself. On a device those of other widths are not sampled.
_BITS = {8: torch.int64, 4: torch.int32, 2: torch.int16}
_WORDS: dict[int, Literal["Q", "I", "H", "B"]] = {8: "Q", 4: "I", 2: "H", 1: "B"}
_memory = ctypes.pythonapi.PyMemoryView_FromMemory
_memory.argtypes, _memory.restype = (ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int), ctypes.py_object
_READ_ONLY = 0x100  # PyBUF_READ


def bytes_at(address: int, size: int) -> memoryview:
    """Memory that PyTorch has allocated; nothing holds it."""
    # not by NumPy, nor by a view of PyTorch's: memory that was shown to it cannot be freed or resized, as FSDP does
    view: memoryview = _memory(address, size, _READ_ONLY)
    return view


class Values:
    """Values of tensors, as integers, to be compared later with others; equal when all are.

    Nobody waits for a device when they are taken, only when they are compared, or later where there are `Doubts`; not even then
    while a CUDA graph is captured, where they are values that nothing has computed yet.

    Args:
        seen: for each width and device, tensors that hold the values side by side.
    """

    def __init__(self, *seen: list[Tensor]) -> None:
        self.seen = seen

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Values):
            return False
        if is_capturing():
            return True
        if (doubts := _doubts.get()) is None:
            return are_equal(zip(self.seen, other.seen))
        doubts.pairs += zip(self.seen, other.seen)
        return True

    __hash__ = object.__hash__  # which Python takes from a class that defines `__eq__`


NOT_LOOKED_AT = Values()


def are_equal(pairs: Iterable[tuple[list[Tensor], list[Tensor]]]) -> bool:
    """Whether values are what they were; waits once for all of a width and device."""
    with torch._C.DisableTorchFunction():  # undocumented, torch 2.6 to 2.15; modes of the user's see nothing of it
        return all(torch.equal(_joined(now), _joined(before)) for now, before in pairs)


class Doubts:
    """A block in which values count as equal, and nobody waits for a device; whether they are is told behind it.

    When it ends, all that were compared are looked at by one kernel for each width and device.

    Attributes:
        pairs: values of now and of before.
    """

    def __init__(self) -> None:
        self.pairs: list[tuple[list[Tensor], list[Tensor]]] = []

    def __enter__(self) -> Doubts:
        self._before = _doubts.set(self)
        return self

    def __exit__(self, *error: object) -> None:
        _doubts.reset(self._before)
        by_kind: dict[Any, tuple[list[Tensor], list[Tensor]]] = {}
        for pair in self.pairs:
            for tensors, more in zip(by_kind.setdefault((pair[1][0].device, pair[1][0].dtype), ([], [])), pair):
                tensors += more
        with torch._C.DisableTorchFunction():
            self.pairs = [([_joined(now)], before) for now, before in by_kind.values()]

    def have_come_true(self) -> bool:
        """Whether something has changed; waits once for all of a width and device."""
        return not are_equal(self.pairs)


def _joined(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


_doubts: ContextVar[Doubts | None] = ContextVar("doubts", default=None)


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
        if not by_kernel:
            return few, NOT_LOOKED_AT
        if _doubts.get() is not None:  # where those of all modules are looked at together
            return few, Values(*self._elsewhere)
        return few, Values(*[[torch.cat(some)] for some in self._elsewhere])

    def _look_up(self) -> None:
        """Find where the values to be read lie."""
        self._at_hand: list[memoryview] = []
        elsewhere: dict[Any, list[Tensor]] = {}
        with torch._C.DisableTorchFunction():  # undocumented, torch 2.6 to 2.15; modes of the user's see nothing of it
            for p in self._of:
                if not p.is_meta and p.layout is torch.strided and (p.is_contiguous() or _in_memory_order(p).is_contiguous()):
                    if p.device.type in _AT_HAND:
                        self._at_hand += _few_words(p)
                    elif p.element_size() in _BITS:
                        elsewhere.setdefault((p.element_size(), p.device), []).append(_few_bits(p))
        self._elsewhere = [*elsewhere.values()]


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
    width, size = parameter.element_size(), parameter.nbytes
    if not size or width not in _WORDS or parameter.untyped_storage().nbytes() < size:
        return []
    return [bytes_at(parameter.data_ptr(), size).cast(_WORDS[width])[:: _step_through(parameter.numel())]]


def _few_bits(parameter: Tensor) -> Tensor:
    """A view of some values of a parameter as integers, spread over all of it."""
    step = _step_through(count := parameter.numel())  # through its memory, in which it is dense
    return parameter.detach().as_strided((-(-count // step),), (step,)).view(_BITS[parameter.element_size()])
