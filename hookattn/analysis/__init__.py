"""Pure functions of maps.

From top to bottom, an import may only point down:

    contributions  what keys really bring to queries
    heads        one row of figures for each layer and head, as a table too
    masks        which patches hold most of what a query gives away
    statistics   entropy, attention received, head mean, distance: figures of a map that is never held whole
    rollouts     rollout and relevance: the maps of all layers as one
    layers       what functions of several maps take
"""

from __future__ import annotations

from .contributions import contributions
from .heads import HeadSummary, summarize_heads, to_frame
from .masks import keep_mass
from .rollouts import grad_rollout, relevance, rollout
from .statistics import (
    Statistic,
    compute_statistics,
    entropy,
    head_mean,
    mean_attention_distance,
    received,
)

__all__ = [
    "HeadSummary",
    "Statistic",
    "compute_statistics",
    "contributions",
    "entropy",
    "grad_rollout",
    "head_mean",
    "keep_mass",
    "mean_attention_distance",
    "received",
    "relevance",
    "rollout",
    "summarize_heads",
    "to_frame",
]
