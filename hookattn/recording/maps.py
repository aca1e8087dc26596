"""The maps of one forward: those that can be read, and why the others cannot."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ..errors import LayerNotFoundError, UnreadableError, did_you_mean
from ..maps.attention_map import AttentionMap


class Maps(Mapping[str, AttentionMap]):
    """The maps of one forward, in the order the modules ran, by name; by position (negative too) and by slice as well.

    Attributes:
        skipped: names of modules that ran and form no map that could be read, each with the reason.
    """

    def __init__(self, maps: Mapping[str, AttentionMap]) -> None:
        self.skipped = {name: reason for name, m in maps.items() if (reason := m.why_unreadable)}
        self._maps = {name: m for name, m in maps.items() if name not in self.skipped}

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, slice):
            return list(self._maps.values())[key]
        if isinstance(key, int):
            if not -len(self) <= key < len(self):
                if self.skipped:
                    raise UnreadableError(
                        f"there is no map {key}: {len(self)} can be read. {'; '.join(list(self.skipped.values())[:3])}"
                    )
                raise LayerNotFoundError(f"there is no map {key}: {len(self)} were recorded.")
            return list(self._maps.values())[key]
        if key in self.skipped:
            raise UnreadableError(self.skipped[key])
        if key not in self._maps:
            raise LayerNotFoundError(f"no map was recorded of {key!r}. {did_you_mean(str(key), self._maps)}")
        return self._maps[key]

    def __contains__(self, key: object) -> bool:
        return key in self._maps

    def get(self, key: str, default: Any = None) -> Any:
        """The map of a module, or the default where none can be read."""
        return super().get(key, default) if key not in self.skipped else default

    def __iter__(self) -> Iterator[str]:
        return iter(self._maps)

    def __len__(self) -> int:
        return len(self._maps)

    def __repr__(self) -> str:
        return "\n".join(["Maps:", *(f"  {m!r}" for m in self._maps.values())])
