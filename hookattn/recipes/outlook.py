"""Outlook attention: a token predicts the weights of its neighbours, without keys (Yuan et al. 2021, arXiv 2106.13112)."""

from __future__ import annotations

from typing import Any

from einops import rearrange
from torch import Tensor

from ..functional import Scores, exact_dtype, exactly
from .registry import recipe


@recipe("timm.models.volo.OutlookAttention", form="b h w q k")
def outlook_attention(self: Any, x: Tensor) -> Scores:
    """Queries and keys are the kernel_size ** 2 places of the window around one token, and every token has its window."""
    if self.training:
        self.v(x)  # comes first in the forward, and draws its random numbers first
    x = rearrange(self.pool(rearrange(x, "b y x c -> b c y x")), "b c y x -> b y x c")
    scores = rearrange(self.attn(x), "b y x (h q k) -> (b y x) h q k", h=self.num_heads, q=self.kernel_size**2)
    with exactly(x.device):
        return Scores(scores.to(exact_dtype(scores.dtype)) * self.scale)
