"""The maps of one forward: those that can be read, and why the others cannot."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

import hookattn

from ..errors import LayerNotFoundError, NoMapError, UnreadableError, did_you_mean, explained, listed
from ..image.tokens import Query
from ..maps.attention_map import AttentionMap
from ..maps.labelled import import_xarray
from ..maps.lazy import Delivery
from ..maps.notebook import list_in_html
from ..maps.pickled import reduce_to
from ..maps.store import Rows, What, Writer, read_maps
from ..maps.tensor_file import PathLike
from ..maps.together import read_rows

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
        model: see attributes.

    Attributes:
        skipped: names of modules that ran and form no map that could be read, each with the reason.
        called: what of the model was called: "forward", or another method of it; "" for modules called one by one.
        model: name of the architecture, or of the class.
    """

    def __init__(
        self, maps: Mapping[str, AttentionMap], called: str = "", let_go: Mapping[str, str] = _NONE, model: str = ""
    ) -> None:
        self.called, self._let_go, self.model = called, let_go, model
        self.skipped = {name: reason for name, m in maps.items() if (reason := m.why_unreadable)}
        self._maps = {name: m for name, m in maps.items() if name not in self.skipped}

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled, copied and saved as the maps that they are."""
        return reduce_to(Maps, vars(self))

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, slice):
            return list(self._maps.values())[key]
        if isinstance(key, int):
            if not -len(self) <= key < len(self):
                if self.skipped:
                    raise UnreadableError(f"there is no map {key}: {len(self)} can be read. {explained(self.skipped.values())}")
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
        return read_rows(self._maps, query)

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

    def save(
        self,
        path: PathLike,
        *,
        layers: str | int | Sequence[str | int] | None = None,
        rows: Rows = None,
        what: What = "maps",
        dtype: torch.dtype | None = None,
    ) -> None:
        """Write maps into a safetensors file, from which `hookattn.load` takes them without the model.

            rec.save("maps.safetensors", dtype=torch.float16)
            rec.save("cls.safetensors", rows="cls")                # one row of each head
            rec.save("small.safetensors", what="qk")               # computed when they are read

        The file holds no pickle and runs nothing. A whole map is a tensor of its name, for everybody who reads safetensors;
        axes, tokens and where they lie on the image, the name of the model and the version of hookattn are in the metadata.
        Maps are computed one after the other, so there is never more than one in memory; the file is there once it is whole.

        Args:
            layers: names, globs, positions or a list of these; None for all.
            rows: a query as in `AttentionMap.image`, or a list of queries, whose rows alone are written.
            what: "maps", or "qk" to write queries and keys, scale, biases and mask where a map is made of them and not computed
                yet; other maps are written whole.
            dtype: what values are written as, such as torch.float16; None for the dtype of slices (or of queries and keys).

        Raises:
            HookattnError: the file cannot be written, or values do not fit the dtype.
            NoMapError: there are no maps.
            LayerNotFoundError: `layers` names nothing.
            TokenError: a map has no such query.
            ValueError: `what` is none of these words, `dtype` is no floating one, or `rows` are asked of "qk".
            StaleMapError, UnreadableError: as when a map is sliced.
        """
        _check_asked(rows, what, dtype)
        if not (chosen := self._chosen(layers)):
            raise NoMapError(f"there is no map to save. {explained(self.skipped.values())}".rstrip())
        writer = Writer(dtype, rows, what)
        for name, m in chosen.items():
            writer.add(name, m)
        skipped = {} if layers is not None else self.skipped
        writer.write(path, {"version": hookattn.__version__, "model": self.model, "called": self.called}, skipped)

    def _chosen(self, layers: str | int | Sequence[str | int] | None) -> dict[str, AttentionMap]:
        """Maps by names, globs and positions, in the order the modules ran."""
        if layers is None:
            return self._maps
        asked = [self[each] for each in ([layers] if isinstance(layers, (str, int)) else layers)]
        wanted = {id(m) for each in asked for m in (each.values() if isinstance(each, Maps) else [each])}
        return {name: m for name, m in self._maps.items() if id(m) in wanted}

    def _matching(self, glob: str) -> Maps | None:
        """The maps whose names match a glob, and the reasons of those that cannot be read; None where no map does."""
        some = Maps({name: m for name, m in self._maps.items() if fnmatchcase(name, glob)}, self.called, model=self.model)
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


def load(path: PathLike, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Maps:
    """Take maps from a file that `rec.save` or `rec.maps.save` has written: `rec.maps` without the model.

        maps = hookattn.load("maps.safetensors")
        maps["blocks.11.attn"].image("cls")      # slices, pictures, rollout and pages as of recorded maps

    Nothing is unpickled and nothing is run, so a file of anybody is safe to open. What is sliced is read from the file then, so
    keep it as it is meanwhile. Inputs, gradients and calls are not in it.

    Args:
        path: the file.
        device, dtype: where slices go and as what; None for the CPU and as what they were saved.

    Raises:
        FileNotFoundError: there is no such file.
        HookattnError: it is not a file of maps, is damaged, or was written by a later hookattn in a format of its own.
    """
    maps, facts, skipped = read_maps(path, Delivery(dtype, None if device is None else torch.device(device)))
    loaded = Maps(maps, facts["called"], model=facts["model"])
    loaded.skipped = skipped
    return loaded


def name_model(model: nn.Module) -> str:
    """The architecture of a model of timm, else its class."""
    config = vars(model).get("pretrained_cfg")  # where timm puts it
    return str((config.get("architecture") if isinstance(config, Mapping) else None) or type(model).__name__)


def _check_asked(rows: Rows, what: str, dtype: Any) -> None:
    if what not in ("maps", "qk"):
        raise ValueError(f'what={what!r} is not known: what="maps" or what="qk".')
    if what == "qk" and rows is not None:
        raise ValueError('rows are of maps: leave rows= out for what="qk", which keeps all queries and keys.')
    if dtype not in (None, torch.float64, torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"dtype={dtype!r} is not written: dtype=torch.float32, torch.float16, torch.bfloat16, or None.")
