"""`hookattn record`: any model on any photos, and a picture of each, or the maps themselves."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import typer

from ..image.tokens import Query
from .asked import Asked
from .files import MAPS, PICTURES, check_folder, check_out, write_out
from .output import join_sizes, name_bytes, name_shapes, printable, say
from .photos import Recorded, describe, find_photos, load_asked, record_each
from .picture import save_picture


def record_photos(photos: Sequence[Path], asked: Asked, query: str | None, out: Path | None, as_json: bool) -> None:
    """Draw what a query attends to in each photo, after every map was put back into its module."""
    found, wanted = find_photos(photos), None if query is None else read_query(query)
    outs = _outs(found, out, asked.checkpoint, is_folder=len(found) > 1 or photos[0].is_dir())
    model, told, left_out = load_asked(asked), list[dict[str, Any]](), dict[str, str]()
    for recorded in record_each(found, model, asked, left_out):
        told.append(_draw(recorded, asked.model, wanted, outs[recorded.path]))
    if as_json:
        typer.echo(json.dumps({"model": asked.model, "photos": told, "left_out": left_out}))


def _draw(recorded: Recorded, name: str, query: Query | None, out: Path) -> dict[str, Any]:
    """Check and draw the maps of one photo, and tell what there is."""
    path, photo, rec = recorded
    say(describe(path, photo))
    moved = rec.verify()
    say(f"{printable(path.name)} at {join_sizes(photo.input_size)}: {len(rec.maps)} maps of {name}, {name_shapes(rec)}")
    say(f"put back into their modules, they move the output by {moved:.1e} at most")
    if out.suffix.lower() == MAPS:
        write_out(out, lambda beside: rec.save(beside, rows=query))
        say(f"wrote {printable(out)}, {name_bytes(out.stat().st_size)}; hookattn.load takes it")
    else:
        save_picture(photo, rec.maps, query, out, f"{printable(path.name)}, {name}")
    return {
        "photo": str(path),
        "picture": str(out),
        "size": photo.size,
        "input_size": photo.input_size,
        "crop": photo.crop,
        "steps": photo.steps,
        "moved": moved,
        "maps": [{"name": m.name, "shape": m.shape} for m in rec.maps.values()],
    }


def _outs(photos: Sequence[Path], out: Path | None, checkpoint: Path | None, is_folder: bool) -> dict[Path, Path]:
    """Where the picture of each photo goes, checked."""
    if not is_folder and (out is None or not os.path.isdir(out)):
        return {photos[0]: check_out(out or Path("attention.png"), (*PICTURES, MAPS), (*photos, checkpoint))}
    folder = out or Path("attention")
    check_folder(folder / "picture.png")
    return dict(zip(photos, _names(photos, folder)))


def _names(photos: Sequence[Path], folder: Path) -> Iterator[Path]:
    """A picture for each photo, under its name; a number is added where there are several of one name."""
    used: dict[str, int] = {}
    for photo in photos:
        count = used[photo.stem] = used.get(photo.stem, 0) + 1
        name = f"{photo.stem}.png" if count == 1 else f"{photo.stem}-{count}.png"
        yield check_out(folder / name, PICTURES, photos)


def read_query(text: str) -> Query:
    """What was typed as a query: a name, a number, a row and a column, or a point in fractions of the image."""
    parts = text.split(",")
    try:
        if any("." in part for part in parts):
            y, x = (float(part) for part in parts)
            return y, x
        numbers = [int(part) for part in parts]
    except ValueError:
        return text
    if len(numbers) == 2:
        return numbers[0], numbers[1]
    return numbers[0] if len(numbers) == 1 else text
