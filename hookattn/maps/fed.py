"""Which places of an output the queries of a map feed."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import UnreadableError
from .carried import NOTHING, SEVERAL, trace_bits
from .forward import Forward, floats_in


def random_outcomes(forward: Forward, seed: int = 8) -> Tensor:
    """Others in place of what the products put out."""
    outcomes = forward.outcomes()
    return torch.randn(outcomes.shape, generator=torch.Generator().manual_seed(seed), device="cpu").to(outcomes)


def places_fed(forward: Forward, leaf: int) -> Tensor | None:
    """(images * windows * queries, dim): where in an output stands what a query feeds, by what moves when it brings something.

    Returns:
        -1 for nowhere; None where all stands in order.

    Raises:
        UnreadableError: its output is not one of the places that queries feed each.
    """
    windows, heads, queries = forward.carried.rows.index.shape
    label = torch.arange(windows * queries, device="cpu").view(windows, 1, queries).expand(windows, heads, queries)

    def trace(seed: int) -> Tensor:
        other = random_outcomes(forward, seed)

        def run(mask: Tensor) -> Tensor:
            brought = torch.where(mask[..., None].to(other.device), other, 0)
            return floats_in(forward.run_with(brought)[0])[leaf].detach()

        return trace_bits(label, run).flatten().cpu()

    found = trace(8)
    for seed in range(9, 12):
        count = torch.bincount(found[found >= 0], minlength=windows * queries)
        if len({*count.tolist(), 0}) <= 2:
            break
        found = found.where(found != NOTHING, trace(seed))  # rounding of what is added beside may have hidden some
    if (found == SEVERAL).any():
        raise UnreadableError("its forward mixes places after the attention: what a query adds to the output is not one place.")
    count = torch.bincount(found[found != NOTHING], minlength=windows * queries)
    if len({*count.tolist(), 0}) > 2:
        raise UnreadableError("its queries feed places of its output of different sizes.")
    places = torch.full((windows * queries, int(count.max())), -1, device="cpu")
    places[count > 0] = found.argsort(stable=True)[int((found == NOTHING).sum()) :].view(-1, int(count.max()))
    return None if torch.equal(places.flatten(), torch.arange(found.numel(), device="cpu")) else places


def at_places(y: Tensor, places: Tensor | None, outcomes: Tensor) -> Tensor:
    """(images * windows, queries, dim) out of an output."""
    windows, _, queries, _ = outcomes.shape
    if places is None:
        return y.reshape(windows, queries, -1)
    flat = torch.cat([y.flatten(), y.new_zeros(1)])  # nothing for queries that feed nothing
    return flat[places.to(y.device)].view(windows, queries, -1)
