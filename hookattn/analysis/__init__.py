"""Pure functions of maps.

From top to bottom, an import may only point down:

    statistics   entropy, attention received, head mean, distance: figures of a map that is never held whole
    rollouts     rollout and relevance: the maps of all layers as one
"""

from __future__ import annotations

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
    "Statistic",
    "compute_statistics",
    "entropy",
    "grad_rollout",
    "head_mean",
    "mean_attention_distance",
    "received",
    "relevance",
    "rollout",
]
