"""Maps in a file, and back: their values, some rows of them, or the queries and keys they are made of; and where they lie."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, Literal, Union

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..attention.sources import QK, Dense, Source
from ..errors import HookattnError
from ..image.tokens import Query, Tokens
from ..recipes.places import Places, settle
from .attention_map import AttentionMap
from .lazy import Delivery
from .picture import select_queries
from .reading import Loaded
from .rows import SomeRows
from .tensor_file import Entry, PathLike, entry_of, open_file, write_file

FORMAT = 1  # counted up when a reader of the one before would misread what is written
What = Literal["maps", "qk"]
Rows = Union[Query, list[Query], None]
Facts = dict[str, Any]


class Writer:
    """The tensors and the facts of a file that is to be written.

    Args:
        dtype: of what is written; None for that of slices.
        rows: the queries whose rows are written; None for all.
        what: "maps", or "qk" for queries and keys where maps are made of them.
    """

    def __init__(self, dtype: torch.dtype | None, rows: Rows, what: What) -> None:
        self._dtype, self._what = dtype, what
        self._queries = rows if isinstance(rows, list) or rows is None else [rows]
        self._entries: dict[str, Entry] = {}
        self._tokens: list[tuple[Tokens, Facts]] = []
        self._maps: dict[str, Facts] = {}

    def add(self, name: str, m: AttentionMap) -> None:
        """Put a map in, under a name."""
        places = settle(m._geometry, m.shape)
        made_of = self._find_qk(m) if self._what == "qk" else None
        if made_of is not None:
            facts = self._add_qk(name, made_of, m._deliver.dtype)
        elif self._queries is not None:
            facts = self._add_rows(name, m, self._queries)
        else:
            facts = {"kind": "map"}
            self._put(name, m.shape, self._dtype or m.dtype, lambda: m[...])
        self._maps[name] = {**facts, **self._describe(places)}

    def write(self, path: PathLike, facts: Mapping[str, str], skipped: Mapping[str, str]) -> None:
        """Write what was put in, with facts of all of it, and names of what could not be read with the reasons."""
        told = {"format": FORMAT, **facts, "skipped": skipped, "maps": self._maps, "tokens": [each for _, each in self._tokens]}
        write_file(path, self._entries, {"hookattn": json.dumps(told)})

    def _put(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, make: Callable[[], Tensor]) -> None:
        if name in self._entries:
            raise HookattnError(f"two tensors of the file would be called {name!r}; save one of these layers alone, layers=.")
        self._entries[name] = Entry(shape, dtype, lambda: _cast(name, make(), dtype))

    def _put_tensor(self, name: str, tensor: Tensor) -> None:
        dtype = self._dtype if self._dtype is not None and tensor.is_floating_point() else tensor.dtype
        self._put(name, tuple(tensor.shape), dtype, lambda: tensor)

    @staticmethod
    def _find_qk(m: AttentionMap) -> QK | None:
        """Queries and keys of a map, computed and without what is there several times; None if it is not made of them."""
        with m.open() as source:
            return _compact(source.prepare()) if isinstance(source, QK) else None

    def _add_qk(self, name: str, qk: QK, delivered: torch.dtype | None) -> Facts:
        facts: Facts = {"kind": "qk", "scale": None, "is_causal": qk.is_causal, "biases": len(qk.biases)}
        facts |= {"mask": qk.mask is not None, "mix": qk.mix is not None, "dtype": _NAME_OF[delivered] if delivered else None}
        parts = {"q": qk.q, "k": qk.k, "mask": qk.mask, "mix": qk.mix}
        parts |= {f"bias{i}": bias for i, bias in enumerate(qk.biases)}
        if isinstance(qk.scale, Tensor):
            parts["scale"] = qk.scale
        else:
            facts["scale"] = qk.scale
        for part, tensor in parts.items():
            if tensor is not None:
                self._put_tensor(f"{name}:{part}", tensor)
        return {**facts, "tensor_scale": "scale" in parts}

    def _add_rows(self, name: str, m: AttentionMap, queries: list[Query]) -> Facts:
        (batch, heads, count, keys), rows = m.shape, sorted({row for query in queries for row in _find_rows(m, query)})
        shape = (batch, heads, len(rows), keys)
        self._put(f"{name}:rows", shape, self._dtype or m.dtype, lambda: m[:, :, rows])
        return {"kind": "rows", "rows": rows, "queries": count}

    def _describe(self, places: Places) -> Facts:
        tokens = places.tokens if isinstance(places.tokens, str) else [self._number_of(each) for each in places.tokens]
        return {"axes": places.axes, "tokens": tokens, "cell_sizes": [*places.cell_sizes.items()]}

    def _number_of(self, tokens: Tokens) -> int:
        """Of tokens, which many maps have in common, among those of the file."""
        for number, (known, _) in enumerate(self._tokens):
            if tokens is known or _are_same(tokens, known):
                return number
        number, facts = len(self._tokens), {name: getattr(tokens, name) for name in _PLAIN}
        if tokens.places is not None:
            self._entries[f":places{number}"] = entry_of(tokens.places.cpu())
        self._tokens.append((tokens, {**facts, "places": tokens.places is not None}))
        return number


def read_maps(path: PathLike, deliver: Delivery) -> tuple[dict[str, AttentionMap], dict[str, str], dict[str, str]]:
    """The maps of a file, facts of all of them and what was skipped, by name; what slices need is read when they are made.

    Raises:
        FileNotFoundError: there is none.
        HookattnError: it is no file of maps, of a format that is not known yet, or damaged.
    """
    metadata, get = open_file(path)
    if "hookattn" not in metadata:
        raise HookattnError(f"{path} holds no maps: it is a safetensors file that hookattn has not written.")
    try:
        facts = json.loads(metadata["hookattn"])
        if facts["format"] > FORMAT:
            raise HookattnError(
                f"{path} was written by hookattn {facts['version']} in format {facts['format']}, and this one reads up to "
                f"{FORMAT}: pip install --upgrade hookattn."
            )
        tokens = [_read_tokens(each, get, number) for number, each in enumerate(facts["tokens"])]
        maps = {name: _read_map(name, each, get, tokens, deliver) for name, each in facts["maps"].items()}
        told = {name: str(facts[name]) for name in ("version", "model", "called")}
        return maps, told, {name: str(why) for name, why in facts["skipped"].items()}
    except HookattnError:
        raise
    except Exception as error:  # whatever somebody has put into the file
        raise HookattnError(f"{path} is damaged: {type(error).__name__}: {error}.") from error


def _read_tokens(facts: Facts, get: Callable[[str], Tensor], number: int) -> Tokens:
    prefix, grid_size, spread, extent, seen = (facts[name] for name in _PLAIN)
    places, area = get(f":places{number}") if facts["places"] else None, grid_size[0] * grid_size[1]
    if places is not None and places.numel() and not (int(places.min()) >= -1 and int(places.max()) < area):
        raise ValueError(f"tokens stand for places that a grid of {grid_size} has not")
    return Tokens(tuple(prefix), tuple(grid_size), places, spread, tuple(extent), tuple(seen))


def _read_map(name: str, facts: Facts, get: Callable[[str], Tensor], tokens: list[Tokens], deliver: Delivery) -> AttentionMap:
    source = _SOURCES[facts["kind"]](name, facts, get)
    both = facts["tokens"] if isinstance(facts["tokens"], str) else tuple(tokens[number] for number in facts["tokens"])
    if not isinstance(both, str) and tuple(map(len, both)) != source.shape[2:]:
        raise ValueError(f"{name!r} is {source.shape}, and not of {' x '.join(str(len(each)) for each in both)} tokens")
    cell_sizes = {tuple(grid): size if isinstance(size, str) else tuple(size) for grid, size in facts["cell_sizes"]}
    if deliver.dtype is None and (dtype := facts.get("dtype")) is not None:
        deliver = Delivery(_DTYPES[dtype], deliver.device)
    return AttentionMap(name, Loaded(name, source), Places(tuple(facts["axes"]), both, cell_sizes), deliver)


def _read_qk(name: str, facts: Facts, get: Callable[[str], Tensor]) -> QK:
    scale = get(f"{name}:scale") if facts["tensor_scale"] else facts["scale"]
    biases = tuple(get(f"{name}:bias{i}") for i in range(facts["biases"]))
    mask, mix = (get(f"{name}:{part}") if facts[part] else None for part in ("mask", "mix"))
    return QK(get(f"{name}:q"), get(f"{name}:k"), scale, biases or None, mask, facts["is_causal"], mix)


_SOURCES: Mapping[str, Callable[[str, Facts, Callable[[str], Tensor]], Source]] = {
    "map": lambda name, _, get: Dense(get(name)),
    "rows": lambda name, facts, get: SomeRows(get(f"{name}:rows"), name, tuple(facts["rows"]), facts["queries"]),
    "qk": _read_qk,
}
_PLAIN = ("prefix", "grid_size", "spread", "extent", "seen")
_DTYPES = {"float64": torch.float64, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_NAME_OF = {dtype: name for name, dtype in _DTYPES.items()}


def _are_same(one: Tokens, other: Tokens) -> bool:
    if any(getattr(one, name) != getattr(other, name) for name in _PLAIN):
        return False
    return one.places is other.places or (
        one.places is not None and other.places is not None and torch.equal(one.places, other.places)
    )


def _compact(qk: QK) -> QK:
    """A copy, of which what is expanded over images, heads or rows is there once."""

    def once(tensor: Tensor) -> Tensor:
        # a copy, since numpy writes it to the file: a storage that numpy has seen counts as changed, and its map as stale
        return tensor.detach()[tuple(slice(0, 1) if step == 0 else slice(None) for step in tensor.stride())].clone()

    others = {part.name: getattr(qk, part.name) for part in fields(qk) if part.name not in ("q", "k")}
    return QK(qk.q.detach().clone(), qk.k.detach().clone(), **pytree.tree_map_only(Tensor, once, others))


def _find_rows(m: AttentionMap, query: Query) -> range:
    """The rows that are read for a query: from the first to the last that it stands in, in any window."""
    queries, keys = m.query_tokens, m.tokens
    if queries.places is None and query != "mean":
        return range(index := queries.index(query), index + 1)
    found = select_queries(queries, keys, query).flatten(0, 1).any(0).nonzero().flatten().tolist()
    return range(found[0], found[-1] + 1)


def _cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    cast = tensor.detach().to(dtype)
    if cast.dtype != tensor.dtype and not torch.equal(cast.isfinite(), tensor.isfinite()):
        raise HookattnError(f"{name!r} has values that {dtype} cannot hold: save it as another dtype.")
    return cast
