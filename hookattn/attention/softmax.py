"""The softmax of scores: in their place, or beside them for figures that are taken of both."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

_FAR = 1e4  # below the highest score of a row, where any dtype has 0 for its share; the slope by a closed key's would overflow


class Chunk(NamedTuple):
    """Rows of a map, with the scores they are the softmax of where these are there.

    Attributes:
        values: (items, heads, rows, keys).
        scores: the same, up to a constant in each row; what is closed is low and finite. None where rows are made otherwise.
    """

    values: Tensor
    scores: Tensor | None = None

    @staticmethod
    def of(scores: Tensor, closed: Tensor | None) -> Chunk:
        """The softmax beside its scores, see `softmax`."""
        return Chunk(_beside(scores, closed), scores if closed is None else scores.clamp_min_(torch.finfo(scores.dtype).min))

    def entropies(self) -> Tensor:
        """Entropy of each row in nats, (items, heads, rows), with 0 log 0 = 0, and 0 for a row that is closed throughout."""
        if (scores := self.scores) is None:
            # the smallest normal number, whose logarithm times 0 is 0, also in the gradient, where log 0 would make NaN of it
            logarithms = self.values.clamp_min(torch.finfo(self.values.dtype).tiny).log_()
            return logarithms.mul_(self.values).sum(-1).neg_()
        # log A_k = log A_max - (s_max - s_k): one logarithm a row, where those of all entries cost as much as the softmax.
        # Both terms are positive, so that nothing cancels.
        below, most = scores.amax(-1, keepdim=True) - scores, self.values.amax(-1)
        if not is_ours_alone(scores):
            below = below.clamp_max(_FAR)
        return below.mul_(self.values).sum(-1).sub_(most.where(most != 0, 1.0).log_())


def softmax(scores: Tensor, closed: Tensor | None) -> Tensor:
    """The softmax over the last axis, in place of the scores where nobody follows them.

    Args:
        scores: new, so that nobody else sees them.
        closed: (..., 1), rows that a mask closes throughout, which become zero; None where there can be none.
    """
    if not is_ours_alone(scores):
        return _beside(scores, closed)
    # in place, since one tensor of queries x keys is what there is memory for
    return _close(torch.softmax(scores, -1, out=scores), closed)


def is_ours_alone(*scores: Tensor) -> bool:
    """Whether scores may be added up and written to in place: neither autograd nor `torch.func` follows what is done."""
    # Undocumented, torch 2.6 to 2.15: the level of the innermost transform of torch.func that runs, None without one; and that
    # of forward-mode differentiation, -1 without. Neither can follow what is written in place with `out=`.
    if torch._C._functorch.maybe_current_level() is not None or forward_ad._current_level >= 0:
        return False
    return not (torch.is_grad_enabled() and any(t.requires_grad for t in scores))


def _beside(scores: Tensor, closed: Tensor | None) -> Tensor:
    """The softmax in memory of its own."""
    if closed is not None and not is_ours_alone(scores):
        scores = scores.masked_fill(closed, 0.0)  # else the slope by a row of -inf is NaN, although it becomes zero
    return _close(scores.softmax(-1), closed)


def _close(attention: Tensor, closed: Tensor | None) -> Tensor:
    if closed is None:
        return attention
    return (attention.masked_fill_ if is_ours_alone(attention) else attention.masked_fill)(closed, 0.0)
