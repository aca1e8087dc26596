"""Which patches hold most of what a query gives away."""

from __future__ import annotations

import torch
from torch import Tensor


def keep_mass(pictures: Tensor, share: float = 0.6) -> Tensor:
    """Mark the patches that hold a share of a picture's attention: the fewest there are, the highest first.

    Args:
        pictures: (..., rows, columns), not negative, such as `m.image("cls", heads=None)`.
        share: of the sum of each picture, above 0 and up to 1.

    Returns:
        (..., rows, columns), bool. Of patches that are equally high those further up and left come first; a picture of
        zeros has none, one with NaN in it neither.

    Raises:
        ValueError: the share is not in that range.

    Source: the threshold of `visualize_attention.py` in the code of Caron et al. 2021, "Emerging properties in self-supervised
    vision transformers" (DINO), which keeps 60 % there.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share={share} is no share: choose it above 0 and up to 1.")
    flat = pictures.flatten(-2)
    highest, order = flat.sort(dim=-1, descending=True, stable=True)
    wide = torch.float64 if highest.dtype == torch.float64 else torch.float32
    before = highest.cumsum(-1, dtype=wide) - highest
    total = flat.sum(-1, keepdim=True, dtype=wide)
    # rounded sums may miss the whole by a little, which is then not worth a patch
    kept = (before < share * total * (1 - 1e-6)) & (highest > 0)
    return torch.zeros_like(kept).scatter_(-1, order, kept).view(pictures.shape)
