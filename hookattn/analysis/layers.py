"""What functions of several maps take: those of a forward, first layer first."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Union

from ..maps.attention_map import AttentionMap
from ..recording.recorder import AttentionRecorder

LayerMaps = Union[AttentionRecorder, Mapping[str, AttentionMap], Iterable[AttentionMap], AttentionMap]
"""A recorder, its `rec.maps`, some maps, first layer first, or one."""


def layers_in(maps: LayerMaps) -> list[AttentionMap]:
    """The maps as a list, first layer first."""
    if isinstance(maps, AttentionMap):
        return [maps]
    maps = maps.maps if isinstance(maps, AttentionRecorder) else maps
    return list(maps.values() if isinstance(maps, Mapping) else maps)


def check_one(what: str, m: object) -> None:
    """Raise a TypeError where several maps are given to what is of one."""
    if isinstance(m, (AttentionRecorder, Mapping, list, tuple)):
        raise TypeError(f"{what} is of one map, and this {type(m).__name__} is of several: give one, such as rec.maps[-1].")


def find_gap(layers: Sequence[AttentionMap]) -> tuple[str, str] | None:
    """The names of two layers of which the second does not follow the first; None where all do, as far as names tell.

    They tell by their numbers: the first in which two names differ counts on by one, as from "blocks.3.attn" to
    "blocks.4.attn", or from "blocks.0.attns.1" to "blocks.1.attns.0". Names with other words, or none, tell nothing.
    """
    for one, other in pairwise(m.name.partition("#")[0] for m in layers):
        numbers = ([int(n) for n in re.findall(r"\d+", name)] for name in (one, other))
        step = next((b - a for a, b in zip(*numbers) if a != b), 1)
        if step != 1 and re.sub(r"\d+", "", one) == re.sub(r"\d+", "", other):
            return one, other
    return None
