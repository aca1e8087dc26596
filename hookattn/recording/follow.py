"""Gradients that are followed through backward, also where a checkpoint runs a module again."""

from __future__ import annotations

from collections.abc import Iterable

from ..calls.call import Call
from ..conditions.checkpoints import checkpoint_around, fingerprint
from ..maps.gradient import Gradient


def match_recomputed(forwards: Iterable[Iterable[Gradient]], call: Call) -> Gradient | None:
    """Find the gradient that belongs to a call which a checkpoint makes again in backward; None if there is none.

    Only reentrant checkpoints have one: they alone run the forward without a graph, see `Gradient.follow`.
    """
    if (around := checkpoint_around()) is None:
        return None
    # by forwards, the last one first: a checkpoint of an earlier one may have had the same number
    again = fingerprint(call.tensors, around)
    waiting = next((found for each in forwards if (found := [g for g in each if g.matches(again)])), [])
    if len(waiting) == 1:
        return waiting[0]
    for gradient in waiting:
        gradient.refuse(_AMBIGUOUS)
    return None


_AMBIGUOUS = (
    "it was called with the same input more than once in one reentrant checkpoint, and which call backward has come to cannot "
    "be told. Checkpoint with use_reentrant=False."
)
