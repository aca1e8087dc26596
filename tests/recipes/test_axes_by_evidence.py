"""`check_recipe` proves what the axes of a map are, where replay knows their sizes alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.inside import Scores, registry
from torch import Tensor, nn

from hookattn import QK, UnfaithfulMapError, project, recipe
from hookattn.testing import check_recipe


class HeadsThird(nn.Module):
    """Forms its map as (batch, queries, heads, keys); on 4 tokens and 4 heads nothing of it looks odd."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.qkv = 4, nn.Linear(32, 96)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 8)).unbind(2)
        attention = (torch.einsum("bqhd,bkhd->bqhk", q, k) * 8**-0.5).softmax(-1)
        return torch.einsum("bqhk,bkhd->bqhd", attention, v).flatten(2)


@pytest.fixture(autouse=True)
def _registered_for_this_test_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry._RECIPES, "_facts", registry.list_recipes())
    monkeypatch.setattr(registry._AXES, "_facts", registry._AXES.as_dict())


def test_a_recipe_whose_queries_stand_where_heads_should_is_told() -> None:
    class Mine(HeadsThird):
        pass

    @recipe(Mine)
    def as_it_is_formed(self: Any, x: Tensor) -> Any:
        q, k = project(self.qkv, x, "b n (parts h d) -> parts b h n d", parts=2, of=3, h=4)
        scores = (q * 8**-0.5) @ k.mT
        return Scores(scores.transpose(1, 2))  # as replay has them

    with pytest.raises(UnfaithfulMapError, match="what multiplies the values"):
        check_recipe(Mine(), torch.randn(2, 4, 32))


@pytest.mark.parametrize("tokens", [4, 7])
def test_a_recipe_that_says_where_they_stand_passes(tokens: int) -> None:
    class Mine(HeadsThird):
        pass

    @recipe(Mine, axes="b q h k")
    def my_attention(self: Any, x: Tensor) -> QK:
        q, k = project(self.qkv, x, "b n (parts h d) -> parts b h n d", parts=2, of=3, h=4)
        return QK(q, k)

    check_recipe(Mine(), torch.randn(2, tokens, 32))
