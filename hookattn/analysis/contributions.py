"""What keys really bring to queries: a map weighted by what it carries."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

from ..attention.contributed import Shares, norms, norms_of_sums, projections
from ..attention.sources import Source
from ..attention.weighted import Weighted
from ..calls.call import Call
from ..maps.attention_map import AttentionMap
from ..maps.established import NameInErrors, TellWhy, as_in_training
from ..maps.forward import Forward, recall
from ..maps.outputs import effective_source, projection_of
from ..maps.reading import Computed
from .layers import check_one

Kind = Literal["norm", "projection"]


def contributions(
    m: AttentionMap, kind: Kind = "norm", heads: Literal["sum"] | None = None, *, shares: bool = False
) -> AttentionMap:
    """How much of each key reaches each query through the values and the output projection, read and drawn like a map.

    A head adds to the output of query i the sum over keys j of c_ij = A_ij v_j W_h: A is `m.effective`, v is `m.v`, the bias of
    the value projection in it, and W_h the head's part of the output projection, whose bias is nobody's.

        contributions(m)[:, :, 0]                               # what the class token gets of each token, head by head
        contributions(m, heads="sum").image("cls")              # over all heads, as a picture
        rollout([contributions(m, shares=True) for m in rec.maps.values()])
        contributions(m, "projection", heads="sum")[...]        # rows sum to the norm of what the heads bring

    A map gives away 1 in each row, whatever it carries: attention to a class token or registers whose values are small is
    attention to nothing.

    Args:
        m: a map of which the call is at hand.
        kind: "norm", ||c_ij||; or "projection", its part along what all heads and keys together bring to query i,
            c_ij . y_i / ||y_i|| with y_i = sum of c_ij over heads and keys, which is negative where it works against that. Rows
            of projections sum to ||y_i|| over keys and heads.
        heads: None for each by itself; "sum" for what they bring together: the norm of the sum of c_ij over heads, and the
            projection of it. There is then one head.
        shares: whether rows are divided by their sums, so that they sum to 1 as those of a map do: for rollouts, and for
            pictures beside those of maps.

    Returns:
        (batch, heads or 1, queries, keys), with the tokens of m. It is computed when it is sliced, like a map; nothing of size
        queries x keys x dim is held. Its rows do not sum to 1, unless they are shares.

    Raises:
        ValueError: there is no such kind.
        UnreadableError, when it is sliced: the module does more to what heads bring than to project it, or to divide it by a
            norm of all heads (EVA-02) first: norms of single heads, an activation, a residual.
        StaleMapError, RecorderError: as when `m.v` is read.

    Source: Kobayashi et al. 2020, "Attention is not only a weight: analyzing transformers with vector norms", equations 4 and
    5, for norms of one head and of the sum; Cunningham and Nicola Cirone 2026, "Contribution weights: a geometrical analysis of
    self-attention transformers", arXiv 2606.07604, for projections: what is projected onto is here the output of all heads,
    without a bias.
    """
    check_one("contributions", m)
    if kind not in ("norm", "projection") or heads not in (None, "sum"):
        raise ValueError(f"kind={kind!r}, heads={heads!r} is no choice: 'norm' or 'projection', None or 'sum'.")
    return m.derived(Computed(m.name, f"contributions ({kind})", lambda: _opened(m.call, kind, heads == "sum", shares)))


@contextmanager
def _opened(call: Call, kind: Kind, summed: bool, shares: bool) -> Iterator[Source]:
    with call.resumed(), NameInErrors(call):
        with TellWhy(call.layer.name), as_in_training(call):
            source = _contributed(call, kind, summed)
        yield Shares(source) if shares else source


def _contributed(call: Call, kind: Kind, summed: bool) -> Source:
    forward = Forward(call, recall(call))
    source, (weight, scale) = effective_source(call, forward), (projection := projection_of(forward))
    if scale is not None:
        single, shares = torch.arange(len(weight), device="cpu")[:, None], (1 / scale).transpose(2, 3)
        source = Weighted(source, single, shares.expand(-1, len(weight), -1, -1))
    values = forward.values().to(weight.dtype)
    if kind == "norm":
        return (norms_of_sums if summed else norms)(source, values, weight)
    brought = projection.divided(forward.outcomes()).transpose(1, 2).flatten(2) @ weight.flatten(0, 1)
    return projections(source, values, weight, brought, summed=summed)
