"""The least work that attention and a reading of it need, counted from shapes: operations and bytes.

B images, L layers, N tokens, width C, H heads of d = C / H. A multiply-add is two operations. Biases and norms are left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

MAP_BYTES = 4  # of one entry: maps are float32, whatever the dtype of x
SOFTMAX = 5  # operations for one score: largest, difference, exponential, sum, quotient
PATCH, IMAGE, CLASSES, HIDDEN = 16, 224, 1000, 4  # of the plain ViT; its MLP is four times as wide


@dataclass(frozen=True)
class Sizes:
    """What is counted for, and measured.

    Attributes:
        tokens, width, heads, batch: of x, (batch, tokens, width), and of the attention on it.
        layers: blocks of a plain ViT; 0 for an attention module alone.
    """

    tokens: int
    width: int = 384
    heads: int = 6
    layers: int = 0
    batch: int = 1

    @property
    def modules(self) -> int:
        """How many attention modules are read."""
        return max(1, self.layers)


def operations_projected(s: Sizes, heads: int, rows: int) -> int:
    """Scores of h heads and r rows of one map, from queries and keys: q is 2 r C (h d), k 2 N C (h d), q k^T 2 r N (h d)."""
    columns = heads * s.width // s.heads
    return 2 * columns * (rows * s.width + s.tokens * s.width + rows * s.tokens)


def operations_absorbed(s: Sizes, heads: int, rows: int) -> int:
    """Scores of h heads and r rows of one map as (q W_k) x^T: q is 2 r C (h d), q W_k 2 r (h d) C, the rest 2 h r N C.

    Keys are never projected; what their bias adds is the same along a row and drops out of the softmax.
    """
    columns = heads * s.width // s.heads
    return 2 * rows * s.width * (2 * columns + heads * s.tokens)


def operations_reading(s: Sizes, heads: int, rows: int, after: int = 0) -> int:
    """B L times the less of both, with 5 h r N for the softmax and `after` more for each probability."""
    scores = min(operations_projected(s, heads, rows), operations_absorbed(s, heads, rows))
    return s.modules * s.batch * (scores + (SOFTMAX + after) * heads * rows * s.tokens)


def bytes_reading(s: Sizes, heads: int, written: int, itemsize: int) -> int:
    """L times x, B N C, and W_q and W_k of h heads, 2 C (h d), each read once, and the result, B `written`, written once."""
    weights = 2 * s.width * heads * s.width // s.heads
    return s.modules * (itemsize * (s.batch * s.tokens * s.width + weights) + MAP_BYTES * s.batch * written)


def bytes_of_maps(s: Sizes, heads: int) -> int:
    """The N x N maps of h heads of each layer and image."""
    return MAP_BYTES * s.modules * s.batch * heads * s.tokens**2


def operations_forward(s: Sizes) -> int:
    """B times, for attention, 8 N C^2 of projections, 4 N^2 C of q k^T and A v, and 5 H N^2 of softmax.

    For a ViT L times that and 16 N C^2 of an MLP, besides 2 (N - 1) 768 C of its patches and 2 C 1000 of its classes.
    """
    attention = 8 * s.tokens * s.width**2 + 4 * s.tokens**2 * s.width + SOFTMAX * s.heads * s.tokens**2
    if not s.layers:
        return s.batch * attention
    ends = 2 * s.width * ((s.tokens - 1) * 3 * PATCH**2 + CLASSES)
    return s.batch * (s.layers * (attention + 4 * HIDDEN * s.tokens * s.width**2) + ends)


def bytes_forward(s: Sizes, itemsize: int) -> int:
    """x and 4 C^2 of weights read once, the output written once; for a ViT images and all its matrices read, logits written."""
    if not s.layers:
        return itemsize * (2 * s.batch * s.tokens * s.width + 4 * s.width**2)
    weights = s.layers * (4 + 2 * HIDDEN) * s.width**2 + s.width * (3 * PATCH**2 + CLASSES)
    return itemsize * (s.batch * (3 * (s.tokens - 1) * PATCH**2 + CLASSES) + weights)


def with_limit(row: dict[str, Any], peak: dict[str, float]) -> dict[str, Any]:
    """A row of results with the least time that its work takes, what sets that, and how much of that speed was reached.

    Args:
        row: with "operations", "bytes", and "seconds" if it was measured.
        peak: "operations_per_second", "bytes_per_second".
    """
    bounds = {kind: row[kind] / peak[f"{kind}_per_second"] for kind in ("operations", "bytes")}
    limit, bound = max((seconds, kind) for kind, seconds in bounds.items())
    found = {**row, "limit_seconds": float(f"{limit:.6g}"), "bound": bound}
    if "seconds" in row:
        found["of_the_limit"] = float(f"{limit / row['seconds']['median']:.4g}")
    return found
