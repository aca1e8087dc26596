"""Pure functions of maps.

From top to bottom, an import may only point down:

    contributions  what keys really bring to queries
    heads        one row of figures for each layer and head, as a table too
    importance   how much a loss depends on each head
    similarity   how alike heads and layers are
    registers    what goes to the class token, to registers and to patches of high norm
    masks        which patches hold most of what a query gives away
    statistics   entropy, attention received, head mean, distance: figures of a map that is never held whole
    centres      where queries and keys lie, in pixels
    rollouts     rollout and relevance: the maps of all layers as one
    layers       what functions of several maps take
"""

from __future__ import annotations

from .contributions import contributions
from .heads import HeadSummary, summarize_heads, to_frame
from .importance import HeadImportance, head_importance, normalize_layers
from .masks import keep_mass
from .registers import RegisterShares, find_high_norms, registers
from .rollouts import grad_rollout, relevance, rollout
from .similarity import HeadDivergence, Similarity, compare_with_mean, divergence_from_mean, similarity
from .statistics import (
    Statistic,
    compute_statistics,
    entropy,
    head_mean,
    mean_attention_distance,
    received,
)

__all__ = [
    "HeadDivergence",
    "HeadImportance",
    "HeadSummary",
    "RegisterShares",
    "Similarity",
    "Statistic",
    "compare_with_mean",
    "compute_statistics",
    "contributions",
    "divergence_from_mean",
    "entropy",
    "find_high_norms",
    "grad_rollout",
    "head_importance",
    "head_mean",
    "keep_mass",
    "mean_attention_distance",
    "normalize_layers",
    "received",
    "registers",
    "relevance",
    "rollout",
    "similarity",
    "summarize_heads",
    "to_frame",
]
