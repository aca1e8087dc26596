"""What each head does, in a few figures: one row for each layer and head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from torch import Tensor

from ..errors import MissingExtraError, TokenError
from ..maps.attention_map import AttentionMap
from .layers import LayerMaps, layers_in
from .statistics import compute_statistics, entropy, mean_attention_distance, received

if TYPE_CHECKING:
    import pandas


Rows = Sequence[NamedTuple]
"""Figures of heads: one for each layer and head, with these as `layer` and `head`."""


class HeadSummary(NamedTuple):
    """A head of a layer, over all images and queries of its map.

    Attributes:
        layer: name of the map.
        depth: the how manieth map it is, from 0 on.
        head: number of the head.
        entropy: mean entropy of its rows, in nats.
        distance: mean attention distance in pixels, see `mean_attention_distance`; NaN where tokens have no place.
        patches, prefix: mean share that goes to patches, and to the class token, registers and others before them; NaN where
            it is not known which tokens are what.
        keys: how many keys a row has: log(keys) is the highest entropy.
    """

    layer: str
    depth: int
    head: int
    entropy: float
    distance: float
    patches: float
    prefix: float
    keys: int


def summarize_heads(maps: LayerMaps) -> list[HeadSummary]:
    """Take the figures of all heads of all layers, each map once and in chunks.

    Args:
        maps: a recorder, or maps of one forward, first layer first: `rec.maps`, or some of them.

    Raises:
        StaleMapError, UnreadableError: as when a map is sliced.
    """
    return [row for depth, m in enumerate(layers_in(maps)) for row in _summarize(m, depth)]


def to_frame(table: LayerMaps | Rows, *more: LayerMaps | Rows) -> pandas.DataFrame:
    """The same as a table of pandas, one row for each layer and head: `to_frame(rec).to_csv("heads.csv")`.

    Columns of other rows follow, by layer and head, for all that is to be known of a head side by side:

        to_frame(rec, compare_with_mean(rec), registers(rec, features), head_importance(model, loader, loss))

    Args:
        table: a recorder or maps, of which figures are taken as by `summarize_heads`; or rows of heads.
        more: rows of heads, such as `head_importance` returns; a head that they leave out has NaN.

    Raises:
        MissingExtraError: pandas is not installed.
        ValueError: two of them have a column of the same name.
        StaleMapError, UnreadableError: as when a map is sliced.
    """
    try:
        import pandas
    except ImportError as error:
        raise MissingExtraError('tables need pandas: pip install "hookattn[table]".') from error
    tables = [_rows_of(each) for each in (table, *more)]
    columns = [column for rows in tables for column in rows[0]] if all(tables) else []
    if twice := sorted({column for column in columns if columns.count(column) > 1} - {"layer", "depth", "head"}):
        raise ValueError(f"several of the tables have {', '.join(map(repr, twice))}: make a frame of each, and rename there.")
    first, *others = [pandas.DataFrame(rows, columns=None if rows else list(HeadSummary._fields)) for rows in tables]
    for other in others:
        first = first.merge(other.drop(columns="depth", errors="ignore"), on=["layer", "head"], how="left")
    return first


def _rows_of(table: LayerMaps | Rows) -> list[dict[str, Any]]:
    """Rows as dicts, in which what has a name of its own is a column."""
    listed = isinstance(table, Sequence) and table and isinstance(table[0], tuple)
    rows = cast(Rows, table) if listed else summarize_heads(cast(LayerMaps, table))
    return [_flatten(row._asdict()) for row in rows]


def _flatten(row: dict[str, Any]) -> dict[str, Any]:
    inner = {name: value for value in row.values() if isinstance(value, Mapping) for name, value in value.items()}
    return {**{name: value for name, value in row.items() if not isinstance(value, Mapping)}, **inner}


def _summarize(m: AttentionMap, depth: int) -> list[HeadSummary]:
    try:
        rows, columns, far = compute_statistics(m, entropy, received, mean_attention_distance)
        distance = far.nanmean(0)
    except TokenError:
        rows, columns = compute_statistics(m, entropy, received)
        distance = rows.new_full((m.shape[1],), float("nan"))
    patches, prefix = _shares(m, columns.mean(0))
    figures = zip(rows.mean((0, 2)).tolist(), distance.tolist(), patches.tolist(), prefix.tolist())
    return [HeadSummary(m.name, depth, head, *each, m.shape[3]) for head, each in enumerate(figures)]


def _shares(m: AttentionMap, columns: Tensor) -> tuple[Tensor, Tensor]:
    """What goes to patches and to prefix tokens, by head, of (heads, keys)."""
    try:
        count = m.tokens.num_prefix_tokens
    except TokenError:
        unknown = columns.new_full(columns.shape[:1], float("nan"))
        return unknown, unknown
    return columns[:, count:].sum(1), columns[:, :count].sum(1)
