"""`hookattn explore`: a page to explore the attention of any model on photos."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import typer

from ..errors import HookattnError
from ..figures.page import Shown, make_page
from .asked import Asked
from .files import check_out, write_out
from .output import console, name_bytes, printable, say
from .photos import describe, find_photos, load_asked, record_each
from .record import read_query


def explore_photos(photos: Sequence[Path], asked: Asked, query: str | None, budget: str, out: Path, as_json: bool) -> None:
    """Write one page of all photos, after every map was put back into its module."""
    found, limit, wanted = find_photos(photos), read_budget(budget), None if query is None else read_query(query)
    page_file = check_out(out, (".html", ".htm"), (*found, asked.checkpoint))
    model, shown, left_out = load_asked(asked), list[Shown](), dict[str, str]()
    for path, photo, rec in record_each(found, model, asked, left_out):
        say(describe(path, photo))
        shown.append(Shown(rec.maps, photo, name=printable(path.name)))
    with console.status("computing every map, and putting it back into its module"):
        page = make_page(shown, query=wanted, budget=limit, title=asked.model)
    write_out(page_file, page.save)
    size = page_file.stat().st_size
    say(f"wrote {printable(page_file)}, {name_bytes(size)}")
    if as_json:
        typer.echo(json.dumps({"model": asked.model, "page": str(page_file), "bytes": size, "left_out": left_out}))


def read_budget(text: str) -> int:
    """A number of bytes: 20MB, 500 kB, 1e6.

    Raises:
        HookattnError: it is none.
    """
    units = {"GB": 10**9, "MB": 10**6, "KB": 10**3, "B": 1}
    number, unit = text.strip().upper(), 1
    for name, size in units.items():
        if number.endswith(name):
            number, unit = number.removesuffix(name), size
            break
    try:
        count = int(float(number) * unit)
    except (ValueError, OverflowError):
        count = 0
    if count <= 0:
        raise HookattnError(f"--budget {text!r} is no size of a file: 20MB, 500KB, or a number of bytes.")
    return count
