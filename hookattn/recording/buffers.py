"""Memory of maps that nobody holds any more, in which the next ones are made."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from sys import getrefcount
from threading import RLock
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

_Kind = tuple[tuple[int, ...], torch.dtype, bool]


class _Buffer:
    """Memory of a map, and how often it is referred to where nobody else holds it."""

    def __init__(self, tensor: Tensor, left: _Left | None = None) -> None:
        self.tensor, self.storage = tensor, tensor.untyped_storage()
        self.alone, self.address = (self._count(), self.storage.data_ptr()) if left is None else left[2:]

    @property
    def is_free(self) -> bool:
        """Whether nobody holds it."""
        return self._count() == self.alone and self.is_ours

    @property
    def is_held(self) -> bool:
        """Whether somebody holds it, in this process alone."""
        return self._count() > self.alone and self.is_ours

    @property
    def is_ours(self) -> bool:
        """Whether its memory is that which it was made with, and not such as other processes see."""
        return self.storage.data_ptr() == self.address

    def _count(self) -> int:
        # Undocumented, torch 2.6 to 2.15: counts the tensors, arrays of numpy and others that show the memory of a storage. Who
        # holds the storage itself, in Python, is counted by Python alone, since 2.14 at the latest.
        return torch._C._storage_Use_Count(self.storage._cdata) + getrefcount(self.storage)


class _Left(NamedTuple):
    """What is left of a buffer, which holds nothing."""

    kind: _Kind
    storage: StorageWeakRef
    alone: int
    address: int


class Buffers:
    """Tensors on the CPU that are given out again, once whoever was given them has let go of them and of all that shows them.

    Memory of large maps goes back to the system with the map, and what is new has to be cleared by it, page by page, when it
    is written to: an eighth of the time of a forward at 1,370 tokens.

    Args:
        model: of maps. Those of its last recorder that somebody still holds, as a loop does that makes a recorder for each
            batch, are in memory that is given out when he lets go.
    """

    def __init__(self, model: nn.Module) -> None:
        self._all: dict[_Kind, list[_Buffer]] = {}  # of each kind, those that were given out last at the end
        # again by the same thread, where what is collected in between ends another block
        self._lock, self._model = RLock(), model
        for left in _left.pop(model, ()):
            if (tensor := _shown(left.storage, left.kind)) is not None:
                self._all.setdefault(left.kind, []).append(_Buffer(tensor, left))

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor whose values are whatever was there, of memory that nobody else sees.

        What is free and of no use here goes: images have another size now.
        """
        kind = shape, dtype, torch.is_inference_mode_enabled()  # what is made in that mode is not written to outside of it
        with self._lock:
            alike = self._all.setdefault(kind, [])
            for place, buffer in enumerate(alike):
                if buffer.is_free:
                    alike.append(alike.pop(place))
                    return buffer.tensor.detach()
            self._all = {kind: [b for b in each if b.is_held] for kind, each in self._all.items()}
            buffer = _Buffer(torch.empty(shape, dtype=dtype, device="cpu"))
            self._all.setdefault(kind, []).append(buffer)
            return buffer.tensor.detach()

    def leave(self) -> None:
        """Hold nothing any more, and leave to the next recorder of the model what others hold."""
        with self._lock:
            held = [(kind, b) for kind, each in self._all.items() for b in each if b.is_held]
            refer: Callable[[torch.UntypedStorage], StorageWeakRef] = StorageWeakRef
            _left[self._model] = [_Left(kind, refer(b.storage), b.alone, b.address) for kind, b in held]
            self._all = {}


_left: WeakKeyDictionary[nn.Module, Iterable[_Left]] = WeakKeyDictionary()


def _shown(storage: StorageWeakRef, kind: _Kind) -> Tensor | None:
    """A tensor of this kind that shows memory, unless that has gone."""
    shape, dtype, inference = kind
    # Undocumented, torch 2.6 to 2.15: by which processes hand on memory; None where nobody holds it any more.
    whole = torch.UntypedStorage._new_with_weak_ptr(storage.cdata)
    if whole is None:
        return None
    with torch.inference_mode(inference):
        return torch.empty(0, dtype=dtype, device="cpu").set_(whole, 0, shape)  # type: ignore[call-overload,no-any-return]
