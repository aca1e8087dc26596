"""Queries and keys as linear projections x W^T + b, cut to what is asked for before they are computed."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar, Union

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .layers import is_plain_conv, is_plain_linear, is_pointwise
from .overheard import heard_now
from .packed import PACKED, Packed, plan_of

T = TypeVar("T")
Pick = Union[slice, Tensor]
"""What narrows one axis: a slice or a 1-d tensor of indices."""
ALL = slice(None)
_FEW = 4  # tokens, up to which a projection by heads is at most as slow as one of all of them, and up to twice as fast


class Projected(Tensor):
    """Queries or keys that are computed when they are needed: (batch, heads, tokens, head_dim), a linear projection of x.

    To whoever computes with it, such as a recipe, it is a tensor like any other. Until then it can be cut to some images, heads
    and tokens, and its shape, dtype and device are known.

    Attributes:
        x: (batch, tokens, features).
        sizes: its shape, without a question to PyTorch.
    """

    x: Tensor
    sizes: tuple[int, int, int, int]
    _given: tuple[Tensor, Tensor | None]
    _packed: Packed | None  # with others in a layer of the module
    _number: int
    _computed: Tensor | None
    _cast: bool

    @staticmethod
    def __new__(cls, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Projected:
        """A projection by weight (heads, head_dim, features) and bias (heads, head_dim), or None."""
        self = Projected.of(x, weight.shape[:2], weight.dtype)
        self._given = weight, bias
        return self

    @staticmethod
    def of(x: Tensor, sizes: Sequence[int], dtype: torch.dtype, packed: Packed | None = None, number: int = 0) -> Projected:
        """A projection to (heads, head_dim) of this dtype, by rows that it is given later or that a layer packs with others."""
        batch, tokens, _ = x.shape
        heads, width = sizes
        shape, cast = (batch, heads, tokens, width), False
        if torch._C._is_any_autocast_enabled():  # undocumented, torch 2.6 to 2.14
            device = x.device.type
            # autocast leaves float64 alone, and asked to cast to it would raise
            cast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device) and x.dtype != torch.float64
            dtype = torch.get_autocast_dtype(device) if cast else dtype
        # Undocumented, torch 2.6 to 2.14: makes a tensor that has a shape and no memory.
        self = Tensor._make_wrapper_subclass(Projected, shape, dtype=dtype, device=x.device)
        self.x, self.sizes, self._cast, self._computed, self._packed, self._number = x, shape, cast, None, packed, number
        return self

    @property
    def weight(self) -> Tensor:
        """(heads, head_dim, features)."""
        return self._given[0] if self._packed is None else self._packed.cut(self._packed.weight, self._number)

    @property
    def bias(self) -> Tensor | None:
        """(heads, head_dim), or None."""
        if self._packed is None:
            return self._given[1]
        return None if self._packed.bias is None else self._packed.cut(self._packed.bias, self._number)

    def narrowed(self, batch: Pick = ALL, heads: Pick = ALL) -> Tensor:
        """This projection for some images and heads; computed only if it was before, or was heard."""
        if batch is ALL and heads is ALL:
            return self
        if (whole := self.heard()) is not None:
            return pick(whole, batch, heads, ALL)
        # not packed any more: what the module's layer puts out is all of it, and a part is cheaper computed
        return Projected(pick(self.x, batch, ALL, ALL), *self._of_heads(heads))

    def compute_part(self, batch: Pick, heads: Pick, tokens: Pick) -> Tensor:
        """Compute the projection of some images, heads and tokens and no more."""
        if (batch is ALL and heads is ALL and tokens is ALL) or self.heard() is not None:
            return pick(self.compute(), batch, heads, tokens)
        x = pick(self.x, batch, tokens, ALL)
        if x.shape[0] * x.shape[1] > _FEW or self._cast or torch._C._is_any_autocast_enabled():
            return self._compute(x, heads)
        return self._compute_few(x, heads)

    def compute(self) -> Tensor:
        """Compute the projection, once, or take it from what the module's own layer has put out, or is awaited to."""
        if self.heard() is None:
            self._computed = self._compute(self.x, ALL)
        assert self._computed is not None
        return self._computed

    def heard(self) -> Tensor | None:
        """The projection if it is there: computed before, or put out by the module's own layer, or awaited of it."""
        heard = heard_now.get()
        if self._computed is None and heard is not None and self._packed is not None:
            own = self._packed.own(self._number)
            output = heard.output(own)
            self._computed = None if output is None else own.part(output)
        return self._computed

    def _of_heads(self, heads: Pick) -> tuple[Tensor, Tensor | None]:
        weight, bias = self.weight, self.bias
        if heads is ALL:
            return weight, bias
        return weight[heads], None if bias is None else bias[heads]

    def _compute(self, x: Tensor, heads: Pick) -> Tensor:
        weight, bias = self._flat(heads)
        if self._cast or torch._C._is_any_autocast_enabled():  # undocumented, torch 2.6 to 2.14
            with self._modes():
                y = F.linear(x, weight, bias)
        else:
            y = F.linear(x, weight, bias)
        batch, tokens, _ = x.shape
        width = self.sizes[3]
        return y.view(batch, tokens, weight.shape[0] // (width or 1), width).transpose(1, 2)

    def _compute_few(self, x: Tensor, heads: Pick) -> Tensor:
        """The same of a few tokens, which takes as long as it takes to read the weight: that is the left factor, by heads."""
        weight, bias = self._flat(heads)
        (batch, tokens, features), width = x.shape, self.sizes[3]
        own = weight.shape[0] // (width or 1)
        by_head = weight.view(own, width, features)
        columns = (x if batch == 1 else x.reshape(1, -1, features)).mT.expand(own, -1, -1)
        y = by_head.bmm(columns) if bias is None else torch.baddbmm(bias.view(own, width, 1), by_head, columns)
        return y.view(own, width, batch, tokens).permute(2, 0, 3, 1)

    def _flat(self, heads: Pick) -> tuple[Tensor, Tensor | None]:
        """(heads * head_dim, features) and (heads * head_dim) of the weight and the bias."""
        if (packed := self._packed) is not None and heads is ALL:
            bias = None if packed.bias is None else packed.flat(packed.bias, self._number)
            return packed.flat(packed.weight, self._number), bias
        weight, by_head = self._of_heads(heads)
        return weight.flatten(0, 1), None if by_head is None else by_head.flatten()

    def _modes(self) -> AbstractContextManager[None]:
        """Autocast as it was when this was made, for the product: it may be off by now, as for the softmax."""
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
    return {*map(type, tensors)} <= _BARE


def pick(tensor: Tensor, batch: Pick, heads: Pick, rows: Pick) -> Tensor:
    """Some entries along the first three axes of a tensor, each on its own."""
    if batch is not ALL:
        tensor = tensor[batch]
    if heads is not ALL:
        tensor = tensor[:, heads]
    return tensor if rows is ALL else tensor[:, :, rows]


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
