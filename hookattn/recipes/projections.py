"""Linear projections of a recipe: only the part that is needed, unless somebody has wrapped the layer."""

from __future__ import annotations

import re
from typing import TypeGuard, Union

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.nn.modules import module as nn_module


def project(layer: nn.Module, x: Tensor, pattern: str, *, parts: int, of: int, **axes: int) -> tuple[Tensor, ...]:
    """Project x and split the result into its first parts.

    Args:
        layer: maps (..., in_features) to (..., of * width), or (batch, in_channels, height, width) to (batch, of * width,
            height, width). A plain `nn.Linear` or `nn.Conv2d` is cut to the rows that are needed; anything else (LoRA,
            quantised, parametrised, with hooks) is called whole.
        x: what the layer takes.
        pattern: einops pattern of the projection, with the axis `parts` leading on its right side; on its left side `parts` may
            come before the heads, "(parts h d)", or after them, "(h parts d)".
        parts: how many parts are wanted, from the first on.
        of: how many parts the layer has.
        axes: sizes of other axes in the pattern.

    Returns:
        The parts, each without the axis `parts`.
    """
    if not (is_plain_linear(layer) or is_plain_conv(layer)):
        return torch.unbind(rearrange(layer(x), pattern, parts=of, **axes))[:parts]
    rows = _rows(layer.weight, pattern, parts, of, axes)
    weight, bias = layer.weight[rows], None if layer.bias is None else layer.bias[rows]
    if isinstance(layer, nn.Linear):
        y = F.linear(x, weight, bias)
    else:
        y = F.conv2d(x, weight, bias, layer.stride, layer.padding, layer.dilation)
    return torch.unbind(rearrange(y, pattern, parts=parts, **axes))


def scale_of(module: nn.Module) -> float | Tensor | None:
    """What a module scales its scores by: `scale`, which the fused path of timm's classes does not look at."""
    fused = getattr(module, "fused_attn", False)
    scale: float | Tensor = module.scale  # type: ignore[assignment]
    return None if fused else scale


def is_plain_linear(layer: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether a layer computes x W^T + b and nothing else, so that rows of W may be left out."""
    return type(layer) is nn.Linear and _is_untouched(layer)


def is_plain_conv(layer: nn.Module) -> TypeGuard[nn.Conv2d]:
    """Whether a layer is a convolution and nothing else, each of whose channels sees all of the input."""
    return type(layer) is nn.Conv2d and layer.groups == 1 and layer.padding_mode == "zeros" and _is_untouched(layer)


def _is_untouched(layer: nn.Module) -> bool:
    """Whether nobody has replaced the forward of a layer or put a hook on it."""
    return (
        "forward" not in vars(layer)
        and not (layer._forward_hooks or layer._forward_pre_hooks)
        and not (nn_module._global_forward_hooks or nn_module._global_forward_pre_hooks)
    )


def _rows(weight: Tensor, pattern: str, parts: int, of: int, axes: dict[str, int]) -> Union[slice, Tensor]:
    """Which rows of a weight make the first parts."""
    packed = re.search(r"\(([^()]*\bparts\b[^()]*)\)", pattern.split("->")[0])
    names = packed.group(1).split() if packed else ["parts"]
    if names[0] == "parts":
        return slice(len(weight) // of * parts)
    sizes = {name: size for name, size in axes.items() if name in names}
    rows = torch.arange(len(weight), device=weight.device)
    by_part = rearrange(rows, f"({' '.join(names)}) -> {' '.join(names)}", parts=of, **sizes)
    return by_part.narrow(names.index("parts"), 0, parts).reshape(-1)
