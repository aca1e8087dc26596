"""Photos on the command line: found, shown to a model one after another, and recorded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text
from torch import nn

from ..errors import HookattnError
from ..extraction.sources.folders import photo_suffixes
from ..image.photo import Photo
from ..recording.recorder import AttentionRecorder
from .asked import Asked
from .models import load_model, read_size
from .output import console, join_sizes, printable, say

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}


class Recorded(NamedTuple):
    """A photo that was shown to a model, and what was recorded."""

    path: Path
    photo: Photo
    rec: AttentionRecorder


def find_photos(given: Sequence[Path]) -> list[Path]:
    """Files as they are given, and the photos in folders, by name.

    Raises:
        HookattnError: one is not there, or a folder has no photos in it.
    """
    found: list[Path] = []
    for path in given:
        try:
            inside = _photos_in(path) if path.is_dir() else [path] if path.exists() else []
        except (OSError, ValueError) as error:
            raise HookattnError(f"{path} cannot be read: {error}") from error
        if not inside:
            raise HookattnError(f"{path} is a folder without photos." if path.is_dir() else f"there is no file {path}.")
        found += inside
    return list(dict.fromkeys(found))


def _photos_in(folder: Path) -> list[Path]:
    return sorted(each for each in folder.iterdir() if each.suffix.lower() in photo_suffixes() and each.is_file())


def load_asked(asked: Asked) -> nn.Module:
    """Load the model that was asked for, onto its device and in its dtype.

    Raises:
        HookattnError: something that was typed names nothing.
    """
    size = read_size(asked.img_size)
    read_layers(asked.layers)
    if asked.dtype not in _DTYPES:
        raise HookattnError(f"--dtype {asked.dtype!r} is none of {', '.join(_DTYPES)}.")
    if asked.crop not in (None, "none", "center"):
        raise HookattnError(f"--crop={asked.crop!r} is no choice: none or center.")
    device = read_device(asked.device)
    with console.status(f"loading {asked.model}"):
        model = load_model(asked.model, asked.checkpoint, size, whole=asked.crop != "center")
        return model.to(device, _DTYPES[asked.dtype])


def read_device(text: str) -> torch.device:
    """A device that is there.

    Raises:
        HookattnError: there is none of that name.
    """
    try:
        device = torch.device(text)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).split("\n")[0]
        raise HookattnError(f"--device {text!r} is not here: {reason}") from error
    if device.type == "meta":
        raise HookattnError("--device meta computes nothing; take cpu.")
    return device


def read_layers(text: str | None) -> list[str | int] | None:
    """Names, globs and positions, separated by commas."""
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        raise HookattnError(f"--layers {text!r} has an empty name in it: names, globs or positions such as blocks.1*.attn,-1.")
    return [int(part) if part.isascii() and part.removeprefix("-").isdecimal() else part for part in parts]


def record_each(photos: Sequence[Path], model: nn.Module, asked: Asked, left_out: dict[str, str]) -> Iterator[Recorded]:
    """Show photos to a model, one after another, and yield what was recorded; with a bar where there are several.

    Args:
        photos: paths.
        model: see `load_asked`.
        asked: how photos are shown, and what is recorded.
        left_out: gets the photos that cannot be read, with the reason; a single one is an error.

    Raises:
        HookattnError: no photo can be read, or the model does not take them.
    """
    for path in _tracked(photos):
        try:
            photo = Photo.open(path, model, size=read_size(asked.img_size), crop=cast(Any, asked.crop))
        except HookattnError as error:
            left_out[str(path)] = str(error)
            if len(left_out) == len(photos):
                raise
            say(f"left out: {error}")
            continue
        yield Recorded(path, photo, _record(model, photo, asked))


def _record(model: nn.Module, photo: Photo, asked: Asked) -> AttentionRecorder:
    like = next(model.parameters())
    with AttentionRecorder(model, read_layers(asked.layers)) as rec, torch.no_grad():
        try:
            model(photo.tensor[None].to(like.device, like.dtype))
        except torch.OutOfMemoryError as error:
            raise HookattnError(
                f"there is not enough memory on {like.device}; take --img-size, or another --device."
            ) from error
        except (AssertionError, RuntimeError, ValueError, TypeError) as error:  # of the model's own code
            if isinstance(error, HookattnError):
                raise
            # not all models say which sizes they take, nor which types
            advice = "Try --dtype float32." if asked.dtype != "float32" else "Try --crop center, without --img-size."
            kind, size = type(model).__name__, join_sizes(photo.input_size)
            raise HookattnError(f"this {kind} takes no images of {size} in {asked.dtype} ({error}). {advice}") from error
    return rec


def describe(path: Path, photo: Photo) -> str:
    """Say what was done to a photo."""
    return f"{printable(path.name)}, {join_sizes(photo.size)}: {'; '.join(photo.steps) or 'as it is'} (crop {photo.crop})"


class Rate(ProgressColumn):
    """How many a second."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:.1f}/s" if task.speed else "")


def _tracked(photos: Sequence[Path]) -> Iterator[Path]:
    """The same, with a bar that tells how far it is, how fast, and how long it still takes."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Rate(), TimeRemainingColumn())
    hidden = len(photos) < 2 or not console.is_terminal
    with Progress(*columns, console=console, disable=hidden, transient=True) as bar:
        yield from bar.track(photos, description="photos")
