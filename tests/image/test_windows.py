"""Tokens of grids that are cut and pooled, against what PyTorch's own functions do to a grid of numbers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import hookattn.image
from hookattn import TokenError
from hookattn.image import Tokens, cut_padded_windows, cut_windows, pool_windows, slide_windows, whole_grid

SIDES = st.tuples(st.integers(1, 9), st.integers(1, 9))
WINDOWS = st.tuples(st.integers(1, 5), st.integers(1, 5))
SHIFTS = st.tuples(st.integers(-2, 4), st.integers(-2, 4))


def numbered(size: tuple[int, int]) -> Tensor:
    """(rows, columns): 1, 2, 3, ..., so that 0 is padding."""
    return torch.arange(1.0, size[0] * size[1] + 1).reshape(size)


def by_loops(grid: Tensor, window: tuple[int, int]) -> list[list[int]]:
    """The places of each window, window after window, -1 for padding."""
    (rows, columns), (height, width) = grid.shape, window
    windows = [grid[y : y + height, x : x + width] for y in range(0, rows, height) for x in range(0, columns, width)]
    return [[int(n) - 1 for n in each.flatten()] for each in windows]


def padded(grid: Tensor, window: tuple[int, int]) -> Tensor:
    return F.pad(grid, (0, -grid.shape[1] % window[1], 0, -grid.shape[0] % window[0]))


@given(SIDES, WINDOWS, SHIFTS)
@settings(max_examples=60, deadline=None)
def test_windows_are_those_of_a_grid_that_is_rolled_and_padded(
    size: tuple[int, int], window: tuple[int, int], shift: tuple[int, int]
) -> None:
    back = -shift[0], -shift[1]
    rolled_first, padded_first = cut_windows(size, window, shift), cut_padded_windows(size, window, shift)
    assert rolled_first.patches[0].tolist() == by_loops(padded(numbered(size).roll(back, (0, 1)), window), window)
    assert padded_first.patches[0].tolist() == by_loops(padded(numbered(size), window).roll(back, (0, 1)), window)
    assert rolled_first.grid_size == padded_first.grid_size == size


@given(SIDES, WINDOWS, st.booleans())
@settings(max_examples=60, deadline=None)
def test_every_patch_is_in_one_window(size: tuple[int, int], window: tuple[int, int], strided: bool) -> None:
    tokens = cut_windows(size, window, strided=strided)
    assert sorted(n for n in tokens.patches.flatten().tolist() if n >= 0) == list(range(size[0] * size[1]))
    assert len(tokens) == window[0] * window[1]


def test_a_strided_window_reaches_over_the_whole_grid() -> None:
    assert cut_windows((4, 6), (2, 3), strided=True).patches[0, 0].tolist() == [0, 2, 4, 12, 14, 16]
    assert cut_windows((4, 6), (2, 3)).patches[0, 0].tolist() == [0, 1, 2, 6, 7, 8]


@pytest.mark.parametrize(("window", "step", "border"), [(3, 1, 1), (6, 4, 1), (2, 2, 0), (3, 2, 1)])
def test_windows_that_overlap_are_those_of_unfold(window: int, step: int, border: int) -> None:
    expected = F.unfold(numbered((8, 12))[None, None], window, stride=step, padding=border)[0].T.long() - 1
    assert torch.equal(slide_windows((8, 12), window, step, border).patches[0], expected)


@pytest.mark.parametrize("shift", [0, 1])
def test_pooled_tokens_stand_for_the_cell_they_are_made_of(shift: int) -> None:
    tokens = pool_windows(cut_windows((8, 12), 4, 2 * shift), (4, 4), (2, 2))
    assert tokens.grid_size == (4, 6)
    first = numbered((8, 12)).roll((-2 * shift,) * 2, (0, 1))[::4, ::4].flatten().long() - 1
    assert tokens.patches[0, :, 0].tolist() == [(n // 12) // 2 * 6 + n % 12 // 2 for n in first.tolist()]


def test_one_number_is_a_window_and_a_shift_of_both_sides() -> None:
    assert torch.equal(cut_windows((7, 9), 3, 1).patches, cut_windows((7, 9), (3, 3), (1, 1)).patches)
    assert torch.equal(cut_padded_windows((7, 9), 3, 1).patches, cut_padded_windows((7, 9), (3, 3), (1, 1)).patches)


def test_a_whole_grid_is_one_window_of_all_its_patches() -> None:
    tokens = whole_grid((2, 3), ("cls",))
    assert (len(tokens), tokens.windows, tokens.index((1, 2))) == (7, 1, 6)


@pytest.mark.parametrize("cut", [cut_windows, cut_padded_windows])
def test_a_window_without_rows_is_answered(cut: object) -> None:
    with pytest.raises(TokenError, match=r"a window of 0 x 4 cuts nothing: give \(rows, columns\), or use whole_grid"):
        cut_windows((7, 9), (0, 4))  # type: ignore[operator]


def test_what_a_layout_is_made_of_is_public() -> None:
    assert set(hookattn.image.__all__) <= set(vars(hookattn.image))
    for name in hookattn.image.__all__:
        assert vars(hookattn.image)[name].__doc__
    assert hookattn.image.Tokens is Tokens
