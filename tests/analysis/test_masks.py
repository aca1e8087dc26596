"""The patches that hold a share of a picture are the fewest there are."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hookattn.analysis import keep_mass


@st.composite
def pictures(draw: st.DrawFn) -> Tensor:
    rows, columns = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    values = draw(st.lists(st.integers(0, 50), min_size=rows * columns, max_size=rows * columns))
    return torch.tensor(values, dtype=torch.float64).view(rows, columns)


@given(pictures(), st.sampled_from([0.05, 0.3, 0.6, 0.9, 1.0]))
def test_they_hold_the_share_and_one_fewer_would_not(picture: Tensor, share: float) -> None:
    kept = keep_mass(picture, share)
    held, total = picture[kept].sum(), picture.sum()
    assert held >= share * total * (1 - 1e-5)
    if kept.any():
        assert picture[kept].min() >= picture[~kept].max() if (~kept).any() else True
        assert held - picture[kept].min() < share * total
    else:
        assert total == 0


def test_each_picture_on_its_own() -> None:
    both = torch.stack((torch.eye(3), torch.ones(3, 3)))
    assert keep_mass(both, 0.6).sum((1, 2)).tolist() == [2, 6]
    assert keep_mass(torch.ones(2, 2), 0.5).tolist() == [[True, True], [False, False]]
    assert not keep_mass(torch.full((2, 2), torch.nan)).any()
    half = torch.rand(4, 8, 8).half()
    assert keep_mass(half).shape == half.shape


@pytest.mark.parametrize("share", [0, -0.1, 1.1, float("nan")])
def test_what_is_no_share_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match="no share"):
        keep_mass(torch.ones(2, 2), share)
