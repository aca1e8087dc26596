"""Where tokens are said to lie against what changes when one place of the input does.

The evidence knows nothing of layouts and partitions: one place of a grid that goes into a module is changed, and those queries
and keys (of the recipe, or of the scores that replay sees) that are others than before are the ones made of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..attention.sources import QK
from ..errors import LayoutError, TokenError, UnfaithfulMapError
from ..image.tokens import Size, Tokens
from ..maps.attention_map import AttentionMap
from ..maps.reading import source_of
from ..recipes.places import find_block
from ..recipes.registry import attends_to_channels, find_layout
from ..recording.recorder import AttentionRecorder


def check_places(m: AttentionMap, moved: nn.Module, args: Any, kwargs: Any) -> None:
    """Compare where the tokens of a map are said to lie with what changes when one place of the input does."""
    attention = m.call.layer.module
    block = find_block(moved, m.name)
    if attends_to_channels(attention) or (find_layout(attention) is None and block is None):
        return
    try:
        queries, keys = m.query_tokens, m.tokens
    except LayoutError:
        raise
    except TokenError:  # nothing is said: the module alone has no image, or its tokens come in an unknown order
        return
    site, grid = _find_site([block or moved, moved], moved, args, kwargs, queries, keys)
    with AttentionRecorder(moved, layers=lambda _, module: module is attention) as rec, torch.no_grad():
        moved(*args, **kwargs)
        before = source_of(rec.maps[0].call)
        changed = []
        for place in product(range(grid.size[0]), range(grid.size[1])):
            with _changing(site, grid, place):
                moved(*args, **kwargs)
            changed.append(_what_changed(before, source_of(rec.maps[0].call), len(grid.tensor), queries.windows, m.name))
    for what, tokens, fields in zip(("query", "key"), (queries, keys), (torch.stack(each).cpu() for each in zip(*changed))):
        by_token = rearrange(fields, "(r c) w n -> w n r c", r=grid.size[0])[:, tokens.num_prefix_tokens :]
        _check_tokens(f"a {what} of {m.name!r}", tokens, by_token, type(site).__name__)


class _Grid(NamedTuple):
    """A grid among the arguments of a module.

    Attributes:
        number: of the tensor that holds it, among all tensors there.
        tensor: that tensor.
        first: its axis of rows, of (batch, rows, columns, channels) or (batch, channels, rows, columns); None for (batch,
            prefix tokens and patches, channels).
        size: (rows, columns).
        cell: how many rows and columns of the tensor make one of the grid.
    """

    number: int
    tensor: Tensor
    first: int | None
    size: Size
    cell: int = 1

    def change(self, tensor: Tensor, place: Size) -> Tensor:
        """The tensor with noise at one place of its last image."""
        tensor = tensor.clone()
        row, column = (n * self.cell for n in place)
        if self.first is None:
            part = tensor[-1, tensor.shape[1] - self.size[0] * self.size[1] + row * self.size[1] + column]
        else:
            part = tensor[-1].narrow(self.first - 1, row, self.cell).narrow(self.first, column, self.cell)
        part.add_(torch.randn(part.shape, generator=torch.Generator().manual_seed(1), device="cpu").to(part), alpha=3.0)
        return tensor


def _find_site(
    sites: list[nn.Module], moved: nn.Module, args: Any, kwargs: Any, queries: Tokens, keys: Tokens
) -> tuple[nn.Module, _Grid]:
    """The first of some modules that is called with the grid on which tokens are said to lie, and that grid.

    Raises:
        TokenError: there is none, or a tensor that holds it in two ways.
    """
    for site in sites:
        tensors = _tensors_into(site, moved, args, kwargs)
        if (grid := _find_grid(tensors, queries, keys)) is not None:
            return site, grid
    rows, columns = keys.grid_size
    shapes = ", ".join(str(tuple(t.shape)) for t in tensors)
    raise TokenError(
        f"keys are said to lie on a grid of {rows} x {columns}, and {type(site).__name__} was called with {shapes}, in which "
        "there is none, or more than one; call it with a grid whose rows, columns and channels differ, or check the layout."
    )


def _tensors_into(site: nn.Module, moved: nn.Module, args: Any, kwargs: Any) -> list[Tensor]:
    """The tensors that one of the modules is called with."""
    seen: list[Any] = []
    handle = site.register_forward_pre_hook(lambda _, a, kw: seen.extend(pytree.tree_leaves((a, kw))), with_kwargs=True)
    with handle, torch.no_grad():
        moved(*args, **kwargs)
    return [value for value in seen if isinstance(value, Tensor)]


def _find_grid(tensors: list[Tensor], queries: Tokens, keys: Tokens) -> _Grid | None:
    """The grid among some tensors that tokens are said to lie on; None if there is none, or several in one tensor."""
    rows, columns = size = max(queries.grid_size, keys.grid_size, key=lambda size: size[0] * size[1])
    prefix = {0, queries.num_prefix_tokens, keys.num_prefix_tokens}
    exact: list[_Grid] = []
    in_cells: list[_Grid] = []
    pooled: list[_Grid] = []
    for i, t in enumerate(tensors):
        if t.dim() == 3 and t.shape[1] - rows * columns in prefix:
            exact.append(_Grid(i, t, None, size))
        for axis in (1, 2) if t.dim() == 4 else ():
            cell = t.shape[axis] // rows
            if (cell * rows, cell * columns) == t.shape[axis : axis + 2]:
                (exact if cell == 1 else in_cells).append(_Grid(i, t, axis, size, cell))
            elif any(down == across for down, across in _strides(size, t.shape[axis : axis + 2])):
                pooled.append(_Grid(i, t, axis, (t.shape[axis], t.shape[axis + 1])))
    found = exact or in_cells or pooled
    return found[0] if [grid.number for grid in found[:2]].count(found[0].number if found else -1) == 1 else None


@contextmanager
def _changing(site: nn.Module, grid: _Grid, place: Size) -> Iterator[None]:
    """Call a module with another value at one place of its grid."""

    def change(_: nn.Module, args: Any, kwargs: Any) -> Any:
        leaves, spec = pytree.tree_flatten((args, kwargs))
        tensors = [i for i, value in enumerate(leaves) if isinstance(value, Tensor)]
        leaves[tensors[grid.number]] = grid.change(leaves[tensors[grid.number]], place)
        return pytree.tree_unflatten(leaves, spec)

    # before the hook of the recorder, where it is the attention itself
    with site.register_forward_pre_hook(change, prepend=True, with_kwargs=True):
        yield


def _what_changed(before: Any, after: Any, images: int, windows: int, name: str) -> tuple[Tensor, Tensor]:
    """(windows, queries) and (windows, keys) of the last image that are others than before.

    Raises:
        UnfaithfulMapError: those of another image are.
        TokenError: the scores tell neither.
    """
    if isinstance(before, QK) and isinstance(after, QK):
        both = [_differ(a, b).any(1).any(-1) for a, b in ((before.q, after.q), (before.k, after.k))]
    else:
        # of the first head: cascaded heads are made of what the head before gives out
        pairs = _differ(before.tensor[:, 0], after.tensor[:, 0])
        both = [pairs.all(2), pairs.all(1)]
        if bool(pairs.flatten(1).all(1).any()) and pairs.shape[1] > 1:
            raise TokenError(
                f"{name!r} shows its scores alone, and one place changes all of a window; its tokens cannot be told."
            )
    if any(bool(each[: len(each) - windows].any()) for each in both):
        raise UnfaithfulMapError(
            f"one image changes, and windows of another do: the map of {name!r} has the windows of {images} images in another "
            f"order than image by image, {windows} windows each."
        )
    return both[0][-windows:], both[1][-windows:]


def _differ(a: Tensor, b: Tensor) -> Tensor:
    """Where two results differ by more than the last bits."""
    return (a - b).abs() > 1e-9 * b.abs().max()


def _check_tokens(what: str, tokens: Tokens, fields: Tensor, where: str) -> None:
    """Compare the places that tokens are said to stand for with those that change them.

    Args:
        what: the tokens, in an error.
        tokens: what is said.
        fields: (windows, patches, rows, columns), True where a place of the input changes a token.
        where: the module that has the input, in an error.

    Raises:
        UnfaithfulMapError: they contradict each other.
        TokenError: one place changes so many tokens that nothing can be told.
    """
    if not fields.numel() or (not fields.any() and what.startswith("a query")):
        return  # named tokens, or queries that come from elsewhere, such as GCViT's global ones
    for side, cells, widest in zip(fields.shape[-2:], tokens.grid_size, _widest(fields)):
        if cells > 1 and widest == side and tokens.spread == 1:
            raise TokenError(
                f"{what} depends on all rows or columns that go into {where}, which proves nothing of its place; check the "
                "module inside that cuts the grid, or check it on a larger grid."
            )
    strides = _strides(tokens.grid_size, fields.shape[-2:])
    reasons = [_contradiction(tokens, fields, each) for each in strides] or ["lies on a grid that no pooling makes"]
    if all(reasons):
        raise UnfaithfulMapError(f"{what} {reasons[0]}; check its layout, or the partition of {where}.")


def _strides(coarse: Size, fine: Sequence[int]) -> Iterator[Size]:
    """By how much a grid may have been pooled, rounded up or down at its border."""
    down, across = (range(n // (m + 1) + 1, n + 1 if m == 1 else -(-n // (m - 1))) for m, n in zip(coarse, fine))
    return product(down, across)


def _contradiction(tokens: Tokens, fields: Tensor, strides: Size) -> str | None:
    """What is wrong with the places of tokens if their grid is coarser by these strides; None if nothing is."""
    rows, columns = tokens.grid_size
    row, column = (torch.arange(n, device="cpu") // stride for n, stride in zip(fields.shape[-2:], strides))
    cells = torch.where((row < rows)[:, None] & (column < columns), row[:, None] * columns + column, -1)
    said = rearrange(tokens.patches[-1], "w (n spread) -> w n spread 1 1", spread=tokens.spread)
    own = ((said == cells) & (said >= 0)).any(2)  # (windows, patches, rows, columns)
    padding = (said < 0).all(2)
    is_mixed = any(widest > stride for widest, stride in zip(_widest(fields), strides))
    # a cell that is not full at the border lies nowhere, and a convolution mixes padding with what is next to it
    if not is_mixed and (wrong := fields & padding & (cells >= 0)).any():
        return f"is said to be padding, and changes with the place {_first(wrong)}"
    if (wrong := own & ~(fields & own).flatten(2).any(-1)[..., None, None]).any():
        return f"is said to stand for the place {_first(wrong)}, and does not change with it"
    if (wrong := fields.flatten(0, 1).any(0) & ~own.flatten(0, 1).any(0) & (cells >= 0)).any():
        return f"changes with the place {_first(wrong)}, for which none is said to stand"
    if tokens.spread > 1 and (wrong := fields & ~own & ~padding).any():
        return f"changes with the place {_first(wrong)}, for which it is not said to stand"
    if tokens.spread == 1 and any(_is_elsewhere(fields, own, axis, stride) for axis, stride in zip((2, 3), strides)):
        return "changes with other places than those around the one for which it is said to stand"
    return None


def _is_elsewhere(fields: Tensor, own: Tensor, axis: int, stride: int) -> bool:
    """Whether tokens change with places at other distances from their own than the widest field is wide."""
    (begins, ends), (at, last) = _span(fields, axis), _span(own, axis)
    there = (ends >= 0) & (last >= 0)
    if not there.any():
        return False
    at = at // stride * stride
    reach = (ends - at)[there].amax() - (begins - at)[there].amin()
    return bool(reach > (ends - begins)[there].amax())


def _widest(fields: Tensor) -> list[int]:
    """Over how many rows and columns the widest of some fields reaches."""
    return [int((ends - begins).amax()) + 1 for begins, ends in (_span(fields, 2), _span(fields, 3))]


def _span(fields: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """(windows, patches): the first and the last row (axis 2) or column (axis 3) of each field; (all of them, -1) for none."""
    marks = fields.any(5 - axis)
    n = torch.arange(marks.shape[-1], device="cpu")
    return torch.where(marks, n, len(n)).amin(-1), torch.where(marks, n, -1).amax(-1)


def _first(marks: Tensor) -> Size:
    """The (row, column) of one that is marked."""
    row, column = marks.nonzero()[0, -2:].tolist()
    return row, column
