"""How large a feature map is after convolutions and pools."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import nn

from .tokens import Size

# what changes the size of a grid; other layers leave it as it is
STRIDING = (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d)


def size_after(size: Sequence[int], *modules: nn.Module | None) -> Size:
    """(rows, columns) of a feature map after all convolutions and pools of some modules, one after the other.

    Args:
        size: (rows, columns) before; more axes may come first.
        modules: what the feature map goes through; None changes nothing.
    """
    rows, columns = (int(n) for n in size[-2:])
    for layer in (layer for module in modules if module is not None for layer in module.modules()):
        if isinstance(layer, STRIDING):
            rows, columns = (_after(n, layer, axis) for axis, n in enumerate((rows, columns)))
        elif isinstance(layer, nn.ZeroPad2d):
            left, right, upper, lower = layer.padding
            rows, columns = rows + upper + lower, columns + left + right
        elif isinstance(layer, nn.AdaptiveAvgPool2d):
            rows, columns = (n if wanted is None else wanted for wanted, n in zip(pair(layer.output_size), (rows, columns)))
    return rows, columns


def pair(value: Any) -> Any:
    """One number for rows and columns, or the two there are."""
    return tuple(value) if isinstance(value, (tuple, list)) else (value, value)


def _after(n: int, layer: Any, axis: int) -> int:
    """One side of a feature map after one layer; timm's layers with "Same" in their name pad by the size of their input."""
    stride: int = pair(layer.stride)[axis]
    padding = "same" if "Same" in type(layer).__name__ else layer.padding
    if padding == "same":  # TensorFlow's rule
        return math.ceil(n / stride)
    border: int = 0 if padding == "valid" else pair(padding)[axis]
    reach: int = pair(getattr(layer, "dilation", 1))[axis] * (pair(layer.kernel_size)[axis] - 1)
    rest = n + 2 * border - reach - 1
    if not getattr(layer, "ceil_mode", False):
        return rest // stride + 1
    cells = math.ceil(rest / stride) + 1
    return cells - ((cells - 1) * stride >= n + border)  # a cell that would begin in the padding is left out
