"""What a map is multiplied onto, (batch, heads, keys, head_dim), where several classes make it alike.

As a recipe mirrors the `forward` of a class up to its scores, these mirror it up to its product with the map: arguments that do
not reach the values, such as masks and positions, are taken and left alone. A class whose heads share their values in another
way than one for each head of the map has none here, and its forward is run.
"""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from ..attention.projection import multiply, project, project_heads
from .mechanisms import repeat_for_groups


def project_last(layer: nn.Module, x: Tensor, pattern: str, *, of: int, **axes: int) -> Tensor:
    """The last part of a packed projection, see `project`."""
    return project(layer, x, pattern, parts=of, of=of, **axes)[-1]


def packed_values(self: Any, x: Tensor, *_: Any, **__: Any) -> Tensor:
    """Of `qkv`, tokens in a row."""
    return project_last(self.qkv, x, "b n (parts h d) -> parts b h n d", of=3, h=self.num_heads)


def separate_values(self: Any, x: Tensor, *_: Any, **__: Any) -> Tensor:
    """Of a layer `v` that makes nothing else."""
    return project_heads(self.v, x, self.num_heads)


def channels_first_values(self: Any, x: Tensor, *_: Any, **__: Any) -> Tensor:
    """Of `qkv`, tokens on their grid, each head's q, k and v together where the class has that."""
    packed = "(h parts d)" if getattr(self, "head_first", False) else "(parts h d)"
    return project_last(self.qkv, x, f"b {packed} y x -> parts b h (y x) d", of=3, h=self.num_heads)


def channels_last_values(self: Any, x: Tensor, *_: Any, **__: Any) -> Tensor:
    """The same with channels last."""
    packed = "(h parts d)" if getattr(self, "head_first", False) else "(parts h d)"
    return project_last(self.qkv, x, f"b ... {packed} -> parts b h (...) d", of=3, h=self.num_heads)


def values_with_bias(self: Any, x: Tensor, *_: Any, **__: Any) -> Tensor:
    """Of `qkv`, where the biases are parameters of their own, see `project_with_biases`."""
    if self.q_bias is None:
        return packed_values(self, x)
    if self.qkv_bias_separate:
        v, bias = packed_values(self, x), rearrange(self.v_bias, "(h d) -> h 1 d", h=self.num_heads)
        return torch.add(v, bias).to(v.dtype)  # added in place there
    return multiply(x, self.qkv.weight.chunk(3)[2], self.v_bias, self.num_heads)


def grouped_values(self: Any, layer: nn.Module, x: Tensor) -> Tensor:
    """Of a layer that makes fewer heads than there are, several of which share one."""
    v = project_last(layer, x, "b n (parts h d) -> parts b h n d", of=1, h=getattr(self, "num_kv_heads", self.num_heads))
    return repeat_for_groups(v, self.num_heads)
