"""What the page holds of each map: rows in bytes, where their tokens lie, and figures of its heads."""

from __future__ import annotations

import base64
import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..analysis.rollouts import relevance, rollout
from ..analysis.statistics import compute_statistics, entropy, mean_attention_distance
from ..errors import HookattnError, TokenError
from ..image.tokens import Tokens
from ..maps.attention_map import AttentionMap
from ..maps.picture import select_queries
from .panels import find_chain, of_image

POOLS = (1, 2, 3, 4, 6, 8, 12, 16, 32)
_MATRIX = 4096**2  # elements of a rollout: above that it takes longer than all the rest of the page


@dataclass(frozen=True, eq=False)
class Layer:
    """A map of one image on the page, or what several make: rollout, relevance.

    Attributes:
        kind: "map", "rollout" or "relevance".
        heads: how many.
        queries, keys: what the rows and the columns stand for, of this image.
        read: calls its argument with (rows, chunk), chunks being (windows, heads, rows, keys), until all rows were there.
        mean: (windows, queries), the weight of each row in the mean of all patches.
        facts: what else the page says of it.
    """

    name: str
    kind: str
    heads: int
    queries: Tokens
    keys: Tokens
    read: Callable[[Callable[[slice, slice, Tensor], None]], None]
    mean: Tensor
    dtype: torch.dtype
    facts: dict[str, Any] = field(default_factory=dict)

    def pooled(self, pool: int) -> Tokens:
        """The queries after `pool` x `pool` neighbours have become one; only where one window holds all of them in order."""
        rows, columns = self.queries.grid_size
        if pool == 1 or self.queries.places is not None or not rows * columns:
            return self.queries
        grid = -(-rows // pool), -(-columns // pool)
        height, width = (reach * m * pool / n for reach, m, n in zip(self.queries.extent, grid, (rows, columns)))
        return replace(self.queries, grid_size=grid, extent=(height, width))

    def size(self, pool: int) -> int:
        """Bytes, before they are compressed, of which attention leaves little to gain."""
        return self.keys.windows * self.heads * (len(self.pooled(pool)) + 1) * (len(self.keys) + 4)


@dataclass(frozen=True, eq=False)
class Packed:
    """Rows in bytes.

    Attributes:
        block: the top of each row in float32, then all bytes; compressed, in base64.
        error: the largest distance of a value from what is read of them.
        signed: whether some values are below zero.
    """

    block: str
    error: float
    signed: bool


def layer_of(m: AttentionMap, index: int) -> Layer:
    """One map of one image, of which nothing is computed yet but figures of its heads.

    Raises:
        TokenError: it is not known where its tokens lie, or there is no such image.
    """
    queries, keys = m.query_tokens, m.tokens
    windows = keys.windows
    images = m.shape[0] // windows
    if not -images <= index < images:
        raise TokenError(f"there is no image {index}: index= runs from 0 to {images - 1}.")
    items = slice(index % images * windows, (index % images + 1) * windows)
    patches = select_queries(queries, keys, "mean")
    patches = patches[index % len(patches)]
    own = [of_image(tokens, index) for tokens in (queries, keys)]
    facts = {"shape": list(m.shape), **_verified(m), **_figures(m, index % images, items)}
    read = lambda visit: m.visit(visit, items)  # noqa: E731
    return Layer(m.name, "map", m.shape[1], own[0], own[1], read, patches / patches.sum(), m._spec().dtype, facts)


def combined(maps: Sequence[AttentionMap], index: int) -> tuple[list[Layer], str]:
    """The rollout of maps that follow each other, and, where gradients were recorded, their relevance; why not, in words."""
    square = find_chain(maps)
    if not square:
        return [], ""
    if math.prod(square[0].shape[2:]) > _MATRIX:
        tokens = math.isqrt(_MATRIX)
        return [], f"There is no rollout of more than {tokens:,} tokens on the page: see hookattn.analysis.rollout(maps)."
    last, found = _weigh_patches(square[-1], index), []
    for kind, combine in (("rollout", rollout), ("relevance", relevance)):
        try:
            with torch.no_grad():
                matrix = combine(square)[index].detach()
        except HookattnError:  # no gradients were recorded, or none has come
            continue
        if kind == "relevance":
            matrix = matrix - torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
        found.append(_layer_of_matrix(kind, matrix, last, f"{square[0].name} to {square[-1].name}"))
    return found, ""


def _weigh_patches(m: AttentionMap, index: int) -> tuple[Tokens, Tensor]:
    """The tokens of a map of all tokens of one image, and the weight of each in the mean of all patches."""
    tokens, patches = m.tokens, m.tokens.select("mean")
    patches = patches[index % len(patches)]
    return of_image(tokens, index), patches / patches.sum()


def pack(layer: Layer, pool: int = 1) -> Packed:
    """Compute all rows of a layer, and the mean of its patches, and put them into bytes that grow with the square root."""
    with torch.no_grad():
        rows = _pool(layer, layer.pooled(pool), pool)
    tops = rows.abs().amax(-1, keepdim=True).float()
    share = rows / torch.where(tops > 0, tops, 1.0)
    signed = bool((rows < 0).any())
    # the square root leaves small values their digits: steps of 1/255 of a row that looks at one register show nothing else
    root = share.abs().sqrt().clamp(max=1).nan_to_num()
    steps = (root * share.sign().nan_to_num() * 127 + 128 if signed else root * 255).round()
    read = ((steps - 128) / 127).abs() ** 2 * (steps - 128).sign() if signed else (steps / 255) ** 2
    error = (read * tops.double() - rows.double()).abs().nan_to_num().max()
    raw = tops.numpy().astype("<f4").tobytes() + steps.to(torch.uint8).numpy().tobytes()
    return Packed(base64.b64encode(zlib.compress(raw, 6)).decode(), float(error), signed)


def choose_layers(layers: Sequence[Layer], room: int) -> tuple[list[int], int]:
    """Which layers there is room for, evenly and with the last, and how many neighbours are pooled to one query.

    Rather than half of the layers, queries are pooled.

    Raises:
        ValueError: there is no room for a single one.
    """
    best: tuple[list[int], int] = ([], 1)
    for pool in POOLS:
        sizes = [layer.size(pool) for layer in layers]
        evenly = ([(i + 1) * len(layers) // n - 1 for i in range(n)] for n in range(len(layers), 0, -1))
        kept = next((each for each in evenly if sum(sizes[i] for i in each) <= room), [])
        if len(kept) > len(best[0]):
            best = kept, pool
        if 2 * len(kept) >= len(layers):
            return best
    if not best[0]:
        least = min(layers[-1].size(pool) for pool in POOLS)
        raise ValueError(f"the page has no room for a single map: give a budget= of {4 * least // 3:,} bytes more.")
    return best


def _pool(layer: Layer, queries: Tokens, pool: int) -> Tensor:
    """(windows, heads, queries + 1, keys): all rows, neighbours as their mean, and last the mean of all patches."""
    groups = _groups(layer.queries, queries, pool)
    counts = torch.bincount(groups, minlength=len(queries))
    shape = layer.keys.windows, layer.heads, len(queries) + 1, len(layer.keys)
    rows = torch.zeros(shape, dtype=torch.float64 if layer.dtype == torch.float64 else torch.float32, device="cpu")

    def add(items: slice, span: slice, chunk: Tensor) -> None:
        chunk = chunk.detach().cpu().to(rows)
        own = groups[span]
        rows[items].index_add_(2, own, chunk / counts[own][:, None])
        rows[items, :, -1] += torch.einsum("wq,whqk->whk", layer.mean[items, span].to(chunk), chunk)

    layer.read(add)
    return rows


def _groups(before: Tokens, after: Tokens, pool: int) -> Tensor:
    """The number of the pooled query that each query becomes a part of."""
    if before.grid_size == after.grid_size:
        return torch.arange(len(before), device="cpu")
    rows, columns = before.grid_size
    row, column = torch.arange(rows, device="cpu")[:, None] // pool, torch.arange(columns, device="cpu") // pool
    named = len(before.prefix)
    return torch.cat((torch.arange(named, device="cpu"), (named + row * after.grid_size[1] + column).flatten()))


def _verified(m: AttentionMap) -> dict[str, Any]:
    try:
        return {"verified": float(m.verify())}
    except HookattnError as error:
        return {"verified": None, "unverified": str(error)}


def _figures(m: AttentionMap, image: int, items: slice) -> dict[str, Any]:
    """Mean entropy and mean attention distance of each head, of one image."""
    with torch.no_grad():
        try:
            rows, far = compute_statistics(m, entropy, mean_attention_distance)
            distance = far[image].tolist()
        except TokenError:  # queries without a place
            (rows,) = compute_statistics(m, entropy)
            distance = [math.nan] * m.shape[1]
    spread = rows[items].mean((0, 2)).tolist()
    return {"entropy": [_plain(v) for v in spread], "distance": [_plain(v) for v in distance]}


def _plain(value: float) -> float | None:
    """A number as JSON knows it."""
    return float(f"{value:.4g}") if math.isfinite(value) else None


def _layer_of_matrix(kind: str, matrix: Tensor, tokens: tuple[Tokens, Tensor], of: str) -> Layer:
    def read(visit: Callable[[slice, slice, Tensor], None]) -> None:
        visit(slice(None), slice(None), matrix[None, None])

    return Layer(kind, kind, 1, tokens[0], tokens[0], read, tokens[1], matrix.dtype, {"of": of})
