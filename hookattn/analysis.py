"""Pure functions of maps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import reduce
from typing import Union

import torch
from torch import Tensor

from .maps import AttentionMap

Maps = Union[Mapping[str, AttentionMap], Iterable[AttentionMap]]


def rollout(maps: Maps, *, residual: float = 0.5) -> Tensor:
    """Attention rollout: how much of each input token reaches each token after the last layer.

    Each layer's map, averaged over heads, is mixed with the residual connection, A' = (1 - r) A + r I, and multiplied onto
    what the layers before it gave: R = A'_L ... A'_2 A'_1. The rows of every A' sum to 1, so those of R do.

    Args:
        maps: the maps of one forward, first layer first: `rec.maps`, or some of them. All have the same tokens as queries and
            as keys.
        residual: r, the share that a token keeps of itself in every layer; 0.5 in the paper.

    Returns:
        (batch, tokens, tokens); row i says where token i comes from.

    Raises:
        ValueError: there are no maps, they are not square or not of one size, or the share is not within 0 to 1.

    Source: Abnar and Zuidema 2020, "Quantifying attention flow in transformers", equations 1 and 2.
    """
    layers = list(maps.values() if isinstance(maps, Mapping) else maps)
    pieces = next((m for m in layers if m.axes != ("batch", "head", "query", "key")), None)
    if pieces is not None:
        raise ValueError(
            f"rollout needs maps from all tokens of an image to the same tokens; {pieces.name!r} is {' x '.join(pieces.axes)}. "
            "Choose the layers: AttentionRecorder(model, layers=[...]) or rollout(rec.maps[:12])."
        )
    sizes = {m.shape[2:] for m in layers}
    if len(sizes) != 1 or any(queries != keys for queries, keys in sizes):
        raise ValueError(
            f"rollout needs maps from all tokens to the same tokens; there are (queries, keys) = {sorted(sizes)}. Choose the "
            "layers: AttentionRecorder(model, layers=[...]) or rollout(rec.maps[:12])."
        )
    if not 0 <= residual <= 1:
        raise ValueError(f"residual={residual} is no share: choose it between 0 and 1.")
    return reduce(lambda before, m: _with_residual(m, residual) @ before, layers[1:], _with_residual(layers[0], residual))


def _with_residual(m: AttentionMap, residual: float) -> Tensor:
    """(batch, tokens, tokens): the head mean, mixed with the identity."""
    attention = m[...].mean(1)
    return (1 - residual) * attention + residual * torch.eye(m.shape[-1], dtype=attention.dtype, device=attention.device)
