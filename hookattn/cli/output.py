"""What the commands print, and how an error that was raised on purpose is answered."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.table import Table

from ..errors import HookattnError
from ..recording.recorder import AttentionRecorder

# Into a file or a pipe tables get a fixed width: rich would take 80 columns, and break names of layers.
console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 160)


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


@contextmanager
def answering_errors() -> Iterator[None]:
    """Turn an error that was raised on purpose into a message and an exit status."""
    try:
        yield
    except HookattnError as error:  # any other is a fault of ours, and keeps its traceback
        Console(stderr=True, highlight=False, soft_wrap=True).print(f"hookattn: {error}", markup=False)
        raise typer.Exit(1) from None
