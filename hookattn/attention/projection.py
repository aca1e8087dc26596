"""Queries and keys as linear projections x W^T + b, cut to what is asked for before they are computed."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar, Union

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .layers import is_plain_conv, is_plain_linear, is_pointwise
from .overheard import Own, heard_now

T = TypeVar("T")
Pick = Union[slice, Tensor]
"""What narrows one axis: a slice or a 1-d tensor of indices."""
ALL = slice(None)


class Projected(Tensor):
    """Queries or keys that are computed when they are needed: (batch, heads, tokens, head_dim), a linear projection of x.

    To whoever computes with it, such as a recipe, it is a tensor like any other. Until then it can be cut to some images, heads
    and tokens, and its shape, dtype and device are known.

    Attributes:
        x: (batch, tokens, features).
        weight: (heads, head_dim, features).
        bias: (heads, head_dim), or None.
        own: where the module makes it itself; None where no layer does.
        sizes: its shape, without a question to PyTorch.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    own: Own | None
    sizes: tuple[int, int, int, int]
    _computed: Tensor | None
    _cast: bool

    @staticmethod
    def __new__(
        cls,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        own: Own | None = None,
    ) -> Projected:
        (batch, tokens, _), (heads, width, _) = x.shape, weight.shape
        shape = (batch, heads, tokens, width)
        cast, dtype = False, weight.dtype
        if torch._C._is_any_autocast_enabled():  # undocumented, torch 2.6 to 2.14
            device = x.device.type
            # autocast leaves float64 alone, and asked to cast to it would raise
            cast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device) and x.dtype != torch.float64
            dtype = torch.get_autocast_dtype(device) if cast else dtype
        # Undocumented, torch 2.6 to 2.14: makes a tensor that has a shape and no memory.
        self = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=x.device)
        self._cast, self.x, self.weight, self.bias, self.own, self._computed = cast, x, weight, bias, own, None
        self.sizes = shape
        return self

    def narrowed(self, batch: Pick = ALL, heads: Pick = ALL) -> Tensor:
        """This projection for some images and heads; computed only if it was before, or was heard."""
        if batch is ALL and heads is ALL:
            return self
        if (whole := self.heard()) is not None:
            return pick(whole, batch, heads, ALL)
        weight, bias = self._of_heads(heads)
        # without `own`: what the module's layer puts out is all of it, and a part is cheaper computed
        return Projected(pick(self.x, batch, ALL, ALL), weight, bias)

    def compute_part(self, batch: Pick, heads: Pick, tokens: Pick) -> Tensor:
        """Compute the projection of some images, heads and tokens and no more."""
        if (batch is ALL and heads is ALL and tokens is ALL) or self.heard() is not None:
            return pick(self.compute(), batch, heads, tokens)
        return self._compute(pick(self.x, batch, tokens, ALL), *self._of_heads(heads))

    def compute(self) -> Tensor:
        """Compute the projection, once, or take it from what the module's own layer has put out, or is awaited to."""
        if self.heard() is None:
            self._computed = self._compute(self.x, self.weight, self.bias)
        assert self._computed is not None
        return self._computed

    def heard(self) -> Tensor | None:
        """The projection if it is there: computed before, or put out by the module's own layer, or awaited of it."""
        heard = heard_now.get()
        if self._computed is None and heard is not None and self.own is not None:
            output = heard.output(self.own)
            self._computed = None if output is None else self.own.part(output)
        return self._computed

    def _of_heads(self, heads: Pick) -> tuple[Tensor, Tensor | None]:
        if heads is ALL:
            return self.weight, self.bias
        return self.weight[heads], None if self.bias is None else self.bias[heads]

    def _compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        flat = weight.flatten(0, 1), None if bias is None else bias.flatten()
        with self._modes():
            y = F.linear(x, *flat)
        return y.view(*x.shape[:2], *weight.shape[:2]).transpose(1, 2)

    def _modes(self) -> AbstractContextManager[None]:
        """Autocast as it was when this was made, for the product: it may be off by now, as for the softmax."""
        if not self._cast and not torch._C._is_any_autocast_enabled():  # undocumented, torch 2.6 to 2.14
            return nullcontext()
        device = self.x.device.type
        if not torch.amp.is_autocast_available(device) or self._cast == torch.is_autocast_enabled(device):
            return nullcontext()
        return torch.autocast(device, self.dtype if self._cast else None, enabled=self._cast)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _ABOUT:
            # Undocumented, torch 2.6 to 2.14 (the base class does the same): or the answer would come here again.
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args)
        # everything else is done with the computed tensor, and gives plain tensors
        return func(*map(_with_computed, args), **{name: _with_computed(value) for name, value in (kwargs or {}).items()})

    @classmethod
    def __torch_dispatch__(cls, func: Any, *_: Any) -> Any:
        # reached where something of C++ goes around `__torch_function__`; there is no memory it could read
        raise TypeError(f"{func} was called with a projection that is not formed; give it q * 1 instead of q.")


# What can be told of a projection without computing it.
_ABOUT = {
    *(getattr(Tensor, name).__get__ for name in ("shape", "ndim", "dtype", "device", "is_cuda", "layout", "is_meta")),
    *(getattr(Tensor, name) for name in ("size", "dim", "numel", "nelement", "is_floating_point", "is_complex", "__len__")),
}


def compute(value: T) -> T:
    """The tensor that a `Projected` stands for, computed if it was not yet; anything else as it is."""
    return value.compute() if isinstance(value, Projected) else value  # type: ignore[return-value]


def _with_computed(argument: Any) -> Any:
    """An argument of a function of torch, with what is computed in the place of projections."""
    if type(argument) in (tuple, list):
        return type(argument)(map(_with_computed, argument))
    return compute(argument)


def is_bare(*tensors: Tensor | None) -> bool:
    """Whether tensors are of PyTorch's own classes, so that a projection of them is nothing but arithmetic."""
    return all(type(t) in _BARE for t in tensors)


def pick(tensor: Tensor, batch: Pick, heads: Pick, rows: Pick) -> Tensor:
    """Some entries along the first three axes of a tensor, each on its own."""
    if batch is not ALL:
        tensor = tensor[batch]
    if heads is not ALL:
        tensor = tensor[:, heads]
    return tensor if rows is ALL else tensor[:, :, rows]


_BARE = frozenset({Tensor, nn.Parameter, type(None)})
_AXES = r"\([^()]*\)|[^\s()]+"
_PACKED = r"\(([^()]*\bparts\b[^()]*)\)"


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
    plan = _plan(pattern)
    if plan is not None and (isinstance(layer, nn.Linear) or is_pointwise(layer)) and is_bare(x, layer.weight, layer.bias):
        return _lazily(layer, x, pattern, plan, parts, {"parts": of, **axes})
    rows = _rows(layer.weight, pattern, parts, of, axes)
    weight, bias = layer.weight[rows], None if layer.bias is None else layer.bias[rows]
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
    if not is_bare(x, weight, bias):
        return rearrange(F.linear(x, weight, bias), "b n (h d) -> b h n d", h=heads)
    by_head = None if bias is None else rearrange(bias, "(h d) -> h d", h=heads)
    return Projected(x, rearrange(weight, "(h d) c -> h d c", h=heads), by_head)


class _Plan(NamedTuple):
    """How x, weight and bias are cut before they are multiplied, made of a pattern of einops for `project`.

    Attributes:
        x: the pattern that makes (batch, tokens, features) of x; empty if it is that already.
        packed: names of the axes that are packed in the rows of the weight, in their order.
    """

    x: str
    packed: tuple[str, ...]

    def unpacked(self, t: Tensor, axes: dict[str, int]) -> Tensor:
        """(parts, heads, head_dim, ...) of (parts * heads * head_dim, ...), in whatever order they are packed."""
        sizes = [axes.get(name, -1) for name in self.packed]
        t = t.view(*sizes, *t.shape[1:])
        order = ("parts", "h", "d")
        return t if self.packed == order else t.movedim([self.packed.index(name) for name in order], (0, 1, 2))

    def part_of(self, y: Tensor, axes: dict[str, int], i: int) -> Tensor:
        """(batch, heads, tokens, head_dim) of one part, out of (batch, tokens, parts * heads * head_dim) in their order."""
        parts = self.packed.index("parts")
        part = y.view(*y.shape[:2], *[axes.get(name, -1) for name in self.packed]).select(2 + parts, i)
        heads_first = self.packed.index("h") < self.packed.index("d")
        return part.transpose(1, 2) if heads_first else part.permute(0, 3, 1, 2)


@lru_cache
def _plan(pattern: str) -> _Plan | None:
    """The plan of a pattern whose outcome is (parts, batch, heads, tokens, head_dim); None of others, which are not cut."""
    left, _, right = pattern.partition("->")
    out, packed = re.findall(_AXES, right), re.search(_PACKED, left)
    if packed is None or len(out) != 5 or (out[0], out[2], out[4]) != ("parts", "h", "d"):
        return None
    names = packed.group(1).split()
    if sorted(names) != ["d", "h", "parts"]:
        return None
    before, after = left.replace(packed.group(0), "c").split(), [*out[1].split(), *out[3].split(), "c"]
    return _Plan("" if before == after else f"{' '.join(before)} -> {out[1]} {out[3]} c", tuple(names))


def _lazily(
    layer: nn.Linear | nn.Conv2d, x: Tensor, pattern: str, plan: _Plan, parts: int, axes: dict[str, int]
) -> tuple[Tensor, ...]:
    """The first parts of a projection as `Projected`, which are not computed yet."""
    weight, bias = layer.weight, layer.bias
    weights = plan.unpacked(weight if weight.dim() == 2 else weight.flatten(1), axes).unbind()
    biases = [None] * len(weights) if bias is None else plan.unpacked(bias, axes).unbind()
    tokens = rearrange(x, plan.x, **{n: size for n, size in axes.items() if n not in plan.packed}) if plan.x else x

    def part(i: int) -> Callable[[Tensor], Tensor]:
        if plan.x:
            return lambda y: rearrange(y, pattern, **axes)[i]
        return lambda y: plan.part_of(y, axes, i)

    return tuple([Projected(tokens, weights[i], biases[i], Own(layer, x, part(i))) for i in range(parts)])


def scale_of(module: nn.Module) -> float | Tensor | None:
    """Look up what a module of timm's scales its scores by; None for head_dim ** -0.5, as on its fused path always."""
    # timm's fused path does not hand `scale` to the kernel, so one that was set by hand counts on the unfused path alone
    fused = getattr(module, "fused_attn", False)
    scale: float | Tensor = module.scale  # type: ignore[assignment]
    return None if fused else scale


def _rows(weight: Tensor, pattern: str, parts: int, of: int, axes: dict[str, int]) -> Union[slice, Tensor]:
    """Rows of a weight that make the first parts of a projection: a slice where they come first, else their numbers."""
    packed = re.search(_PACKED, pattern.split("->")[0])
    names = packed.group(1).split() if packed else ["parts"]
    if names[0] == "parts":
        return slice(len(weight) // of * parts)
    sizes = {name: size for name, size in axes.items() if name in names}
    rows = torch.arange(len(weight), device=weight.device)
    by_part = rearrange(rows, f"({' '.join(names)}) -> {' '.join(names)}", parts=of, **sizes)
    return by_part.narrow(names.index("parts"), 0, parts).reshape(-1)
