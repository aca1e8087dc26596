"""Tensors whose values are not to be had: given back to the system, spread over processes, or left behind by a transform."""

from __future__ import annotations

from collections.abc import Iterable

import torch
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


def is_left_behind(tensor: Tensor) -> bool:
    """Whether a tensor is the batched one of a `torch.vmap` that has returned."""
    functorch = torch._C._functorch
    while functorch.is_gradtrackingtensor(tensor):  # of a torch.func.grad inside the vmap
        tensor = functorch.get_unwrapped(tensor)
    if not functorch.is_batchedtensor(tensor):
        return False
    return functorch.maybe_get_level(tensor) > (functorch.maybe_current_level() or 0)


def _derives(thing: object, names: set[str]) -> bool:
    return any(cls.__name__ in names for cls in type(thing).__mro__)
