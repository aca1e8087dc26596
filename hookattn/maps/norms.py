"""Norms that a forward calls, as what is linear in them and what they divide by."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..attention.sources import exact_dtype


class Norm(NamedTuple):
    """A call of a norm, as what it takes off, what it divides by, and what it does then.

    Attributes:
        x: what is normalised.
        axes: over which.
        centres: whether the mean is taken off.
        weight, bias: what is multiplied and added then.
        eps: what is added to the variance.
    """

    x: Tensor
    axes: tuple[int, ...]
    centres: bool
    weight: Tensor | None
    bias: Tensor | None
    eps: float

    @staticmethod
    def of(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Norm | None:
        """The norm that a function of torch is, if it is one over the last axes."""
        if name not in ("layer_norm", "rms_norm"):
            return None
        names = ("input", "normalized_shape", "weight", *(("bias",) if name == "layer_norm" else ()), "eps")
        given = {**dict(zip(names, args)), **kwargs}
        x, eps = given["input"], given.get("eps", 1e-5 if name == "layer_norm" else None)
        axes = tuple(range(-len(given["normalized_shape"]), 0))
        eps = torch.finfo(x.dtype).eps if eps is None else eps
        return Norm(x, axes, name == "layer_norm", given.get("weight"), given.get("bias"), eps)

    def scale(self) -> Tensor:
        """What is divided by."""
        return (self._centred().square().mean(self.axes, keepdim=True) + self.eps).sqrt()

    def divided_by(self, scale: Tensor) -> Tensor:
        """What comes out with another scale: linear in what is normalised, but for the bias."""
        out = self._centred() / scale
        out = out if self.weight is None else out * self.weight
        return out if self.bias is None else out + self.bias

    def then(self, weight: Tensor) -> Tensor:
        """What it does besides dividing and a projection (dim, width) after it, as one matrix (width, dim)."""
        matrix = weight.T if self.weight is None else weight.T * self.weight.flatten()[:, None].to(weight.dtype)
        return matrix - matrix.mean(0, keepdim=True) if self.centres else matrix

    def _centred(self) -> Tensor:
        x = self.x.to(exact_dtype(self.x.dtype))
        return x - x.mean(self.axes, keepdim=True) if self.centres else x
