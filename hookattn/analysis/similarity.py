"""How alike maps are: Jensen-Shannon divergence between heads, between layers, and of each head from the mean of its layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ..attention.narrowing import ALL
from ..attention.softmax import Chunk, is_ours_alone
from ..attention.sources import exact_dtype
from ..errors import TokenError
from ..maps.attention_map import AttentionMap
from .layers import LayerMaps, layers_in
from .statistics import Statistic, Sum

By = Literal["heads", "layers"]


class Similarity(NamedTuple):
    """How far maps are from each other.

    Attributes:
        names: of what is compared, "blocks.0.attn" or "blocks.0.attn, head 0", first layer first.
        divergence: (names, names), in nats: 0 for the same, log 2 for those that never look at the same key.
    """

    names: tuple[str, ...]
    divergence: Tensor


class HeadDivergence(NamedTuple):
    """How far a head is from the mean of the heads of its layer.

    Attributes:
        layer: name of the map.
        depth: the how manieth map it is, from 0 on.
        head: number of the head.
        divergence: mean Jensen-Shannon divergence of its rows from those of the mean map, in nats.
    """

    layer: str
    depth: int
    head: int
    divergence: float


def similarity(maps: LayerMaps, by: By = "heads") -> Similarity:
    """Compare each head with each other, of all layers, or each layer with each other by the mean of its heads.

    The Jensen-Shannon divergence JSD(p, q) = H((p + q) / 2) - (H(p) + H(q)) / 2 of two rows is averaged over queries and
    images: in nats, and the divergence itself, not its root, which is the Jensen-Shannon distance. Layers are computed side by
    side, and no more is held than a chunk of each.

    Args:
        maps: a recorder, or maps of one forward, first layer first: `rec.maps`, some of them, or one. All have the same images,
            queries and keys; layers may have unlike numbers of heads.
        by: "heads" or "layers".

    Raises:
        ValueError: there are no maps, their queries or keys are not the same, or `by` is none of the words above.
        StaleMapError, UnreadableError: as when a map is sliced.

    Source: Clark et al. 2019, "What does BERT look at? An analysis of BERT's attention", section 6, for heads.
    """
    if by not in ("heads", "layers"):
        given = repr(by) if isinstance(by, str) else f"a {type(by).__name__}"
        raise ValueError(f'by={given} is not known: by="heads" or by="layers", of the maps of one forward.')
    layers = layers_in(maps)
    _check_alike(layers)
    sums: list[Tensor] = []

    def visit(items: slice, rows: slice, chunk: Tensor) -> None:
        chunks = [chunk, *(m.read((items, ALL, rows)) for m in layers[1:])]
        sums.append(_between([_as_heads(each, by) for each in chunks]))

    layers[0].visit(visit)
    batch, _, queries, _ = layers[0].shape
    names = [m.name if by == "layers" else f"{m.name}, head {i}" for m in layers for i in range(_count(m, by))]
    return Similarity(tuple(names), layers[0]._deliver(torch.stack(sums).sum(0) / (batch * queries)))


@Statistic
def divergence_from_mean(m: AttentionMap) -> Sum:
    """How far each head is from the mean of all heads, (batch, heads): Jensen-Shannon divergence in nats, mean over queries.

    Raises:
        StaleMapError, UnreadableError: as when the map is sliced.
    """
    batch, heads, queries, _ = m.shape

    def add(total: Tensor, items: slice, rows: slice, chunk: Chunk) -> None:
        values, mean = chunk.values, chunk.values.mean(1, keepdim=True)
        total[items] += _less(_entropy((values + mean) / 2), (_entropy(values) + _entropy(mean)) / 2).sum(-1)

    return Sum((batch, heads), add, lambda total: total / queries)


def compare_with_mean(maps: LayerMaps) -> list[HeadDivergence]:
    """Take how far each head is from the mean of its layer, over all images and queries: one row for each layer and head.

    Args:
        maps: a recorder, or maps of one forward, first layer first: `rec.maps`, some of them, or one.

    Raises:
        StaleMapError, UnreadableError: as when a map is sliced.
    """
    return [
        HeadDivergence(m.name, depth, head, value)
        for depth, m in enumerate(layers_in(maps))
        for head, value in enumerate(divergence_from_mean(m).mean(0).tolist())
    ]


def _count(m: AttentionMap, by: By) -> int:
    return m.shape[1] if by == "heads" else 1


def _as_heads(chunk: Tensor, by: By) -> Tensor:
    """(heads or 1, rows of all items, keys) of a chunk (items, heads, rows, keys)."""
    exact = chunk.detach().to(exact_dtype(chunk.dtype))
    return (exact if by == "heads" else exact.mean(1, keepdim=True)).transpose(0, 1).flatten(1, 2)


def _between(layers: Sequence[Tensor]) -> Tensor:
    """(heads, heads) of all layers, summed over rows, of (heads, rows, keys) of each."""
    entropies = torch.cat([_entropy(layer) for layer in layers])
    starts = list(accumulate((len(layer) for layer in layers), initial=0))
    sums = entropies.new_zeros(len(entropies), len(entropies))
    for i, head in enumerate(head for layer in layers for head in layer):
        for start, layer in zip(starts, layers):  # layer by layer, to hold nothing larger than what is given
            those = slice(max(start, i + 1), max(start + len(layer), i + 1))
            means = (entropies[i] + entropies[those]) / 2
            sums[i, those] = _less(_entropy((head + layer[those.start - start :]) / 2), means).sum(-1)
    return sums + sums.mT


def _less(entropy: Tensor, means: Tensor) -> Tensor:
    # rounding makes no divergence of it that is below zero
    return (entropy - means).clamp(min=0)


def _entropy(rows: Tensor) -> Tensor:
    """Of rows, in nats; 0 log 0 = 0, also in the gradient, for which `entr` has an infinity."""
    if is_ours_alone(rows):
        entropies: Tensor = torch.special.entr(rows).sum(-1)
        return entropies
    return Chunk(rows).entropies()


def _check_alike(layers: Sequence[AttentionMap]) -> None:
    """Raise the error that says which layers differ, if the rows of all are not from the same queries to the same keys."""
    if not layers:
        raise ValueError("there are no maps to compare: give a recorder, rec.maps, or some of rec.maps[:].")
    for what, of in _ALIKE.items():
        first = of(layers[0])
        for m in layers[1:]:
            if (other := of(m)) != first:
                told = "" if "places" in what else f", {first} and {other}"
                raise ValueError(
                    f"{layers[0].name!r} and {m.name!r} have not the same {what}{told}: compare layers that have, such as "
                    'similarity(rec.maps["blocks.*"]), or the heads of one, similarity(m).'
                )


def _places(m: AttentionMap) -> object:
    """Which patches queries and keys stand for, to be compared; what their axes are called where that is not known."""
    try:
        return [(each.prefix, each.grid_size, each.spread, each.patches.tolist()) for each in (m.query_tokens, m.tokens)]
    except TokenError:
        return m.axes


_ALIKE: dict[str, Callable[[AttentionMap], object]] = {
    "(batch, queries, keys)": lambda m: (m.shape[0], *m.shape[2:]),
    "device": lambda m: str(m.device),
    "places on the image (windows that are shifted)": _places,
}
