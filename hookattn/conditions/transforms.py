"""Tensors of `torch.func` transforms, which are gone when the transform has returned."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def are_wrapped(tensors: Iterable[Tensor]) -> bool:
    """Whether any of some tensors is one of a transform, of which operators can do less than of others."""
    return any(map(torch._C._functorch.is_functorch_wrapped_tensor, tensors))  # undocumented, torch 2.6 to 2.15


def is_left_behind(tensor: Tensor) -> bool:
    """Whether a tensor is the batched one of a `torch.vmap` that has returned, so that nothing can be computed of it."""
    # Undocumented, torch 2.6 to 2.15: all of these. Transforms that run have levels, counted from 1 inwards; a wrapped tensor
    # keeps the level of its own, which is higher than any that runs once that has returned. What PyTorch does with it then is
    # an error about itself or, inside of another vmap, a silent mix-up of the two.
    functorch = torch._C._functorch
    while functorch.is_gradtrackingtensor(tensor):  # of a torch.func.grad inside the vmap
        tensor = functorch.get_unwrapped(tensor)
    if not functorch.is_batchedtensor(tensor):
        return False
    return functorch.maybe_get_level(tensor) > (functorch.maybe_current_level() or 0)
