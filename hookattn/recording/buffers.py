"""Memory of maps that nobody holds any more, in which the next ones are made."""

from __future__ import annotations

from threading import Lock
from typing import NamedTuple

import torch
from torch import Tensor

# Undocumented, torch 2.6 to 2.15: counts the tensors, arrays of numpy and others that show the memory of a storage.
_count_holders = torch._C._storage_Use_Count


class _Buffer(NamedTuple):
    tensor: Tensor
    storage: int
    alone: int  # its count where nobody else holds it


class Buffers:
    """Tensors on the CPU that are given out again, once whoever was given them has let go of them and of all that shows them.

    Memory of large maps goes back to the system with the map, and what is new has to be cleared by it, page by page, when it
    is written to: an eighth of the time of a forward at 1,370 tokens.
    """

    def __init__(self) -> None:
        self._all: dict[object, list[_Buffer]] = {}  # of each kind, those that were given out last at the end
        self._lock = Lock()

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
