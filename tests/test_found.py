"""Ways to be silently wrong that users find: each once gave another map than the module's, without a word."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from support.models import randomise
from support.reading import attention_after
from torch import Tensor, nn

from hookattn import UnreadableError


def test_a_window_is_not_drawn_as_the_whole_image() -> None:
    model = timm.create_model("maxvit_rmlp_pico_rw_256", img_size=64).eval()
    m = attention_after(model, torch.randn(2, 3, 64, 64))
    assert m.shape == (128, 1, 4, 4)
    picture = m.image((3, 4))
    assert picture.shape == (2, 16, 16)
    window = torch.zeros(16, 16, dtype=torch.bool)
    window[2:4, 4:6] = True  # the 2 x 2 window that holds the patch
    assert bool((picture[:, window] > 0).all())
    assert bool((picture[:, ~window] == 0).all())


class Folded(nn.Module):
    """Heads folded into the batch, and no attribute that tells how many there are."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, 4, 4).permute(2, 0, 3, 1, 4).reshape(3, b * 4, n, 4)
        return ((q @ k.transpose(1, 2)).softmax(-1) @ v).reshape(b, 4, n, 4).transpose(1, 2).reshape(b, n, c)


class KeysThird(nn.Module):
    """Scores on the axes (batch, query, head, key)."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 4
        self.qkv = nn.Linear(16, 48)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).reshape(*x.shape[:2], 3, 4, 4).unbind(2)
        scores = torch.einsum("bqhd,bkhd->bqhk", q, k)
        return torch.einsum("bqhk,bkhd->bqhd", F.softmax(scores, dim=-1), v).flatten(2)


@pytest.mark.parametrize("kind", [Folded, KeysThird])
def test_scores_on_other_axes_are_refused(kind: Any) -> None:
    m = attention_after(randomise(nn.Sequential(kind())), torch.randn(2, 5, 16), layers="0")
    with pytest.raises(UnreadableError, match=r"which are not \(batch, head, ...\)"):
        m[...]
