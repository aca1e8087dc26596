"""All kinds of things that a module may be called with, as its tokens or beside them."""

from __future__ import annotations

import collections
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.masked import masked_tensor
from torch.utils import _pytree as pytree

SHAPE = (2, 6, 32)


def tokens(*size: int) -> Tensor:
    return torch.randn(size or SHAPE)


class Strange(Tensor):
    """A subclass that lets nobody ask it for anything but what it is asked for here."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in (Tensor.requires_grad.__get__, Tensor.is_nested.__get__):  # type: ignore[attr-defined]
            raise ArithmeticError(f"nobody asks a Strange for {func.__name__}")
        return super().__torch_function__(func, types, args, kwargs or {})


class Named(Tensor):
    """A subclass that goes on through every function."""


class Wrapper(Tensor):
    """A subclass that holds another tensor and sees operators, as quantised and sharded ones do."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapper:
        out: Wrapper = Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)  # type: ignore[attr-defined]
        out.inner = inner
        return out

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = pytree.tree_map_only(Wrapper, lambda t: t.inner, (args, kwargs or {}))
        return pytree.tree_map_only(Tensor, Wrapper, func(*args, **kwargs))


class Closed(Wrapper):
    """One that knows no operator."""

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise ArithmeticError(f"a Closed knows no {func}")


class Locked:
    """An object that has nothing to say."""

    def __getattribute__(self, name: str) -> Any:
        raise RuntimeError(f"nobody asks a Locked for {name}")


class Slots:
    __slots__ = ("a", "b")

    def __init__(self) -> None:
        self.a, self.b = tokens(), None


class SlotsCache(Slots):
    """A cache by its method, which cannot be copied by its dict."""

    __slots__ = ()

    def update(self, key: Tensor) -> Tensor:
        return key


class Cache:
    """Keys of earlier calls."""

    def __init__(self) -> None:
        self.keys: list[Tensor] = [tokens(2, 3, 32)]

    def update(self, key: Tensor) -> Tensor:
        self.keys.append(key)
        return torch.cat(self.keys, 1)


class Uncopied(Cache):
    def __copy__(self) -> Any:
        raise ArithmeticError("nobody copies an Uncopied")


@dataclass
class Held:
    x: Tensor = field(default_factory=tokens)
    number: int = 3


Pair = collections.namedtuple("Pair", "x y")


def ring() -> list[Any]:
    made: list[Any] = []
    made.append(made)
    return made


def in_inference_mode() -> Tensor:
    with torch.inference_mode():
        return tokens()


def nested(layout: torch.layout) -> Tensor:
    return torch.nested.nested_tensor([tokens(3, 32), tokens(5, 32)], layout=layout)


KINDS: dict[str, Callable[[], Any]] = {
    "plain": tokens,
    "jagged": lambda: nested(torch.jagged),
    "nested": lambda: nested(torch.strided),
    "coo": lambda: tokens().relu().to_sparse(),
    "csr": lambda: torch.eye(6).to_sparse_csr(),
    "csr of images": lambda: torch.eye(6).expand(2, 6, 6).to_sparse_csr(),
    "meta": lambda: torch.empty(SHAPE, device="meta"),
    "fake": lambda: FakeTensorMode().from_tensor(tokens()),
    "quantised": lambda: torch.quantize_per_tensor(tokens(), 0.1, 0, torch.qint8),
    "masked": lambda: masked_tensor(tokens(), tokens() > 0),
    "strange": lambda: tokens().as_subclass(Strange),
    "subclass": lambda: tokens().as_subclass(Named),
    "wrapper": lambda: Wrapper(tokens()),
    "closed": lambda: Closed(tokens()),
    "complex": lambda: torch.randn(SHAPE, dtype=torch.complex64),
    "conjugate": lambda: torch.randn(SHAPE, dtype=torch.complex64).conj(),
    "negative": lambda: torch.randn(SHAPE, dtype=torch.complex64).conj().imag,
    "whole numbers": lambda: torch.randint(3, SHAPE),
    "bits": lambda: tokens() > 0,
    "a mask": lambda: torch.ones(6, 6, dtype=torch.bool).tril(),
    "a float mask": lambda: torch.zeros(6, 6).masked_fill(torch.ones(6, 6).triu(1) > 0, -torch.inf),
    "a padding mask": lambda: torch.tensor([[False] * 6, [False] * 4 + [True] * 2]),
    "half": lambda: tokens().half(),
    "double": lambda: tokens().double(),
    "no image": lambda: tokens(0, 6, 32),
    "no token": lambda: tokens(2, 0, 32),
    "one token": lambda: tokens(2, 1, 32),
    "nothing": lambda: torch.empty(0),
    "a number": lambda: torch.tensor(3.0),
    "two axes": lambda: tokens(6, 32),
    "four axes": lambda: tokens(2, 2, 6, 32),
    "five axes": lambda: tokens(1, 2, 2, 6, 32),
    "other channels": lambda: tokens(2, 6, 31),
    "transposed": lambda: tokens(2, 32, 6).mT,
    "expanded": lambda: tokens(1, 6, 32).expand(2, 6, 32),
    "strided": lambda: tokens(2, 12, 64)[:, ::2, ::2],
    "wants a gradient": lambda: tokens().requires_grad_(),
    "in a graph": lambda: tokens().requires_grad_() * 2,
    "a parameter": lambda: torch.nn.Parameter(tokens()),
    "of inference mode": in_inference_mode,
    "infinite": lambda: tokens().masked_fill(torch.arange(32) == 3, torch.inf),
    "not a number": lambda: tokens() * torch.nan,
    "an array": lambda: np.ones(SHAPE, np.float32),
    "a list": lambda: [tokens(), {"a": tokens(), "b": [None]}],
    "a tuple": lambda: (tokens(), tokens()),
    "a dict": lambda: {"x": tokens(), 3: "three"},
    "an ordered dict": lambda: collections.OrderedDict(x=tokens()),
    "a named tuple": lambda: Pair(tokens(), 2),
    "a data class": Held,
    "slots": Slots,
    "slots that are a cache": SlotsCache,
    "a cache": Cache,
    "a cache that is not copied": Uncopied,
    "locked": Locked,
    "a generator": lambda: (i for i in range(3)),
    "a ring": ring,
    "None": lambda: None,
    "a string": lambda: "cls",
    "bytes": lambda: b"cls",
    "a huge number": lambda: 10**400,
    "a function": lambda: len,
    "a class": lambda: Tensor,
    "a module": lambda: torch.nn.Linear(3, 3),
    "an ellipsis": lambda: ...,
}
if hasattr(Tensor, "refine_names"):  # newer PyTorch has none
    KINDS["named"] = lambda: tokens().refine_names("N", "T", "C")
