"""What the commands print, and how an error that was raised on purpose is answered."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import typer
from rich.console import Console
from rich.table import Table

from ..errors import HookattnError

if TYPE_CHECKING:
    from ..recording.recorder import AttentionRecorder

# Into a file or a pipe tables get a fixed width: rich would take 80 columns, and break names of layers.
console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 160)

_TOLD = 10  # images that are told one by one


def say(text: str) -> None:
    """Print lines as they are: brackets are no markup, and nothing in a name steers the terminal."""
    console.print("\n".join(map(printable, text.split("\n"))), markup=False)


def say_left_out(broken: Mapping[str, str]) -> None:
    """Print which images could not be read, and why; of many the first."""
    for name, why in list(broken.items())[:_TOLD]:
        say(f"left out: {printable(name)}: {why}")
    if len(broken) > _TOLD:
        say(f"left out: {len(broken) - _TOLD} more; the store's `error` says why")


def say_missing(missing: Mapping[str, Mapping[str, str]], layers: int) -> None:
    """Print which quantities some of so many layers do not have, and why the first of them does not."""
    for quantity, reasons in missing.items():
        name, why = next(iter(reasons.items()))
        say(f"{quantity}: NaN in {len(reasons)} of {layers} layers, as in {name}: {why}")


def print_error(text: str) -> None:
    """Print one line to stderr."""
    typer.echo(printable(f"hookattn: {' '.join(text.split())}"), err=True)


def printable(text: object) -> str:
    """A text whose control characters, and bytes that are no letters, are written as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


@contextmanager
def answering_errors(as_json: bool = False) -> Iterator[None]:
    """Turn an error that was raised on purpose into a message and an exit status; with JSON on stdout, print on stderr."""
    console.stderr = as_json
    try:
        yield
    except HookattnError as error:  # any other is a fault of ours, and keeps its traceback
        print_error(str(error))
        raise typer.Exit(1) from None
    finally:
        console.stderr = False


def make_table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def join_sizes(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def name_bytes(count: int) -> str:
    size, unit = float(count), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if size < 1024 or unit == "TiB":
            break
        size /= 1024
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"


def name_shapes(rec: AttentionRecorder) -> str:
    return ", ".join(dict.fromkeys(join_sizes(m.shape) for m in rec.maps.values()))


def below_site_packages(file: str) -> str:
    return file.rpartition("site-packages/")[2]
