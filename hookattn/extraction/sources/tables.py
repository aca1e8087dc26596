"""Images in a column of Parquet files, as bytes or as Hugging Face writes them."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

from ...errors import HookattnError, MissingExtraError
from .columns import choose_images, choose_labels, name_label, name_rows
from .images import Images, check_names
from .places import answering, join, name_file, open_file

try:
    import pyarrow as pa
    import pyarrow.parquet as pq
except ImportError as error:
    raise MissingExtraError('Parquet files need pyarrow: pip install "hookattn[table]".') from error


class Tables(Images):
    """Images in Parquet files. The last group of rows is kept, so that whoever reads in order reads each group once.

    Args:
        folder: that files are seen from.
        files: the tables.
        image: the column of images; None for the only one that can be.
        label: the column of labels; None for "label", where there is one.

    Raises:
        HookattnError: a file is no Parquet or has no such column, or there are no rows.
    """

    def __init__(self, folder: str, files: Sequence[str], image: str | None, label: str | None) -> None:
        self._addresses = [join(folder, file) for file in files]
        self._column, self._kept = image, (-1, pa.nulls(0))
        self._groups: list[tuple[int, int]] = []  # of each group of rows, the file and its number there
        sizes: list[int] = []
        paths: list[str | None] = []
        rows: list[str] = []
        self.labels = []
        for n, file in enumerate(files):
            with _opened(self._addresses[n]) as table:
                fitting = [field.name for field in table.schema_arrow if _holds_bytes(field.type)]
                kinds = {field.name: field.type for field in table.schema_arrow}
                self._column = choose_images(self._column, fitting, kinds, self._addresses[n])
                found = [table.metadata.row_group(group).num_rows for group in range(table.num_row_groups)]
                self._groups += [(n, group) for group in range(len(found))]
                sizes += found
                rows += [f"{name_file(file, folder)}/{row}" for row in range(sum(found))]
                paths += _read_paths(table, self._column)
                self.labels += _read_labels(table, choose_labels(label, table.schema_arrow.names, self._addresses[n]))
        self._starts = [0, *accumulate(sizes)]
        self.names = name_rows(paths, rows)
        if not rows:
            raise HookattnError(f"there are no rows in {self._addresses[0]!r}.")
        check_names(self.names, "leave one of the two out")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": (-1, pa.nulls(0))}

    def read(self, index: int) -> bytes:
        index = range(len(self))[index]
        n = bisect_right(self._starts, index) - 1
        value = self._read_group(n)[index - self._starts[n]].as_py()
        found = value["bytes"] if isinstance(value, dict) else value
        if not found:
            raise HookattnError(f"{self.names[index]!r} has no bytes in column {self._column!r} of its table.")
        return bytes(found)

    def _read_group(self, n: int) -> pa.ChunkedArray:
        kept, column = self._kept
        if kept != n:
            file, group = self._groups[n]
            with _opened(self._addresses[file]) as table:
                column = table.read_row_group(group, columns=[self._column], use_threads=False).column(0)
            self._kept = n, column
        return column


@contextmanager
def _opened(address: str) -> Iterator[pq.ParquetFile]:
    with answering(address), open_file(address) as file, pq.ParquetFile(file) as table:
        yield table


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and _holds_bytes(kind.field("bytes").type)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _read_paths(table: pq.ParquetFile, column: str) -> list[str | None]:
    """What the images are called, without their bytes, where Hugging Face wrote both."""
    kind = table.schema_arrow.field(column).type
    if not pa.types.is_struct(kind) or kind.get_field_index("path") < 0:
        return [None] * table.metadata.num_rows
    found = table.read(columns=[f"{column}.path"], use_threads=False).column(0)
    return [value and value["path"] for value in found.to_pylist()]


def _read_labels(table: pq.ParquetFile, column: str | None) -> list[str]:
    if column is None:
        return [""] * table.metadata.num_rows
    found = table.read(columns=[column], use_threads=False).column(0).to_pylist()
    written = json.loads((table.schema_arrow.metadata or {}).get(b"huggingface", b"{}"))
    classes = written.get("info", {}).get("features", {}).get(column, {}).get("names")
    return [name_label(value, classes) for value in found]
