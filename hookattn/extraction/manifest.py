"""What a run is: model, weights, preprocessing, what is taken and how it is stored; and how two runs differ."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from typing import Any

import torch
from torch import nn

from ..errors import StoreError

Facts = dict[str, Any]
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


def check_same_run(there: Facts, asked: Facts, where: str) -> None:
    """Check that what a store was begun with is what is asked for now.

    Raises:
        StoreError: it is not; the message says what differs, and what to do.
    """
    if differing := list(_differences(there, asked)):
        raise StoreError(
            f"{where} was begun with other settings, and is not touched. There | asked for now: {'; '.join(differing[:6])}. "
            f"Ask for the same to go on with it, or name another store.{_advise_revision(there, asked)}"
        )


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
