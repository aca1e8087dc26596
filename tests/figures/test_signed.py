"""What is drawn of contributions: rows that do not sum to 1, and values below zero."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.colors import CenteredNorm
from support.models import tiny

from hookattn import AttentionMap, AttentionRecorder
from hookattn.analysis import contributions
from hookattn.figures import plot


def recorded() -> AttentionMap:
    model, x = tiny("vit_registers", batch=1)
    with AttentionRecorder(model) as rec, torch.no_grad():
        model(x)
    return rec.maps[-1]


def drawn(m: AttentionMap, **options: Any) -> Any:
    return plot.attention(m, **options)


@pytest.mark.parametrize("heads", [None, "sum"])
def test_rows_that_do_not_sum_to_1_are_drawn_as_their_shares(heads: Any) -> None:
    m = recorded()
    one, other = (drawn(contributions(m, heads=heads, shares=shares), head=0) for shares in (False, True))
    np.testing.assert_allclose(one.get_array(), other.get_array(), rtol=1e-5)
    np.testing.assert_allclose(one.norm.vmax, other.norm.vmax, rtol=1e-5)
    assert one.get_array().sum() < m.shape[-1]  # in times of what each key would get, and registers get something


def test_what_is_below_zero_is_drawn_as_far_below_as_above() -> None:
    m = recorded()
    c = contributions(m, "projection")
    image = drawn(c, head=1)
    row = c.rows("cls")[0, 1].double()
    assert (row[5:] < 0).any()
    expected = row[5:].view(*m.tokens.grid_size) / (row.abs().sum() / len(row))
    np.testing.assert_allclose(image.get_array(), expected, rtol=1e-5)
    assert isinstance(image.norm, CenteredNorm)
    assert image.norm.vmin == -image.norm.vmax
    assert image.get_cmap().name == "RdBu_r"
    assert drawn(c, head=1, cmap="coolwarm").get_cmap().name == "coolwarm"
    assert drawn(m, head=1).get_cmap().name != "RdBu_r"


def test_a_sheet_of_them_says_shares_and_entropy_of_sizes() -> None:
    figure = plot.overview([contributions(m, "projection") for m in [recorded()]])
    words = " ".join(text.get_text() for text in [*figure.texts, *(text for ax in figure.axes for text in ax.texts)])
    assert "nan" not in words
    assert "as far below 0" in " ".join(words.split())
    pictures = [image for ax in figure.axes for image in ax.images if isinstance(image.norm, CenteredNorm)]
    assert len(pictures) == 4  # each head and their mean, also where none of it is below zero
