"""Memory of maps that nobody holds any more, in which the next ones are made."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from threading import Lock
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

# Undocumented, torch 2.6 to 2.15: counts the tensors, arrays of numpy and others that show the memory of a storage.
_count_holders = torch._C._storage_Use_Count


_Kind = tuple[tuple[int, ...], torch.dtype, bool]


class _Buffer(NamedTuple):
    tensor: Tensor
    storage: int
    alone: int  # its count where nobody else holds it


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
        self._lock, self._model = Lock(), model
        for kind, storage, alone in _left.pop(model, ()):
            if (tensor := _shown(storage, kind)) is not None:
                self._all.setdefault(kind, []).append(_Buffer(tensor, tensor.untyped_storage()._cdata, alone))

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor whose values are whatever was there, of memory that nobody else sees.

        What is free and of no use here goes: images have another size now.
        """
        kind = shape, dtype, torch.is_inference_mode_enabled()  # what is made in that mode is not written to outside of it
        with self._lock:
            alike = self._all.setdefault(kind, [])
            for place, (tensor, storage, alone) in enumerate(alike):
                if _count_holders(storage) == alone:
                    alike.append(alike.pop(place))
                    return tensor.detach()
            self._all = {kind: [b for b in each if _count_holders(b.storage) > b.alone] for kind, each in self._all.items()}
            tensor = torch.empty(shape, dtype=dtype, device="cpu")
            storage = tensor.untyped_storage()._cdata
            self._all[kind].append(_Buffer(tensor, storage, _count_holders(storage)))
            return tensor.detach()

    def leave(self) -> None:
        """Hold nothing any more, and leave to the next recorder of the model what others hold."""
        with self._lock:
            held = [(kind, b) for kind, each in self._all.items() for b in each if _count_holders(b.storage) > b.alone]
            refer: Callable[[torch.UntypedStorage], StorageWeakRef] = StorageWeakRef
            _left[self._model] = [(kind, refer(b.tensor.untyped_storage()), b.alone) for kind, b in held]
            self._all = {}


_left: WeakKeyDictionary[nn.Module, Iterable[tuple[_Kind, StorageWeakRef, int]]] = WeakKeyDictionary()


def _shown(storage: StorageWeakRef, kind: _Kind) -> Tensor | None:
    """A tensor of this kind that shows memory, unless that has gone."""
    shape, dtype, inference = kind
    # Undocumented, torch 2.6 to 2.15: by which processes hand on memory; None where nobody holds it any more.
    whole = torch.UntypedStorage._new_with_weak_ptr(storage.cdata)
    if whole is None:
        return None
    with torch.inference_mode(inference):
        return torch.empty(0, dtype=dtype, device="cpu").set_(whole, 0, shape)  # type: ignore[call-overload,no-any-return]
