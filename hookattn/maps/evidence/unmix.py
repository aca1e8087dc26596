"""A softmax that is mixed over its heads before it multiplies: talking heads."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .probe import pull
from .product import Product, matrices
from .seen import SOFTMAX
from .tape import Tape


def softmax_before_mixing(tape: Tape, products: Sequence[Product], index: Tensor) -> tuple[int, tuple[int, ...]] | None:
    """If the map is a mixture of heads of a softmax: its step, and its axes as (windows, heads, queries, keys)."""
    made = [n for n, s in enumerate(tape.steps) if s.func in SOFTMAX and n < products[0].at]
    if len(products) > 1 or not made or index.shape[1] == 1:
        return None
    run = tape.rerun(cut=made[-1:], catch={products[0].at})
    rows = matrices(run, products[0])[0].flatten(0, 1)
    m, leaf = rows[index.to(rows.device)], run.leaves[made[-1]]
    if not m.requires_grad or m.numel() != leaf.numel():
        return None
    origin = _touched(m, leaf, (0, 0, 0, 0))
    moved = {}
    for axis in (0, 2, 3):  # which axes of the softmax move along with one of the map
        at = tuple(int(a == axis and m.shape[a] > 1) for a in range(4))
        other = _touched(m, leaf, at)
        if len(origin) < 2 or other.shape != origin.shape:
            return None
        moved[axis] = [a for a in range(leaf.dim()) if set(other[:, a].tolist()) != set(origin[:, a].tolist())]
        if len(moved[axis]) != sum(at):
            return None
    heads = [a for a in range(leaf.dim()) if [a] not in moved.values() and leaf.shape[a] > 1]
    if len(heads) != 1 or leaf.shape[heads[0]] != m.shape[1]:
        return None
    order = (*moved[0], *heads, *moved[2], *moved[3])
    return made[-1], (*order, *(a for a in range(leaf.dim()) if a not in order))


def _touched(m: Tensor, leaf: Tensor, at: tuple[int, ...]) -> Tensor:
    """Entries of the softmax that one of the map depends on."""
    return pull(m[at][None], [leaf], torch.ones(1, 1, dtype=m.dtype, device=m.device))[0][0].nonzero()
