"""Queries and keys that are not computed yet: x W^T + b, split into heads, cut to what is asked for before it is formed."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar, Union

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

T = TypeVar("T")
Pick = Union[slice, Tensor]
"""What narrows one axis: a slice or a 1-d tensor of indices."""

ALL = slice(None)


class Projected(Tensor):
    """(batch, heads, tokens, head_dim), a linear projection of x that is formed once something is computed with it.

    To whoever computes with it, it is a tensor like any other. Its shape, dtype and device are known without forming it.

    Attributes:
        x: (batch, tokens, features).
        weight: (heads, head_dim, features).
        bias: (heads, head_dim), or None.
        own: the layer that a module calls for this, with what takes it from the output of that layer; None where there is
            none, or where it is narrowed.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    own: tuple[nn.Module, Callable[[Tensor], Tensor]] | None
    _formed: Tensor | None
    _cast: bool

    @staticmethod
    def __new__(
        cls,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        own: tuple[nn.Module, Callable[[Tensor], Tensor]] | None = None,
    ) -> Projected:
        shape = (len(x), len(weight), x.shape[1], weight.shape[1])
        device = x.device.type
        cast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if cast and x.dtype != torch.float64 else weight.dtype
        self = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=x.device)
        self._cast, self.x, self.weight, self.bias, self.own, self._formed = cast, x, weight, bias, own, None
        return self

    def narrowed(self, batch: Pick = ALL, heads: Pick = ALL, tokens: Pick = ALL) -> Tensor:
        """The same for some images, heads and tokens."""
        if self._formed is not None:
            return self._formed[batch][:, heads][:, :, tokens]
        bias = None if self.bias is None else self.bias[heads]
        return Projected(self.x[batch][:, tokens], self.weight[heads], bias)

    def formed(self) -> Tensor:
        """The tensor itself; formed once."""
        if self._formed is None:
            bias = None if self.bias is None else self.bias.flatten()
            with self._modes():
                y = F.linear(self.x, self.weight.flatten(0, 1), bias)
            self._formed = y.view(*self.x.shape[:2], *self.weight.shape[:2]).transpose(1, 2)
        return self._formed

    def _modes(self) -> AbstractContextManager[None]:
        """Autocast as it was when this was made."""
        device = self.x.device.type
        if not torch.amp.is_autocast_available(device) or self._cast == torch.is_autocast_enabled(device):
            return nullcontext()
        return torch.autocast(device, self.dtype if self._cast else None, enabled=self._cast)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _ABOUT:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args)
        args, kwargs = pytree.tree_map_only(Projected, Projected.formed, (args, kwargs or {}))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, *_: Any) -> Any:
        raise TypeError(f"{func} was called with a projection that is not formed; give it q * 1 instead of q.")


_ABOUT = {
    *(getattr(Tensor, name).__get__ for name in ("shape", "ndim", "dtype", "device", "is_cuda", "layout", "is_meta")),
    *(getattr(Tensor, name) for name in ("size", "dim", "numel", "nelement", "is_floating_point", "is_complex", "__len__")),
}


def formed(value: T) -> T:
    """A tensor itself, formed if it was not."""
    return value.formed() if isinstance(value, Projected) else value  # type: ignore[return-value]


def is_bare(*tensors: Tensor | None) -> bool:
    """Whether tensors are PyTorch's own, so that a projection of them is nothing but arithmetic."""
    return all(t is None or type(t) in (Tensor, nn.Parameter) for t in tensors)
