"""Figures of a map that need it only once and in parts: taken over chunks of rows, straight from the captured call.

    from hookattn.analysis import compute_statistics, entropy, mean_attention_distance

    entropy(m)                                          # (batch, heads, queries)
    compute_statistics(m, entropy, mean_attention_distance)     # both, while the map is computed once

No more of the map is held than one chunk, whatever the number of tokens (2**20 elements on a CPU, 2**25 elsewhere, or one row
of all heads of an image), and some intermediates of that size, beside the results and what the map is computed from: queries
and keys, a bias or a mask of queries x keys if there is one, and the scores where a module shows nothing else. Results go where
the recorder brings slices (`device`, `dtype`) and are added up in float32, in float64 for a float64 model. With `detach=False`
they are differentiable; the graph then holds what autograd needs, the map.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from ..attention.softmax import Chunk
from ..attention.sources import exact_dtype
from ..conditions.autocast import without_autocast
from ..maps.attention_map import AttentionMap
from .centres import Places, places_of
from .layers import check_one

__all__ = ["Statistic", "Sum", "compute_statistics", "entropy", "head_mean", "mean_attention_distance", "received"]


class Sum(NamedTuple):
    """How a statistic of one map is added up over chunks.

    Attributes:
        shape: of what is added up, zero before the first chunk.
        add: adds a chunk to it: (total, which items of the batch, which rows, the chunk), of which `chunk.values` are
            (items, heads, rows, keys).
        finish: makes the statistic of it.
    """

    shape: tuple[int, ...]
    add: Callable[[Tensor, slice, slice, Chunk], None]
    finish: Callable[[Tensor], Tensor] = lambda total: total


@dataclass(frozen=True)
class Statistic:
    """A figure of a map that is added up over chunks of its rows; called with a map, it computes it.

    Attributes:
        of: what is added up for one map.
    """

    of: Callable[[AttentionMap], Sum]

    def __post_init__(self) -> None:
        vars(self).update(__doc__=self.of.__doc__, __name__=self.of.__name__)  # for help()

    def __call__(self, m: AttentionMap) -> Tensor:
        return compute_statistics(m, self)[0]

    def __repr__(self) -> str:
        return f"<statistic {self.of.__name__}>"


def compute_statistics(m: AttentionMap, *wanted: Statistic) -> tuple[Tensor, ...]:
    """Compute several statistics of one map, which is itself computed only once, chunk by chunk.

    Args:
        m: the map.
        wanted: which: `entropy`, `received`, `head_mean`, `mean_attention_distance`.

    Returns:
        One tensor for each, in this order.

    Raises:
        StaleMapError, UnreadableError: as when the map is sliced.
        TokenError: `mean_attention_distance` is among them, and it is not known where the tokens lie.
    """
    for statistic in wanted:
        check_one(statistic.of.__name__, m)
    sums = [statistic.of(m) for statistic in wanted]
    totals: list[Tensor] = []

    def visit(items: slice, rows: slice, chunk: Chunk) -> None:
        values = chunk.values.to(exact_dtype(chunk.values.dtype))
        with without_autocast(values.device):
            # made of the first chunk, whose dtype and device they take, and inside a transform of torch.func its level
            totals.extend(values.new_zeros(each.shape) for each in sums[len(totals) :])
            for each, total in zip(sums, totals):
                each.add(total, items, rows, chunk._replace(values=values))

    m.visit_with_scores(visit)
    return tuple(m._deliver(each.finish(total)) for each, total in zip(sums, totals))


@Statistic
def entropy(m: AttentionMap) -> Sum:
    """Entropy of each row, (batch, heads, queries), in nats: 0 for a row that looks at one key, log(keys) for a flat one.

    H = -sum_k A_k log A_k, with 0 log 0 = 0, so that keys a mask has closed count for nothing, and their gradient is zero.

    Raises:
        StaleMapError, UnreadableError: as when the map is sliced.

    Source: Clark et al. 2019, "What does BERT look at? An analysis of BERT's attention"; as a sign of unstable training, Zhai
    et al. 2023, "Stabilizing Transformer training by preventing attention entropy collapse".
    """

    def add(total: Tensor, items: slice, rows: slice, chunk: Chunk) -> None:
        total[items, :, rows] = chunk.entropies()

    return Sum(m.shape[:3], add)


@Statistic
def received(m: AttentionMap) -> Sum:
    """What each key gets, (batch, heads, keys): the mean of its column over the queries. Where rows sum to 1, so does this.

    Raises:
        StaleMapError, UnreadableError: as when the map is sliced.
    """
    batch, heads, queries, keys = m.shape

    def add(total: Tensor, items: slice, rows: slice, chunk: Chunk) -> None:
        total[items] += chunk.values.sum(2)

    return Sum((batch, heads, keys), add, lambda total: total / queries)


@Statistic
def head_mean(m: AttentionMap) -> Sum:
    """The mean of the map over heads, (batch, queries, keys).

    Raises:
        StaleMapError, UnreadableError: as when the map is sliced.
    """
    batch, _, queries, keys = m.shape

    def add(total: Tensor, items: slice, rows: slice, chunk: Chunk) -> None:
        total[items, rows] = chunk.values.mean(1)

    return Sum((batch, queries, keys), add)


@Statistic
def mean_attention_distance(m: AttentionMap) -> Sum:
    """How far a head looks, (images, heads), in pixels of the input image.

    The distance from the centre of a query's patch to the centre of a key's patch, averaged over keys with the attention as
    weights, then over the queries of an image, those of all its windows. Prefix tokens and padding have no place: they are
    left out as queries and as keys, and the weights of a row are divided by what it gives to patches. A row that gives them
    nothing is left out of the mean; a head with only such rows has NaN.

    Queries and keys may lie on different grids, each of which covers the image as in `m.image`. A key that is pooled of
    places which are no cell (NextViT) is as far as they are on average, and a place that stands in several windows (outlook
    attention) is a query in each. Pixels are those of the image as it came into the model, or of the patches it came as.

    Raises:
        TokenError: queries or keys are no patches, or it is not known where they lie or how large the image is.
        StaleMapError, UnreadableError: as when the map is sliced.

    Source: Dosovitskiy et al. 2021, "An image is worth 16x16 words: Transformers for image recognition at scale", appendix D.7
    and figure 7; Raghu et al. 2021, "Do Vision Transformers see like convolutional neural networks?".
    """
    batch, heads, queries, _ = m.shape
    find_places, windows = places_of(m), m.tokens.windows
    laid: list[Places] = []  # once the first chunk tells on which device
    measured: dict[tuple[int, int], Tensor] = {}  # by rows

    def add(total: Tensor, items: slice, rows: slice, chunk: Chunk) -> None:
        if not laid:
            laid.append(find_places(chunk.values))
        middles, places, share = laid[0].cut(items, rows)
        span = rows.start, rows.stop
        if len(laid[0].share) > 1 or span not in measured:  # one at a time, which is no more than a chunk
            measured.clear()
            measured[span] = _distances(middles, places)
        total[0, items, :, rows] = (chunk.values * measured[span][:, None]).sum(-1)
        # shares are 0 for prefix tokens and padding, 1 for patches, and between for pooled keys that reach over the border
        total[1, items, :, rows] = _weigh(chunk.values, share)

    def finish(total: Tensor) -> Tensor:
        far, weight = total
        counts = (weight != 0) & laid[0].is_query[:, None]
        # `where` on both sides of the division: an x / 0 that is only left out afterwards has a gradient of NaN
        reached = (far / weight.where(counts, 1.0)).where(counts, 0.0)
        distances, count = (t.sum(-1).view(batch // windows, windows, heads).sum(1) for t in (reached, counts))
        return torch.div(distances, count)

    return Sum((2, batch, heads, queries), add, finish)


def _weigh(chunk: Tensor, share: Tensor) -> Tensor:
    """(items, heads, queries): what each query gives to all keys, each counted by its share."""
    if len(share) > 1:
        return (chunk * share[:, None, None]).sum(-1)
    return torch.mv(chunk.flatten(0, 2), share[0]).view(chunk.shape[:3])  # measured: a tenth of a product of matrices


def _distances(middles: Tensor, places: tuple[Tensor, ...]) -> Tensor:
    """(items, queries, keys): distance from the middle of a query to the places of a key, their mean; 0 to where nothing is."""
    # The places of a key that is spread over several go one after the other, to hold no more than a chunk at a time.
    apart = reduce(torch.add, (_apart(middles, each).nan_to_num_(0.0) for each in places))
    return apart if len(places) == 1 else apart / len(places)


def _apart(starts: Tensor, ends: Tensor) -> Tensor:
    """(items, queries, keys): distances between places, (2, items, queries, 1) and (2, items, 1, keys)."""
    # Not by a product of matrices, which loses digits for places near each other. Nor by cdist, which on a GPU takes a block
    # of threads for each pair: three quarters of the time of four statistics.
    return torch.hypot(*(starts - ends).unbind())
