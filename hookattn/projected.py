"""Queries and keys that are not computed yet: x W^T + b, split into heads, cut to what is asked for before it is formed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, NamedTuple, TypeVar, Union

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

T = TypeVar("T")
Pick = Union[slice, Tensor]
"""What narrows one axis: a slice or a 1-d tensor of indices."""

ALL = slice(None)


class AwaitedError(Exception):
    """A projection is to be formed that a module is about to make itself.

    Attributes:
        layer: the layer that it will call.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__(f"waits for {type(layer).__name__}")
        self.layer = layer


class Heard:
    """What the layers of a module have put out since it was called.

    Args:
        given: the tensors it was called with.
    """

    def __init__(self, given: Sequence[Tensor]) -> None:
        self._given = given
        self._outputs: dict[nn.Module, Tensor] = {}

    def note(self, layer: nn.Module, x: Any, output: Any) -> bool:
        """Note what a layer makes of x, if that is what the module was called with."""
        if not self._is_given(x) or not isinstance(output, Tensor):
            return False
        self._outputs[layer] = output.detach()
        return True

    def output(self, own: Own) -> Tensor | None:
        """What a projection is taken from; None where the module makes it of something else than what it was called with.

        Raises:
            AwaitedError: the layer has not been called yet.
        """
        if not self._is_given(own.x):
            return None
        if own.layer not in self._outputs:
            raise AwaitedError(own.layer)
        return self._outputs[own.layer]

    def _is_given(self, x: Any) -> bool:
        return isinstance(x, Tensor) and any(x is t or _is_same(x, t) for t in self._given)


_heard: ContextVar[Heard | None] = ContextVar("heard", default=None)


@contextmanager
def hearing(heard: Heard) -> Iterator[None]:
    """Take projections from what was heard of a module's own layers, for as long as the block lasts."""
    token = _heard.set(heard)
    try:
        yield
    finally:
        _heard.reset(token)


class Own(NamedTuple):
    """Where a module has made a projection itself.

    Attributes:
        layer: the layer that it calls.
        x: what it calls it with.
        part: takes the projection from what the layer puts out.
    """

    layer: nn.Module
    x: Tensor
    part: Callable[[Tensor], Tensor]


class Projected(Tensor):
    """(batch, heads, tokens, head_dim), a linear projection of x that is formed once something is computed with it.

    To whoever computes with it, it is a tensor like any other. Its shape, dtype and device are known without forming it.

    Attributes:
        x: (batch, tokens, features).
        weight: (heads, head_dim, features).
        bias: (heads, head_dim), or None.
        own: where the module makes it itself; None where no layer does, and where it is narrowed.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    own: Own | None
    _formed: Tensor | None
    _cast: bool

    @staticmethod
    def __new__(
        cls,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        own: Own | None = None,
    ) -> Projected:
        shape = (len(x), len(weight), x.shape[1], weight.shape[1])
        device = x.device.type
        cast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device) and x.dtype != torch.float64
        dtype = torch.get_autocast_dtype(device) if cast else weight.dtype
        self = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=x.device)
        self._cast, self.x, self.weight, self.bias, self.own, self._formed = cast, x, weight, bias, own, None
        return self

    def narrowed(self, batch: Pick = ALL, heads: Pick = ALL, tokens: Pick = ALL) -> Tensor:
        """The same for some images, heads and tokens."""
        if batch is ALL and heads is ALL and tokens is ALL:
            return self
        if self._formed is not None:
            return self._formed[batch][:, heads][:, :, tokens]
        bias = None if self.bias is None else self.bias[heads]
        return Projected(self.x[batch][:, tokens], self.weight[heads], bias)

    def formed(self) -> Tensor:
        """The tensor itself; formed once.

        Raises:
            AwaitedError: the module is about to form it.
        """
        heard = _heard.get()
        if self._formed is None and heard is not None and self.own is not None:
            output = heard.output(self.own)
            self._formed = None if output is None else self.own.part(output)
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


def _is_same(x: Tensor, other: Tensor) -> bool:
    """Whether two tensors show the same memory in the same way, as a tensor and itself detached do."""
    if x.shape != other.shape or x.stride() != other.stride() or x.dtype != other.dtype:
        return False
    try:
        return x.data_ptr() == other.data_ptr() != 0
    except RuntimeError:  # a tensor without storage
        return False


def is_bare(*tensors: Tensor | None) -> bool:
    """Whether tensors are PyTorch's own, so that a projection of them is nothing but arithmetic."""
    return all(t is None or type(t) in (Tensor, nn.Parameter) for t in tensors)
