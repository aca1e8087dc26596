"""Parameters that are not to be had: given back to the system by FSDP, or spread over several processes."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

_GATHERS = {"FSDPModule", "FullyShardedDataParallel"}


def is_freed(tensor: Tensor) -> bool:
    """Whether the memory of a tensor was given back, as FSDP does with parameters that it had gathered for a forward."""
    try:
        return tensor.numel() > 0 and tensor.untyped_storage().nbytes() == 0
    except (RuntimeError, NotImplementedError):  # a tensor without storage
        return False


def is_spread(modules: Iterable[nn.Module], tensors: Iterable[Tensor]) -> bool:
    """Whether one of the modules gathers its parameters when it is called, or several processes hold a tensor in parts."""
    return any(_derives(m, _GATHERS) for m in modules) or any(_derives(t, {"DTensor"}) for t in tensors)


def _derives(thing: object, names: set[str]) -> bool:
    return any(cls.__name__ in names for cls in type(thing).__mro__)
