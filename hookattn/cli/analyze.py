"""`hookattn analyze`: figures of each head over many photos, as a table or a picture."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import typer

from ..analysis.heads import HeadSummary, summarize_heads
from ..errors import MissingExtraError
from .asked import Asked
from .files import check_out, write_out
from .output import printable, say
from .photos import find_photos, load_asked, record_each

_PLOTS = (".png", ".pdf", ".svg")
_FIGURES = ("entropy", "distance", "patches", "prefix")
Row = dict[str, Any]


def analyze_photos(photos: Sequence[Path], asked: Asked, out: Path, *, per_photo: bool, as_json: bool) -> None:
    """Write the figures of each head: their mean over photos, or those of each photo."""
    found = find_photos(photos)
    out = check_out(out, (".csv", ".parquet", *_PLOTS), (*found, asked.checkpoint))
    if out.suffix.lower() == ".parquet":
        _import_pandas()
    model, mean, rows, left_out = load_asked(asked), Mean(), list[Row](), dict[str, str]()
    for path, _, rec in record_each(found, model, asked, left_out):
        summaries = summarize_heads(rec)
        mean.add(summaries)
        rows += [{"photo": str(path), **each._asdict()} for each in summaries] if per_photo else []
    write_rows(out, rows or [{**each._asdict(), "photos": mean.photos} for each in mean.rows()], mean.rows())
    say(f"{mean.photos} photos, {len(mean.rows())} heads of {asked.model}; wrote {printable(out)}")
    if as_json:
        heads = [{k: _plain(v) for k, v in each._asdict().items()} for each in mean.rows()]
        told = {"model": asked.model, "wrote": str(out), "photos": mean.photos, "left_out": left_out, "heads": heads}
        typer.echo(json.dumps(told))


class Mean:
    """The mean of figures over photos, added up photo by photo; a figure that a photo has not is left out of its mean."""

    def __init__(self) -> None:
        self.photos = 0
        self._sums: dict[tuple[str, int, int], dict[str, tuple[float, int]]] = {}

    def add(self, rows: Iterable[HeadSummary]) -> None:
        """Add the heads of one photo."""
        self.photos += 1
        for row in rows:
            sums = self._sums.setdefault((row.layer, row.depth, row.head), {})
            for name in (*_FIGURES, "keys"):
                total, count = sums.get(name, (0.0, 0))
                value = float(getattr(row, name))
                sums[name] = (total, count) if math.isnan(value) else (total + value, count + 1)

    def rows(self) -> list[HeadSummary]:
        """The means, in the order of layers and heads."""
        return [self._mean(*key, sums) for key, sums in sorted(self._sums.items(), key=lambda item: item[0][1:])]

    @staticmethod
    def _mean(layer: str, depth: int, head: int, sums: dict[str, tuple[float, int]]) -> HeadSummary:
        means = {name: total / count if count else math.nan for name, (total, count) in sums.items()}
        keys = round(means.pop("keys"))
        return HeadSummary(layer, depth, head, **means, keys=keys)


def write_rows(out: Path, rows: Sequence[Row], means: Sequence[HeadSummary]) -> None:
    """Write rows as a table, or draw the means, as the suffix says."""
    kind = out.suffix.lower()
    if kind == ".csv":
        write_out(out, lambda path: _write_csv(path, rows))
    elif kind == ".parquet":
        write_out(out, lambda path: _import_pandas().DataFrame(rows).to_parquet(path, index=False))
    else:
        from ..figures.plot import statistics

        write_out(out, statistics(means).savefig)


def _write_csv(path: Path, rows: Sequence[Row]) -> None:
    # bytes of names that are no letters are written as they are
    with path.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _import_pandas() -> Any:
    try:
        import pandas

        import_module("pyarrow")
    except ImportError as error:
        raise MissingExtraError('parquet needs pandas and pyarrow: pip install "hookattn[table]". Or write a .csv.') from error
    return pandas


def _plain(value: Any) -> Any:
    """JSON has no NaN."""
    return None if isinstance(value, float) and math.isnan(value) else value
