"""`hookattn show`: what is in a store or in a file of maps, and a picture or a page of one of its images."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import typer

import hookattn

from ..errors import HookattnError, UnreadableError
from ..extraction.read import Run, open_run
from ..figures.page import Shown, make_page
from ..image.photo import Photo
from ..image.pixels import read_photo
from ..recording.maps import Maps
from .asked import RETRY
from .explore import read_budget
from .files import MAPS, PICTURES, check_out, write_out
from .output import join_sizes, name_bytes, printable, say, say_left_out, say_missing
from .picture import save_picture
from .record import read_query

_PAGES = (".html", ".htm")
Facts = dict[str, Any]
Find = Callable[[], Shown]
"""Finds the maps of the image that is asked for."""


class Wanted(NamedTuple):
    """What is to be drawn, as it was typed.

    Attributes:
        image: name or number; None to say what there is.
        query: as for `hookattn record`.
        photo: the photo, where the store cannot find it, or a file of maps does not say.
        budget: of a page; None for 20MB.
        out: a picture or a page; None for attention.png.
    """

    image: str | None
    query: str | None
    photo: Path | None
    budget: str | None
    out: Path | None


def show_stored(where: str, wanted: Wanted, as_json: bool) -> None:
    """Say what is in a store or a file; of one of its images draw the maps, or make a page of them."""
    kinds = (*PICTURES, *_PAGES)
    if wanted.image is None and (wanted.out or wanted.query or wanted.photo or wanted.budget):
        raise HookattnError("name the image that is to be drawn, by its name or number: --image 0.")
    out = None if wanted.image is None else check_out(wanted.out or Path("attention.png"), kinds, [wanted.photo])
    if wanted.budget is not None and not _is_page(out):
        raise HookattnError(f"--budget {wanted.budget} is of a page, and {out} is a picture: -o NAME.html, or leave it out.")
    told, find = _open_file(Path(where), wanted) if where.lower().endswith(MAPS) else _open_store(where, wanted)
    if out is not None:
        with _answering_rows():
            _draw(find(), wanted, out)
    if as_json:
        typer.echo(json.dumps({**told, "wrote": None if out is None else str(out)}))


def _open_store(where: str, wanted: Wanted) -> tuple[Facts, Find]:
    run = open_run(where)
    model, counts = run.facts["run"]["model"]["name"], run.count()
    say(f"{printable(where)}: {model}, {len(run.layers)} layers, {counts.taken} of {len(run)} images")
    say_left_out(broken := run.broken())
    if broken:
        say(f"{len(broken)} could not be read; the same hookattn extract with {RETRY} tries them again")
    if counts.pending:
        say(f"{counts.pending} are not there yet; the same hookattn extract goes on with them")
    for spec in run.specs.values():
        say(f"  {spec.name:<10} {' x '.join(('image', *spec.dims))}, {join_sizes((len(run), *spec.shape))}, {spec.dtype}")

    say_missing(missing := run.facts["missing"], len(run.layers))

    def find() -> Shown:
        number = run.find(_find_name(str(wanted.image), run))
        return Shown(run.maps(number), _find_photo(run, number, wanted.photo), name=printable(run.names[number]))

    told = {"model": model, "layers": run.layers, "what": list(run.specs), "missing": missing}
    return {**told, **counts._asdict(), "left_out": broken}, find


def _open_file(path: Path, wanted: Wanted) -> tuple[Facts, Find]:
    if not path.is_file():
        raise HookattnError(f"there is no file {path}.")
    maps = hookattn.load(path)
    say(f"{printable(path.name)}: {len(maps)} maps of {maps.model}")
    for m in maps.values():
        say(f"  {m.name}  {join_sizes(m.shape)}")
    photo = None if wanted.photo is None else np.asarray(read_photo(wanted.photo, "white")[0])

    def find() -> Shown:
        count, image = maps[0].shape[0], wanted.image or ""
        if not (image.isascii() and image.isdecimal() and int(image) < count):
            raise HookattnError(f"--image {image!r} is no image of it: a number from 0 to {count - 1}.")
        return Shown(maps, photo, int(image), printable(path.stem))

    return {"model": maps.model, "layers": list(maps), "skipped": maps.skipped}, find


def _find_name(image: str, run: Run) -> int | str:
    """The name of an image, also where it was typed as it is printed, or its number."""
    if image in run.names:
        return image
    if image.removeprefix("-").isdecimal() and image.isascii():
        return int(image)
    return next((name for name in run.names if printable(name) == image), image)


def _find_photo(run: Run, number: int, given: Path | None) -> Photo | None:
    """The photo as the model was shown it: the one that is given, or read again where the run read it; None without it."""
    try:
        return run.photo(number, given)
    except (HookattnError, OSError) as error:
        if given is not None:
            raise
        say(f"drawn without the photo, which cannot be read again ({error}); name it: --photo FILE")
        return None


@contextmanager
def _answering_rows() -> Iterator[None]:
    """Say what to type where rows are asked for that were not stored."""
    try:
        yield
    except UnreadableError as error:
        reason = str(error).split(". ")[0].split(", as in")[0]
        raise HookattnError(
            f"{reason}. A page, and other queries than what was stored, need whole maps: hookattn extract --what maps into "
            "another store, or hookattn record -o NAME.safetensors without --query. A picture of what is there needs neither: "
            "-o NAME.png."
        ) from error


def _is_page(out: Path | None) -> bool:
    return out is not None and out.suffix.lower() in _PAGES


def _draw(shown: Shown, wanted: Wanted, out: Path) -> None:
    query = None if wanted.query is None else read_query(wanted.query)
    maps = cast(Maps, shown.maps)
    if not _is_page(out):
        save_picture(shown.image, maps, query, out, f"{shown.name}, {maps.model}", shown.index)
        return
    page = make_page([shown], query=query, budget=read_budget(wanted.budget or "20MB"), title=maps.model)
    write_out(out, page.save)
    say(f"wrote {printable(out)}, {name_bytes(out.stat().st_size)}")
