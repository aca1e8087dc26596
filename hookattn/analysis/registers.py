"""What goes to tokens that stand for no part of the image, or no longer do: class token, registers, patches of high norm."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import nan
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from ..errors import TokenError
from ..image.tokens import Query
from ..maps.attention_map import AttentionMap
from .layers import LayerMaps, layers_in
from .statistics import received

_OUTLIER = 10 * 1.4826  # times the median absolute deviation: ten standard deviations, if norms were normal


class RegisterShares(NamedTuple):
    """Where the attention of a head goes, over all images.

    Attributes:
        layer: name of the map.
        depth: the how manieth map it is, from 0 on.
        head: number of the head.
        prefix: share of each prefix token by name: "cls", "reg0", ...
        high_norm: share of patches of high norm; NaN if no features are given.
    """

    layer: str
    depth: int
    head: int
    prefix: Mapping[str, float]
    high_norm: float


def registers(
    maps: LayerMaps, features: Tensor | None = None, *, threshold: float | None = None, query: Query | None = None
) -> list[RegisterShares]:
    """Take how much of its attention each head gives to the class token, to registers, and to patches of high norm.

        features = model.forward_intermediates(images, indices=1, norm=False, intermediates_only=True)[-1]
        registers(rec, features)

    Args:
        maps: a recorder, or maps of one forward, first layer first: `rec.maps`, some of them, or one.
        features: (images, channels, rows, columns), patches after the last block and before the last norm, whose norms tell
            outliers; None to leave them out. What an attention module is called with is normalized, and its norm tells nothing.
        threshold: patches of a higher norm count as high; None as `find_high_norms` has it.
        query: whose attention, as in `AttentionMap.image`; None for the mean of all queries.

    Raises:
        TokenError: it is not known what the keys stand for, there is no such query, or keys lie on another grid than features.
        ValueError: features are none of images with rows and columns.
        StaleMapError, UnreadableError: as when a map is sliced.

    Source: Darcet et al. 2024, "Vision transformers need registers".
    """
    high = None if features is None else find_high_norms(features, threshold)
    return [row for depth, m in enumerate(layers_in(maps)) for row in _shares(m, depth, high, query)]


def find_high_norms(features: Tensor, threshold: float | None = None) -> Tensor:
    """Mark the patches whose features have a norm that is out of line.

    Args:
        features: (images, channels, rows, columns), see `registers`.
        threshold: what a norm must be above; None for the median of all patches of all images plus 10 x 1.4826 times the median
            absolute deviation from it, a rule of this package that marks none where norms are of one kind. The paper sets it by
            eye, where the histogram of a model has two peaks: 150 for DINOv2 ViT-g/14.

    Returns:
        (images, rows, columns), bool.

    Raises:
        ValueError: features have other axes.

    Source: Darcet et al. 2024, "Vision transformers need registers", section 2.1.
    """
    if features.ndim != 4:
        raise ValueError(
            f"features are (images, channels, rows, columns), not {tuple(features.shape)}: with timm, "
            "model.forward_intermediates(images, indices=1, norm=False, intermediates_only=True)[-1]."
        )
    norms: Tensor = torch.linalg.vector_norm(features.detach().float(), dim=1)
    if threshold is None:
        middle = norms.median()
        threshold = float(middle + _OUTLIER * (norms - middle).abs().median())
    return norms > threshold


def _shares(m: AttentionMap, depth: int, high: Tensor | None, query: Query | None) -> Iterator[RegisterShares]:
    _check_grid(m, high)
    prefix, picture = _received(m) if query is None else _given_by(m, query)
    outliers = picture[..., 0, 0] * nan if high is None else (picture * high[:, None].to(picture)).sum((2, 3))
    for head, (named, share) in enumerate(zip(prefix.mean(0).tolist(), outliers.mean(0).tolist())):
        yield RegisterShares(m.name, depth, head, dict(zip(m.tokens.prefix, named)), share)


def _received(m: AttentionMap) -> tuple[Tensor, Tensor]:
    """What prefix tokens, (images, heads, prefix), and patches, (images, heads, rows, columns), get on average."""
    # of all windows of an image together
    rows = rearrange(received(m), "(b w) head k -> b w head k", w=m.tokens.windows) / m.tokens.windows
    return rows[..., : m.tokens.num_prefix_tokens].sum(1), m.tokens.lay_out(rows)


def _given_by(m: AttentionMap, query: Query) -> tuple[Tensor, Tensor]:
    """What one query gives, as `_received`."""
    picture = m.image(query, heads=None)
    if not (count := m.tokens.num_prefix_tokens):
        return picture.new_zeros(*picture.shape[:2], 0), picture
    if query == "mean":
        raise TokenError('of query="mean" only patches have a picture: leave query= out for the mean of all queries.')
    return m.rows(query)[..., :count], picture


def _check_grid(m: AttentionMap, high: Tensor | None) -> None:
    """Raise the error that says that patches of high norm and keys are not the same."""
    grid = m.tokens.grid_size
    if high is not None and (tuple(high.shape[1:]) != grid or len(high) * m.tokens.windows != m.shape[0]):
        raise TokenError(
            f"the keys of {m.name!r} lie on {m.shape[0] // m.tokens.windows} grids of {grid}, and features on {len(high)} of "
            f"{tuple(high.shape[1:])}: give features of these images on this grid, or layers that have theirs."
        )
