"""Files of named tensors in the format of safetensors: written one tensor at a time, whole or not at all, and read lazily."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Union

import torch
from torch import Tensor

from ..errors import HookattnError

PathLike = Union[str, "os.PathLike[str]"]
_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.bool: "BOOL",
}


class Entry(NamedTuple):
    """A tensor of a file that is to be written, made when it is its turn."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]


def entry_of(tensor: Tensor) -> Entry:
    """An entry of a tensor that is there already."""
    return Entry(tuple(tensor.shape), tensor.dtype, lambda: tensor)


def write_file(path: PathLike, entries: Mapping[str, Entry], metadata: Mapping[str, str]) -> None:
    """Write tensors, of which no more than one is there at a time, and what is to be known of them.

    Raises:
        HookattnError: the file cannot be written, or a tensor turns out to be another one than was announced.
    """
    # as safetensors has them: large items first, so that each tensor begins at a multiple of the size of its items
    ordered = dict(sorted(entries.items(), key=lambda item: -item[1].dtype.itemsize))
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    end = 0
    for name, (shape, dtype, _) in ordered.items():
        start, end = end, end + dtype.itemsize * torch.Size(shape).numel()
        header[name] = {"dtype": _NAMES[dtype], "shape": shape, "data_offsets": (start, end)}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with _replaced(Path(path)) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, entry in ordered.items():
            tensor = entry.make()
            if (tuple(tensor.shape), tensor.dtype) != entry[:2]:
                raise HookattnError(f"{name!r} is {tuple(tensor.shape)}, {tensor.dtype}, and was {entry[:2]} a moment ago.")
            file.write(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)


def open_file(path: PathLike) -> tuple[dict[str, str], Callable[[str], Tensor]]:
    """What is to be known of the tensors of a file, and a function that gives one by name.

    Tensors are mapped into memory: what is not looked at is not read.

    Raises:
        FileNotFoundError: there is none.
        HookattnError: it is no such file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        file = safe_open(os.fspath(path), framework="pt")
    except FileNotFoundError:
        raise
    except (SafetensorError, OSError) as error:
        raise HookattnError(f"{os.fspath(path)} is no safetensors file that can be read: {error}.") from error
    return file.metadata() or {}, file.get_tensor  # type: ignore[no-untyped-call]


@contextmanager
def _replaced(path: Path) -> Iterator[BinaryIO]:
    """A file beside the one that is asked for, which takes its place once it is whole."""
    if not path.parent.is_dir():
        raise HookattnError(f"there is no folder {path.parent}: make it first, or name another.")
    if path.is_dir():
        raise HookattnError(f"{path} is a folder: name a file in it, such as {path / 'maps.safetensors'}.")
    # as short as can be: the name that was asked for may be as long as names can be
    beside = path.with_name(f".{uuid.uuid4().hex[:8]}.part")
    try:
        with open(beside, "xb") as file:
            yield file
        os.replace(beside, path)
    except BaseException as error:
        beside.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise HookattnError(f"{path} cannot be written: {error.strerror or error}.") from error
        raise
