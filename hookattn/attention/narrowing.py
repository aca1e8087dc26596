"""Cutting to some images, heads and tokens; and what is done to each token by itself, which can wait until that is cut."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Union

import torch
from torch import Tensor

Pick = Union[slice, Tensor]
"""What narrows one axis: a slice or a 1-d tensor of indices."""
ALL = slice(None)


def pick(tensor: Tensor, batch: Pick, heads: Pick, rows: Pick) -> Tensor:
    """Some entries along the first three axes of a tensor, each on its own."""
    if batch is not ALL:
        tensor = tensor[batch]
    if heads is not ALL:
        tensor = tensor[:, heads]
    return tensor if rows is ALL else tensor[:, :, rows]


@dataclass(frozen=True, eq=False)
class EachToken:
    """What is done to queries or keys token by token and head by head: a norm, a rotation, a cast.

    Attributes:
        function: of (batch, heads, tokens, head_dim), and of these tensors; makes as much.
        tensors: that belong to tokens, heads or images; each has four axes, of one entry where they are alike.
        dtype: of what it makes; None for that of what it is given.
        prefix: how many tokens come first to which it is not done, and of which the tensors know nothing.
    """

    function: Callable[..., Tensor]
    tensors: tuple[Tensor, ...] = ()
    dtype: torch.dtype | None = None
    prefix: int = 0

    def __call__(self, vectors: Tensor) -> Tensor:
        if not self.prefix:
            return self.function(vectors, *self.tensors)
        first = vectors[:, :, : self.prefix].to(self.dtype or vectors.dtype)
        if vectors.shape[2] <= self.prefix:
            return first
        return torch.cat((first, self.function(vectors[:, :, self.prefix :], *self.tensors)), dim=2)

    def narrow(self, batch: Pick = ALL, heads: Pick = ALL, tokens: Pick = ALL) -> EachToken:
        """The same for some images, heads and tokens."""
        if not self.tensors and not self.prefix:
            return self
        prefix, function = self.prefix, self.function
        if prefix and tokens is not ALL:
            count = prefix + max(tensor.shape[2] for tensor in self.tensors)
            if isinstance(tokens, slice) and tokens.indices(count)[2] == 1:
                start, stop, _ = tokens.indices(count)
                prefix = max(0, min(self.prefix, stop) - start)
                tokens = slice(max(0, start - self.prefix), max(0, stop - self.prefix))
            else:
                numbers = torch.arange(count, device=self.tensors[0].device)[tokens] - prefix
                function, prefix = partial(_do_to_some, function, numbers[:, None] >= 0), 0
                tokens = numbers.clamp(min=0)
        tensors = tuple([_pick_own(tensor, (batch, heads, tokens)) for tensor in self.tensors])
        return EachToken(function, tensors, self.dtype, prefix)


def _do_to_some(function: Callable[..., Tensor], some: Tensor, vectors: Tensor, *tensors: Tensor) -> Tensor:
    done = function(vectors, *tensors)
    return torch.where(some, done, vectors.to(done.dtype))


def _pick_own(tensor: Tensor, picks: tuple[Pick, Pick, Pick]) -> Tensor:
    batch, heads, tokens = (ALL if size == 1 else each for size, each in zip(tensor.shape, picks))
    return pick(tensor, batch, heads, tokens)
