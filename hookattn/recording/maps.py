"""The maps of one forward: those that can be read, and why the others cannot."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

from ..errors import LayerNotFoundError, UnreadableError, did_you_mean, listed
from ..image.tokens import Query
from ..maps.attention_map import AttentionMap
from ..maps.labelled import import_xarray
from ..maps.notebook import list_in_html

_NONE: Mapping[str, str] = {}


class Maps(Mapping[str, AttentionMap]):
    """The maps of one forward, in the order the modules ran, by name; by position (negative too) and by slice as well.

        maps["blocks.11.attn"], maps[-1]    # a map
        maps["blocks.*.attn"]               # the maps of a glob, again `Maps`; a name that is one of a map is that map
        maps[2:5]                           # a list
        maps.stack()                        # (layers, batch, heads, queries, keys)

    Args:
        maps: all that were recorded.
        called: see attributes.
        let_go: names of maps that forwards before the last had, each with what of the model was called there.

    Attributes:
        skipped: names of modules that ran and form no map that could be read, each with the reason.
        called: what of the model was called: "forward", or another method of it; "" for modules called one by one.
    """

    def __init__(self, maps: Mapping[str, AttentionMap], called: str = "", let_go: Mapping[str, str] = _NONE) -> None:
        self.called, self._let_go = called, let_go
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
        if key in self._maps:
            return self._maps[key]
        if isinstance(key, str) and (some := self._matching(key)):
            return some
        raise LayerNotFoundError(self._why_not(key))

    def __contains__(self, key: object) -> bool:
        return key in self._maps

    def get(self, key: str, default: Any = None) -> Any:
        """The map of a module, or the default where none can be read."""
        return super().get(key, default) if key not in self.skipped else default

    def __iter__(self) -> Iterator[str]:
        return iter(self._maps)

    def __len__(self) -> int:
        return len(self._maps)

    def rows(self, query: Query = "cls") -> dict[str, Tensor]:
        """The rows of a query in every map, by name, see `AttentionMap.rows`."""
        return {name: m.rows(query) for name, m in self._maps.items()}

    def stack(self) -> Tensor:
        """Compute all maps as one tensor, (layers, batch, heads, queries, keys), in the order the modules ran.

        Raises:
            ValueError: there are none, or shapes or devices differ; the message says which.
        """
        self._check_alike("stack", lambda m: (m.shape, str(m.device)))
        return torch.stack([m[...] for m in self._maps.values()])

    def to_xarray(self) -> Any:
        """Compute all maps as one `xarray.DataArray`, (layer, batch, head, query, key), see `AttentionMap.to_xarray`.

        `layer` counts by names. Coordinates in which layers differ, such as rows and columns of shifted windows, have it too.

        Raises:
            MissingExtraError: xarray is not installed.
            ValueError: there are none, or shapes or axes differ; the message says which.
        """
        concat = import_xarray().concat
        self._check_alike("to_xarray", lambda m: (m.shape, m.axes))
        same = {"coords": "different", "compat": "equals", "join": "exact", "combine_attrs": "drop_conflicts"}
        return concat([m.to_xarray() for m in self._maps.values()], dim="layer", **same)

    def _matching(self, glob: str) -> Maps | None:
        """The maps whose names match a glob, and the reasons of those that cannot be read; None where no map does."""
        some = Maps({name: m for name, m in self._maps.items() if fnmatchcase(name, glob)}, self.called)
        some.skipped = {name: why for name, why in self.skipped.items() if fnmatchcase(name, glob)}
        return some if some else None

    def _check_alike(self, verb: str, what: Callable[[AttentionMap], Any]) -> None:
        """Raise the error that says which maps differ, and what to type instead."""
        kinds: dict[Any, list[str]] = {}
        for name, m in self._maps.items():
            kinds.setdefault(what(m), []).append(name)
        if len(kinds) == 1:
            return
        told = "; ".join(f"{', '.join(map(str, kind))}: {listed(names)}" for kind, names in kinds.items())
        raise ValueError(
            f"{verb}() is of maps of one kind, and these are {told or 'none'}. Take some by a glob, "
            f'maps["blocks.*"].{verb}(), or one by one, [m[...] for m in maps.values()].'
        )

    def _ipython_key_completions_(self) -> list[str]:
        return list(self._maps)

    def __repr__(self) -> str:
        of = f" of {self.called}" if self.called else ""
        return "\n".join([f"Maps{of}:", *(f"  {m!r}" for m in self._maps.values())])

    def _repr_html_(self) -> str:
        return list_in_html(self._maps.values(), self.skipped)

    def _why_not(self, key: Any) -> str:
        if key not in self._let_go:
            return f"no map was recorded of {key!r}. {did_you_mean(str(key), self._maps)}"
        ran, last = self._let_go[key] or "an earlier forward", self.called or "a later forward"
        return (
            f"{key!r} ran in {ran}, whose maps were let go when {last} began: record with AttentionRecorder(model, "
            'passes="all") and read rec.passes, or open a block for each.'
        )
