"""Parameters that are not to be had: given back to the system by FSDP, or spread over several processes."""

from __future__ import annotations

from collections.abc import Iterable
from weakref import ref

from torch import Tensor, nn

# By name: to import torch.distributed.fsdp takes long, and a build of PyTorch need not have it. `fully_shard` makes a module
# an instance of the first, the older FSDP wraps it into the second.
_GATHERS = {"FSDPModule", "FullyShardedDataParallel"}


def is_freed(tensor: Tensor) -> bool:
    """Whether the memory of a tensor was given back, as FSDP does with parameters that it had gathered for a forward.

    Looked at before any value is: reading freed memory ends the process.
    """
    # Undocumented, torch 2.6 to 2.15: both kinds of FSDP resize the storage to 0 bytes and leave the tensor as it is.
    try:
        return tensor.numel() > 0 and tensor.untyped_storage().nbytes() == 0
    except (RuntimeError, NotImplementedError):  # a tensor without storage
        return False


def gathers(classes: Iterable[type]) -> bool:
    """Whether modules of one of these classes gather their parameters when they are called."""
    different = {*classes}
    if {*map(ref, different)} <= _KNOWN:
        return False
    for cls in different:
        if any(base.__name__ in _GATHERS for base in cls.__mro__):
            return True
        _KNOWN.add(ref(cls, _KNOWN.discard))
    return False


# Classes that do not. By references, and not in a WeakSet, which calls functions of Python for each: this is asked at each
# reading, for each module below the one that is read.
_KNOWN: set[ref[type]] = set()


def is_spread(modules: Iterable[nn.Module], tensors: Iterable[Tensor]) -> bool:
    """Whether a module gathers its parameters when it is called, or a tensor lies in parts in several processes.

    To read such a call is to talk to the other processes, which need not be reading, and would be waited for.
    """
    kinds = {*map(type, tensors)} - {Tensor, nn.Parameter}  # nearly always none are left
    return gathers(map(type, modules)) or any(base.__name__ == "DTensor" for kind in kinds for base in kind.__mro__)
