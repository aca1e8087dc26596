"""What a run is: model, weights, preprocessing, what is taken and how it is stored; and how two runs differ."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from importlib import metadata
from itertools import islice
from typing import Any

import torch
from torch import nn

from ..errors import StoreError

Facts = dict[str, Any]
Names = Collection[str]
_NAMES = "images.names"
_TOLD = 3  # names of many that differ
_PACKAGES = ("hookattn", "torch", "timm", "zarr", "numpy", "pillow")


def hash_weights(model: nn.Module) -> str:
    """A SHA-256 of all parameters and buffers that a checkpoint holds: their names, dtypes, shapes and bytes."""
    found = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, torch.Tensor):  # extra state, which is anything
            continue
        found.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        plain = tensor.detach().cpu().contiguous()
        plain = plain.dequantize() if plain.is_quantized else plain
        found.update(plain.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def hash_names(names: Sequence[str]) -> str:
    """A SHA-256 of the names of all images, in their order."""
    found = hashlib.sha256()
    for name in names:
        encoded = name.encode("utf-8", "surrogateescape")
        found.update(len(encoded).to_bytes(8, "little") + encoded)
    return found.hexdigest()


def list_versions() -> dict[str, str]:
    """Of Python and of the packages that have a part in the figures."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:  # a checkout on the path
            found[package] = "unknown"
    return found


def check_same_run(there: Facts, asked: Facts, where: str, read_names: Callable[[], tuple[Names, Names]]) -> None:
    """Check that what a store was begun with is what is asked for now.

    Args:
        there: what it was begun with.
        asked: what is asked for now.
        where: the store.
        read_names: gives the names of the images that are there, and of those that are asked for; asked where they differ.

    Raises:
        StoreError: it is not; the message says what differs, and what to do.
    """
    differing = [each for each in _differences(there, asked) if not each.startswith(_NAMES)]
    if there.get("images", {}).get("names") != asked["images"]["names"]:
        differing.insert(0, f"{_NAMES}: {compare_names(*read_names())}")
    if differing:
        raise StoreError(
            f"{where} was begun with other settings, and is not touched. There | asked for now: {'; '.join(differing[:6])}. "
            f"Ask for the same to go on with it, or name another store.{_advise_revision(there, asked)}"
        )


def compare_names(before: Names, now: Names) -> str:
    """How the names of images differ from what they were: how many, and the first of them."""
    were, are = set(before), set(now)
    stayed, stay = [name for name in before if name in are], [name for name in now if name in were]
    gone, new = [name for name in before if name not in are], [name for name in now if name not in were]
    found = [_tell_some(len(names), told, map(repr, names)) for names, told in ((gone, "gone"), (new, "new")) if names]
    moved = [f"{name!r} now where {other!r} was" for other, name in zip(stayed, stay) if other != name]
    found += [_tell_some(len(moved), "in another order", moved)] if moved else []
    return ", ".join(found) or "the same but for bytes that are no text"


def _tell_some(count: int, told: str, examples: Iterable[str]) -> str:
    first = [*islice(examples, _TOLD)]
    return f"{count:,} {told} ({', '.join(first)}{', ...' if count > len(first) else ''})"


def _advise_revision(there: Facts, asked: Facts) -> str:
    before, now = (facts.get("images", {}).get("revision") for facts in (there, asked))
    return f" The data set has moved on: datasets:NAME@{before} is what it was." if before and now and before != now else ""


def _differences(there: Any, asked: Any, path: str = "") -> Iterator[str]:
    if isinstance(there, Mapping) and isinstance(asked, Mapping):
        for key in {**there, **asked}:
            yield from _differences(there.get(key), asked.get(key), f"{path}.{key}" if path else str(key))
    elif there != asked:
        yield f"{path}: {_short(there)} | {_short(asked)}"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:40]}...{text[-8:]}"
