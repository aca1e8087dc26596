"""Linear projections of a recipe: only the part that is needed, unless somebody has wrapped the layer."""

from __future__ import annotations

from typing import TypeGuard

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.nn.modules import module as nn_module


def project(layer: nn.Module, x: Tensor, pattern: str, *, parts: int, of: int, **axes: int) -> tuple[Tensor, ...]:
    """Project x and split the result into its first parts.

    Args:
        layer: maps (..., in_features) to (..., of * width). A plain `nn.Linear` is cut to the rows that are needed; anything
            else (LoRA, quantised, parametrised, with hooks) is called whole.
        x: (..., in_features).
        pattern: einops pattern of the projection, with the axis `parts` leading on its right side.
        parts: how many parts are wanted, from the first on.
        of: how many parts the layer has.
        axes: sizes of other axes in the pattern.

    Returns:
        The parts, each without the axis `parts`.
    """
    if is_plain_linear(layer):
        rows = layer.weight.shape[0] // of * parts
        y = F.linear(x, layer.weight[:rows], None if layer.bias is None else layer.bias[:rows])
    else:
        y = layer(x)
        y = y[..., : y.shape[-1] // of * parts]
    return torch.unbind(rearrange(y, pattern, parts=parts, **axes))


def is_plain_linear(layer: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether a layer computes x W^T + b and nothing else, so that rows of W may be left out."""
    return (
        type(layer) is nn.Linear
        and "forward" not in vars(layer)
        and not (layer._forward_hooks or layer._forward_pre_hooks)
        and not (nn_module._global_forward_hooks or nn_module._global_forward_pre_hooks)
    )
