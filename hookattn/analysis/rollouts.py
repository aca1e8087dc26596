"""Rollout and relevance: maps of all layers as one."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce

import torch
from torch import Tensor

from ..maps.attention_map import AttentionMap
from .layers import LayerMaps, layers_in


def rollout(maps: LayerMaps, *, residual: float = 0.5) -> Tensor:
    """Attention rollout: how much of each input token reaches each token after the last layer.

    Each layer's map, averaged over heads, is mixed with the residual connection, A' = (1 - r) A + r I, and multiplied onto
    what the layers before it gave: R = A'_L ... A'_2 A'_1. The rows of every A' sum to 1, so those of R do.

    Args:
        maps: a recorder, or the maps of one forward, first layer first: `rec.maps`, or some of them. All have the same tokens
            as queries and as keys; attentions that run side by side in one block are taken for layers that follow each other.
        residual: r, the share that a token keeps of itself in every layer; 0.5 in the paper.

    Returns:
        (batch, tokens, tokens); row i says where token i comes from.

    Raises:
        ValueError: there are no maps, they are not square or not of one size, or the share is not within 0 to 1.

    Source: Abnar and Zuidema 2020, "Quantifying attention flow in transformers", equations 1 and 2.
    """
    return _product(maps, "rollout", residual, lambda m: m[...].mean(1))


def grad_rollout(maps: LayerMaps, *, residual: float = 0.5) -> Tensor:
    """Attention rollout of what speaks for a class: each map weighted by its gradient.

    As `rollout`, with the positive part of the gradient times the map, averaged over heads, in place of the mean map:
    E_h[(dL/dA * A)^+], each row divided by its sum, since gradients have no scale of their own. A row that is zero throughout
    passes a token on as it is. The rows of the result sum to 1.

    Args:
        maps: a recorder, or the maps of one forward, first layer first, recorded with `gradients=True`; backward has been
            called on what is to be explained, such as `logits[:, c].sum()`.
        residual: the share that a token keeps of itself in every layer.

    Returns:
        (batch, tokens, tokens); row i says where what token i has to say for the class comes from.

    Raises:
        ValueError: as `rollout`.
        RecorderError: the maps were not recorded with `gradients=True`.
        NoGradientError: no backward has reached one of them.

    Source: the layers of Chefer, Gur and Wolf 2021, "Generic attention-model explainability for interpreting bi-modal and
    encoder-decoder transformers", equation 5, in the product of Abnar and Zuidema 2020, equations 1 and 2.
    """
    return _product(maps, "grad_rollout", residual, lambda m: _rows_to_one(_relevant(m)))


def relevance(maps: LayerMaps) -> Tensor:
    """Relevance of each input token to each token after the last layer, for what backward was called on.

    R starts as the identity, and layer after layer R becomes R + E_h[(dL/dA * A)^+] R: the residual connection passes on what
    there was, and attention adds what it moved in favour of the class. Row 0 less its own place says what the class token's
    decision rests on.

    Args:
        maps: a recorder, or the maps of one forward, first layer first, recorded with `gradients=True`; backward has been
            called on what is to be explained, such as `logits[:, c].sum()`.

    Returns:
        (batch, tokens, tokens), in units of the gradient: rows do not sum to 1.

    Raises:
        ValueError: there are no maps, or they are not square or not of one size.
        RecorderError: the maps were not recorded with `gradients=True`.
        NoGradientError: no backward has reached one of them.

    Source: Chefer, Gur and Wolf 2021, "Generic attention-model explainability for interpreting bi-modal and encoder-decoder
    transformers", equations 5 and 6 (self-attention).
    """
    layers = _layers(maps, "relevance")
    return reduce(lambda before, m: before + _relevant(m) @ before, layers, _identity(layers[0]))


def _product(maps: LayerMaps, name: str, residual: float, layer: Callable[[AttentionMap], Tensor]) -> Tensor:
    """The product over layers, each mixed with the identity: (batch, tokens, tokens)."""
    layers = _layers(maps, name)
    if not 0 <= residual <= 1:
        raise ValueError(f"residual={residual} is no share: choose it between 0 and 1.")

    def mixed(m: AttentionMap) -> Tensor:
        return (1 - residual) * layer(m) + residual * _identity(m)

    # later layers from the left: row i of the product is then where token i comes from
    return reduce(lambda before, m: mixed(m) @ before, layers[1:], mixed(layers[0]))


def _layers(maps: LayerMaps, name: str) -> list[AttentionMap]:
    """The maps as a list, first layer first, if all have the same tokens as queries and as keys; else a ValueError."""
    # by axes as well as by sizes: windows are square and of one size too, and their product would mean nothing
    layers = layers_in(maps)
    pieces = next((m for m in layers if m.axes != ("batch", "head", "query", "key")), None)
    choose = f"Choose the layers: AttentionRecorder(model, layers=[...]) or {name}(rec.maps[:12])."
    if pieces is not None:
        raise ValueError(
            f"{name} needs maps from all tokens of an image to the same tokens; {pieces.name!r} is {' x '.join(pieces.axes)}. "
            f"{choose}"
        )
    sizes = {m.shape[2:] for m in layers}
    if len(sizes) != 1 or any(queries != keys for queries, keys in sizes):
        raise ValueError(
            f"{name} needs maps from all tokens to the same tokens; there are (queries, keys) = {sorted(sizes)}. {choose}"
        )
    return layers


def _relevant(m: AttentionMap) -> Tensor:
    """What a map moved in favour of what backward was called on: (batch, tokens, tokens), E_h[(dL/dA * A)^+]."""
    # clamped before the mean, as in the paper: heads that speak against the class must not cancel those that speak for it
    return (m.gradient[...] * m[...]).clamp(min=0).mean(1)


def _rows_to_one(relevant: Tensor) -> Tensor:
    """Rows divided by their sums; a row of zeros becomes that of the identity."""
    sums = relevant.sum(-1, keepdim=True)
    # no epsilon in the divisor: a row would lose more of its sum the smaller its gradient is
    identity = torch.eye(relevant.shape[-1], dtype=relevant.dtype, device=relevant.device)
    return torch.where(sums == 0, identity, relevant / sums)


def _identity(m: AttentionMap) -> Tensor:
    """The residual connection of a layer: (batch, tokens, tokens), of the dtype and on the device of its map."""
    return torch.eye(m.shape[-1], dtype=m.dtype, device=m.device).expand(m.shape[0], -1, -1)
