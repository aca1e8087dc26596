"""Queries or keys that are computed when they are needed, cut to what is asked for before."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .narrowing import ALL, EachToken, Pick, pick
from .overheard import heard_now
from .packed import Packed

T = TypeVar("T")
_FEW = 4  # tokens, up to which a projection takes as long as its weight takes to come from memory


class Projected(Tensor):
    """Queries or keys that are computed when they are needed: (batch, heads, tokens, head_dim), a linear projection of x.

    To whoever computes with it, such as a recipe, it is a tensor like any other. Until then it can be cut to some images, heads
    and tokens, and its shape, dtype and device are known. What is done to each token by itself waits as well: norms of PyTorch
    over head_dim, casts, and `do_by_token`.

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
    _after: tuple[EachToken, ...] = ()

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
        if torch._C._is_any_autocast_enabled():  # undocumented, torch 2.6 to 2.15
            device = x.device.type
            # autocast leaves float64 alone, and asked to cast to it would raise
            cast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device) and x.dtype != torch.float64
            dtype = torch.get_autocast_dtype(device) if cast else dtype
        # Undocumented, torch 2.6 to 2.15: makes a tensor that has a shape and no memory.
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

    @property
    def is_linear(self) -> bool:
        """Whether nothing is done to the projection."""
        return not self._after

    def then(self, each: EachToken) -> Tensor:
        """What becomes of it when something is done to each token, which waits as it does."""
        if self._cast or torch._C._is_any_autocast_enabled() or self._computed is not None:
            return each(self.compute())
        made = Projected.of(self.x, self.sizes[1::2], each.dtype or self.dtype, self._packed, self._number)
        if self._packed is None:
            made._given = self._given
        made._after = (*self._after, each)
        return made

    def narrowed(self, batch: Pick = ALL, heads: Pick = ALL) -> Tensor:
        """This projection for some images and heads; computed only if it was before, or was heard."""
        if batch is ALL and heads is ALL:
            return self
        if (whole := self.heard()) is not None:
            return pick(whole, batch, heads, ALL)
        # not packed any more: what the module's layer puts out is all of it, and a part is cheaper computed
        weight, bias = self._of_heads(heads)
        made = Projected.of(pick(self.x, batch, ALL, ALL), weight.shape[:2], self.dtype)
        made._given, made._after = (weight, bias), tuple([each.narrow(batch, heads) for each in self._after])
        return made

    def compute_part(self, batch: Pick, heads: Pick, tokens: Pick) -> Tensor:
        """Compute the projection of some images, heads and tokens and no more."""
        if (batch is ALL and heads is ALL and tokens is ALL) or self.heard() is not None:
            return pick(self.compute(), batch, heads, tokens)
        x = pick(self.x, batch, tokens, ALL)
        many = x.shape[0] * x.shape[1] > _FEW or self._cast or torch._C._is_any_autocast_enabled()
        return self._finish(self._compute(x, heads) if many else self._compute_few(x, heads), batch, heads, tokens)

    def compute(self) -> Tensor:
        """Compute the projection, once, or take it from what the module's own layer has put out, or is awaited to."""
        if self.heard() is None:
            self._computed = self._finish(self._compute(self.x, ALL))
        assert self._computed is not None
        return self._computed

    def heard(self) -> Tensor | None:
        """The projection if it is there: computed before, or put out by the module's own layer, or awaited of it."""
        heard = heard_now.get()
        if self._computed is None and heard is not None and self._packed is not None:
            own = self._packed.own(self._number)
            output = heard.output(own)
            self._computed = None if output is None else self._finish(own.part(output))
        return self._computed

    def _finish(self, vectors: Tensor, batch: Pick = ALL, heads: Pick = ALL, tokens: Pick = ALL) -> Tensor:
        """Do to projected vectors of some images, heads and tokens what is done to each."""
        if self._after:
            with self._modes():
                for each in self._after:
                    vectors = each.narrow(batch, heads, tokens)(vectors)
        return vectors

    def _of_heads(self, heads: Pick) -> tuple[Tensor, Tensor | None]:
        weight, bias = self.weight, self.bias
        if heads is ALL:
            return weight, bias
        return weight[heads], None if bias is None else bias[heads]

    def _compute(self, x: Tensor, heads: Pick) -> Tensor:
        weight, bias = self._flat(heads)
        if self._cast or torch._C._is_any_autocast_enabled():  # undocumented, torch 2.6 to 2.15
            with self._modes():
                y = F.linear(x, weight, bias)
        else:
            y = F.linear(x, weight, bias)
        batch, tokens, _ = x.shape
        width = self.sizes[3]
        return y.view(batch, tokens, weight.shape[0] // (width or 1), width).transpose(1, 2)

    def _compute_few(self, x: Tensor, heads: Pick) -> Tensor:
        """The same with the weight as the left factor, by heads: read once, it is a quarter faster where it is in no cache."""
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
            # Undocumented, torch 2.6 to 2.15 (the base class does the same): or the answer would come here again.
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args)
        if func in _BY_TOKEN and (done := _do_later(func, args, kwargs or {})) is not None:
            return done
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


_NORMS = (F.layer_norm, F.rms_norm, torch.layer_norm, torch.rms_norm)
_BY_TOKEN = {*_NORMS, Tensor.to}


def _do_later(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """A norm over head_dim, or a cast, of a projection that is not computed yet; None for what is done with all of it."""
    if not args or not isinstance(args[0], Projected):
        return None
    vectors: Projected = args[0]
    rest = args[1:]
    if func is Tensor.to:
        if kwargs or len(rest) != 1 or not isinstance(rest[0], torch.dtype):
            return None
        return vectors if rest[0] is vectors.dtype else vectors.then(EachToken(lambda t: t.to(rest[0]), dtype=rest[0]))
    shape, *_ = (*rest, *[kwargs[name] for name in kwargs if name == "normalized_shape"])
    parameters = [each for each in (*rest, *kwargs.values()) if isinstance(each, Tensor)]
    if tuple(shape) != (vectors.sizes[3],) or not all(each.dtype is vectors.dtype for each in parameters):
        return None
    return vectors.then(EachToken(lambda t: func(t, *rest, **kwargs)))


def do_by_token(vectors: Tensor, each: EachToken) -> Tensor:
    """Do something to each token of (batch, heads, tokens, head_dim) by itself, later where it is not computed yet."""
    return vectors.then(each) if isinstance(vectors, Projected) else each(vectors)


def compute(value: T) -> T:
    """The tensor that a `Projected` stands for, computed if it was not yet; anything else as it is."""
    return value.compute() if isinstance(value, Projected) else value  # type: ignore[return-value]


def _with_computed(argument: Any) -> Any:
    """An argument of a function of torch, with what is computed in the place of projections."""
    if type(argument) in (tuple, list):
        return type(argument)(map(_with_computed, argument))
    return compute(argument)


def sizes_of(tensor: Tensor) -> tuple[int, ...]:
    """The shape of a tensor, of one that is not computed without a question to PyTorch."""
    return tensor.sizes if isinstance(tensor, Projected) else tensor.shape
