"""What tells that a tensor has changed: its version, where it lies, the steps of optimizers on it, values of arguments."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from .samples import Values, bytes_at

SAMPLES = 4096
_number_at = ctypes.c_uint64.from_address
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
        return bytes(bytes_at(start, some.nbytes))
    return Values([some.view(torch.uint8)])  # as bytes, too, by which a NaN is itself


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
