"""What a recorder was told to keep."""

from __future__ import annotations

from dataclasses import dataclass

from ..maps.attention_map import AttentionMap
from ..maps.lazy import Delivery
from .reduce import Reduction


@dataclass(frozen=True)
class Wanted:
    """What a recorder was told to keep of each call: maps, where they are made while the model runs, what a function makes of
    them, and its arguments of these names."""

    maps: bool
    reduction: Reduction | None
    detach: bool
    gradients: bool
    verify: bool
    deliver: Delivery

    def finish(self, m: AttentionMap) -> AttentionMap:
        """What is kept of a map at the end of the block."""
        if self.reduction is not None:
            return self.reduction(m)
        return m.computed() if self.maps and m.is_pending else m
