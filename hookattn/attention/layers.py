"""Which layers are a linear projection and nothing else, so that parts of it may be left out."""

from __future__ import annotations

from typing import TypeGuard

from torch import nn
from torch.nn.modules import module as nn_module

from ..calls.hooks import is_ours


def is_plain_linear(layer: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether a layer computes x W^T + b and nothing else, so that rows of W may be left out."""
    # `type(...) is`: a class that is derived may do anything in its forward. Parametrised layers are told by this too: PyTorch
    # makes a class for each (undocumented, torch 2.6 to 2.15).
    return type(layer) is nn.Linear and _is_untouched(layer)


def is_plain_conv(layer: nn.Module) -> TypeGuard[nn.Conv2d]:
    """Whether a layer is a convolution and nothing else, each of whose channels sees all of the input."""
    return type(layer) is nn.Conv2d and layer.groups == 1 and layer.padding_mode == "zeros" and _is_untouched(layer)


def is_pointwise(layer: nn.Conv2d) -> bool:
    """Whether each place is projected by itself."""
    return layer.kernel_size == (1, 1) == layer.stride and layer.padding in ((0, 0), "valid", "same")


def _is_untouched(layer: nn.Module) -> bool:
    """Whether nobody but a recorder has put a hook on a layer, or replaced its forward."""
    # Undocumented, torch 2.6 to 2.15: the dicts of hooks of a module, and those of hooks on all modules in `nn.modules.module`.
    if "forward" in layer.__dict__ or nn_module._global_forward_hooks or nn_module._global_forward_pre_hooks:
        return False
    hooks = layer._forward_hooks, layer._forward_pre_hooks
    return not any(hooks) or all(is_ours(hook) for each in hooks for hook in list(each.values()))
