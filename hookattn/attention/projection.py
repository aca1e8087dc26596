"""Queries and keys as linear projections x W^T + b, of what a module's layers have for weights."""

from __future__ import annotations

import re
from typing import Union

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..conditions.meta import check_values
from .layers import is_plain_conv, is_plain_linear, is_pointwise
from .packed import PACKED, Packed, plan_of
from .projected import Projected


def is_bare(*tensors: Tensor | None) -> bool:
    """Whether tensors are of PyTorch's own classes, so that a projection of them is nothing but arithmetic."""
    return {*map(type, tensors)} <= _BARE


_BARE = frozenset({Tensor, nn.Parameter, type(None)})


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
    plan, weight, bias = plan_of(pattern), layer.weight, layer.bias
    check_values(x, weight)
    if plan is not None and (isinstance(layer, nn.Linear) or is_pointwise(layer)) and is_bare(x, weight, bias):
        flat = weight if isinstance(layer, nn.Linear) else weight.flatten(1)
        packed = Packed(layer, x, flat, bias, pattern, plan, {"parts": of, **axes})
        tokens, sizes, dtype = packed.tokens(), (packed.heads, packed.width), flat.dtype
        return tuple([Projected.of(tokens, sizes, dtype, packed, number) for number in range(parts)])
    rows = _rows(weight, pattern, parts, of, axes)
    weight, bias = weight[rows], None if bias is None else bias[rows]
    if isinstance(layer, nn.Linear):
        y = F.linear(x, weight, bias)
    else:
        y = F.conv2d(x, weight, bias, layer.stride, layer.padding, layer.dilation)
    return torch.unbind(rearrange(y, pattern, parts=parts, **axes))


def project_heads(layer: nn.Module, x: Tensor, heads: int) -> Tensor:
    """(batch, heads, tokens, head_dim) of (batch, tokens, features) by a layer that makes nothing else."""
    return project(layer, x, "b n (parts h d) -> parts b h n d", parts=1, of=1, h=heads)[0]


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None, heads: int) -> Tensor:
    """Project x by parameters that are in no layer: weight (heads * head_dim, features), bias (heads * head_dim)."""
    check_values(x, weight)
    if not is_bare(x, weight, bias):
        return rearrange(F.linear(x, weight, bias), "b n (h d) -> b h n d", h=heads)
    by_head = None if bias is None else rearrange(bias, "(h d) -> h d", h=heads)
    return Projected(x, rearrange(weight, "(h d) c -> h d c", h=heads), by_head)


def scale_of(module: nn.Module) -> float | Tensor | None:
    """Look up what a module of timm's scales its scores by; None for head_dim ** -0.5, as on its fused path always."""
    # timm's fused path does not hand `scale` to the kernel, so one that was set by hand counts on the unfused path alone
    fused = getattr(module, "fused_attn", False)
    scale: float | Tensor = module.scale  # type: ignore[assignment]
    return None if fused else scale


def _rows(weight: Tensor, pattern: str, parts: int, of: int, axes: dict[str, int]) -> Union[slice, Tensor]:
    """Rows of a weight that make the first parts of a projection: a slice where they come first, else their numbers."""
    packed = re.search(PACKED, pattern.split("->")[0])
    names = packed.group(1).split() if packed else ["parts"]
    if names[0] == "parts":
        return slice(len(weight) // of * parts)
    sizes = {name: size for name, size in axes.items() if name in names}
    rows = torch.arange(len(weight), device=weight.device)
    by_part = rearrange(rows, f"({' '.join(names)}) -> {' '.join(names)}", parts=of, **sizes)
    return by_part.narrow(names.index("parts"), 0, parts).reshape(-1)
