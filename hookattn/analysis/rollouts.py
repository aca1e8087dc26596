"""Rollout and relevance: maps of all layers as one, or what one query has of all layers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, reduce

import torch
from torch import Tensor

from ..attention.narrowing import ALL, Pick
from ..conditions.autocast import without_autocast
from ..image.tokens import Query
from ..maps.attention_map import AttentionMap
from .layers import LayerMaps, find_gap, layers_in

Mixed = Callable[[AttentionMap], Tensor]
"""Makes of a map what is multiplied: (batch, tokens, tokens)."""


def rollout(
    maps: LayerMaps, query: Query | None = None, *, residual: float = 0.5, discard: float = 0.0, gaps: bool = False
) -> Tensor:
    """Attention rollout: how much of each input token reaches each token after the last layer.

    Each layer's map, averaged over heads, is mixed with the residual connection, A' = (1 - r) A + r I, and multiplied onto
    what the layers before it gave: R = A'_L ... A'_2 A'_1. The rows of every A' sum to 1, so those of R do.

    The row of one query passes through the layers as a vector, from the last to the first: maps are then taken a chunk at a
    time, and no product of matrices is formed.

        rollout(rec, "cls")                    # (batch, tokens): where the class token comes from
        rollout(rec)                           # (batch, tokens, tokens): where each token does

    Args:
        maps: a recorder, or the maps of one forward, first layer first: `rec.maps`, or some of them. All have the same tokens
            as queries and as keys; attentions that run side by side in one block are taken for layers that follow each other.
        query: as in `AttentionMap.image`, of the tokens after the last layer; None for all of them.
        residual: r, the share that a token keeps of itself in every layer; 0.5 in the paper.
        discard: of each image's mean map in each layer, the share of entries, the smallest, that are taken for 0; what is left
            of a row is brought to a sum of 1. Not in the paper, but in code that is in wide use. Maps are then held whole, one
            layer at a time.
        gaps: True where layers between those given may be missing; else that is an error, as far as names tell.

    Returns:
        (batch, tokens, tokens); row i says where token i comes from. With a query (batch, tokens), its row.

    Raises:
        ValueError: there are no maps, they are not square or not of one size, layers between them are missing, or a share is
            not within 0 to 1.
        TokenError: there is no such query.

    Source: Abnar and Zuidema 2020, "Quantifying attention flow in transformers", equations 1 and 2.
    """
    layers = _layers(maps, "rollout", gaps)
    _check_share("residual", residual)
    _check_share("discard", discard)
    if query is not None and not discard:
        return roll_row(layers, query, residual=residual)
    return _multiplied(layers, query, _mixing(residual, lambda m: _without_smallest(m[...].mean(1), discard)))


def roll_row(layers: list[AttentionMap], query: Query, *, residual: float = 0.5, batch: Pick = ALL) -> Tensor:
    """The row of a query in the rollout of maps that are known to fit, for some images: (images, tokens)."""
    row = start_of(layers[-1], query)[batch]
    for m in reversed(layers):
        row = residual * row + (1 - residual) * _pass_back(m, row, batch)
    return row.to(layers[-1].dtype)


def grad_rollout(maps: LayerMaps, query: Query | None = None, *, residual: float = 0.5, gaps: bool = False) -> Tensor:
    """Attention rollout of what speaks for a class: each map weighted by its gradient.

    As `rollout`, with the positive part of the gradient times the map, averaged over heads, in place of the mean map:
    E_h[(dL/dA * A)^+], each row divided by its sum, since gradients have no scale of their own. A row that is zero throughout
    passes a token on as it is. The rows of the result sum to 1.

    Args:
        maps: a recorder, or the maps of one forward, first layer first, recorded with `gradients=True`; backward has been
            called on what is to be explained, such as `logits[:, c].sum()`.
        query: as in `AttentionMap.image`, of the tokens after the last layer; None for all of them.
        residual: the share that a token keeps of itself in every layer.
        gaps: True where layers between those given may be missing.

    Returns:
        (batch, tokens, tokens); row i says where what token i has to say for the class comes from. With a query
        (batch, tokens), its row, for which no product of matrices is formed.

    Raises:
        ValueError, TokenError: as `rollout`.
        RecorderError: the maps were not recorded with `gradients=True`.
        NoGradientError: no backward has reached one of them.

    Source: the layers of Chefer, Gur and Wolf 2021, "Generic attention-model explainability for interpreting bi-modal and
    encoder-decoder transformers", equation 5, in the product of Abnar and Zuidema 2020, equations 1 and 2.
    """
    layers = _layers(maps, "grad_rollout", gaps)
    _check_share("residual", residual)
    return _multiplied(layers, query, _mixing(residual, lambda m: _rows_to_one(_relevant(m))))


def relevance(maps: LayerMaps, query: Query | None = None, *, gaps: bool = False) -> Tensor:
    """Relevance of each input token to each token after the last layer, for what backward was called on.

    R starts as the identity, and layer after layer R becomes R + E_h[(dL/dA * A)^+] R: the residual connection passes on what
    there was, and attention adds what it moved in favour of the class. Row 0 less its own place says what the class token's
    decision rests on.

    Args:
        maps: a recorder, or the maps of one forward, first layer first, recorded with `gradients=True`; backward has been
            called on what is to be explained, such as `logits[:, c].sum()`.
        query: as in `AttentionMap.image`, of the tokens after the last layer; None for all of them.
        gaps: True where layers between those given may be missing.

    Returns:
        (batch, tokens, tokens), in units of the gradient: rows do not sum to 1. With a query (batch, tokens), its row, for
        which no product of matrices is formed.

    Raises:
        ValueError, TokenError: as `rollout`.
        RecorderError: the maps were not recorded with `gradients=True`.
        NoGradientError: no backward has reached one of them.

    Source: Chefer, Gur and Wolf 2021, "Generic attention-model explainability for interpreting bi-modal and encoder-decoder
    transformers", equations 5 and 6 (self-attention).
    """
    return _multiplied(_layers(maps, "relevance", gaps), query, lambda m: _identity(m) + _relevant(m))


def _check_share(name: str, share: float) -> None:
    if not 0 <= share <= 1:
        raise ValueError(f"{name}={share} is no share: choose it between 0 and 1.")


def _mixing(residual: float, layer: Mixed) -> Mixed:
    """What a layer passes on, with what a token keeps of itself."""
    return lambda m: (1 - residual) * layer(m) + residual * _identity(m)


def _multiplied(layers: list[AttentionMap], query: Query | None, mixed: Mixed) -> Tensor:
    """The product over layers, (batch, tokens, tokens), or the row of a query in it, (batch, tokens)."""
    # later layers from the left: row i of the product is then where token i comes from; layers may lie on several devices
    if query is None:
        return reduce(lambda before, m: mixed(m) @ before.to(m.device), layers[1:], mixed(layers[0]))
    start = start_of(layers[-1], query)[:, None].to(layers[-1].dtype)
    return reduce(lambda row, m: row @ mixed(m).to(row.device), reversed(layers), start).squeeze(1)


def start_of(m: AttentionMap, query: Query) -> Tensor:
    """(batch, tokens): the share of each token in a query, 1 for one token, the same for all patches of "mean"."""
    shares = torch.zeros(m.shape[0], m.shape[2], dtype=torch.promote_types(m.dtype, torch.float32), device=m.device)
    if isinstance(query, int):  # for which nothing has to be known of tokens
        shares[:, query] = 1.0
        return shares
    selected = m.query_tokens.select(query).flatten(1).to(shares)
    return shares + selected / selected.sum(-1, keepdim=True)


def _pass_back(m: AttentionMap, row: Tensor, batch: Pick) -> Tensor:
    """What shares of queries have of each key, (images, tokens), by the mean over heads; a chunk of it is there at a time."""
    passed, asked = torch.zeros_like(row), (row.detach() != 0).any(0).nonzero().flatten()
    if not len(asked):  # no images
        return passed
    first, last = int(asked[0]), int(asked[-1]) + 1  # of the last layer, the rows that are asked for

    def add(passed: Tensor, items: slice, rows: slice, chunk: Tensor) -> None:
        with without_autocast(chunk.device):
            weights = row[items, first + rows.start : first + rows.stop].to(chunk)
            passed[items] += torch.einsum("bq,bhqk->bk", weights, chunk).to(passed) / m.shape[1]

    m.visit(partial(add, passed), batch, rows=slice(first, last))
    return passed


def _without_smallest(mean: Tensor, discard: float) -> Tensor:
    """(batch, tokens, tokens) with the smallest entries of each image zero, and rows that sum to 1 again."""
    if not (count := int(discard * mean.shape[1] * mean.shape[2])):
        return mean
    smallest = mean.flatten(1).detach().topk(count, largest=False).indices
    return _rows_to_one(mean.flatten(1).scatter(1, smallest, 0.0).view_as(mean))


def _layers(maps: LayerMaps, name: str, gaps: bool) -> list[AttentionMap]:
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
    if not gaps and (gap := find_gap(layers)):
        raise ValueError(
            f"{name} goes from layer to layer, and {gap[1]!r} does not follow {gap[0]!r}: record all of them, or say that some "
            f"may be left out, {name}(..., gaps=True)."
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
