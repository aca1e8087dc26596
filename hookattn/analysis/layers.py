"""What functions of several maps take: those of a forward, first layer first."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Union

from ..maps.attention_map import AttentionMap
from ..recording.recorder import AttentionRecorder

LayerMaps = Union[AttentionRecorder, Mapping[str, AttentionMap], Iterable[AttentionMap]]
"""A recorder, its `rec.maps`, or some maps, first layer first."""


def layers_in(maps: LayerMaps) -> list[AttentionMap]:
    """The maps as a list, first layer first."""
    maps = maps.maps if isinstance(maps, AttentionRecorder) else maps
    return list(maps.values() if isinstance(maps, Mapping) else maps)
