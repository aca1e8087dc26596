"""Derivatives: which place of the output a row of a product feeds, and which entries of the arguments a tensor depends on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .product import Product, matrices
from .tape import Run, Slot, Tape

NOTHING, SEVERAL = -2, -1


@dataclass(frozen=True, eq=False)
class Places:
    """What the rows of M feed.

    Args:
        index: (G, I, 1 + axes of the output): which output, and the index along each of its axes; NOTHING or SEVERAL.
        slope: (G, I, E), a gradient at the result.
        sizes: of the output along each of its axes.
        ends: (2, G, I, 1 + axes of the output), the first and the last index that a row feeds; SEVERAL where its entries feed
            several each.
    """

    index: Tensor
    slope: Tensor
    sizes: tuple[int, ...]
    ends: Tensor

    @property
    def fed(self) -> Tensor:
        return self.index[..., 0] != NOTHING


def pull(y: Tensor, of: Sequence[Tensor], cotangents: Tensor) -> list[Tensor]:
    """Gradients of what `y` is a function of for each of a stack of cotangents; zeros where it is no function."""
    if not y.requires_grad or not of or not len(cotangents):
        return [x.new_zeros(len(cotangents), *x.shape) for x in of]
    grads = [torch.autograd.grad(y, of, c, retain_graph=True, allow_unused=True) for c in cotangents]
    return [torch.stack([torch.zeros_like(x) if g is None else g for g in each]) for x, each in zip(of, zip(*grads))]


def weights_like(y: Tensor) -> Tensor:
    """Positive weights, all different, so that no two effects cancel."""
    return (torch.rand(y.shape, generator=torch.Generator().manual_seed(1), device="cpu") + 0.5).to(y)


def places(tape: Tape, products: Sequence[Product]) -> dict[Product, Places]:
    """Which place of the output each row feeds, for the products that feed one through no other of them."""
    run = tape.rerun(cut={p.step for p in products}, catch={p.at for p in products})
    found: dict[int, Places] = {}
    for k, y in enumerate(run.values.get(s, tape.of(s)) for s in tape.outputs):
        slopes = dict(zip(run.leaves, (g[0] for g in pull(y, list(run.leaves.values()), weights_like(y)[None]))))
        fed = [n for n, g in slopes.items() if g.any() and (n not in found or len(found[n].sizes) == y.dim())]
        for n, index in zip(fed, _indices(y, [run.leaves[n] for n in fed])):
            index = torch.cat([torch.where(index[..., :1] == NOTHING, NOTHING, k), index], -1)
            old = found.get(n, Places(index, torch.zeros_like(slopes[n]), tuple(y.shape), index))
            both = torch.where(old.index[..., :1] == NOTHING, index, old.index)  # the first output that a row feeds
            found[n] = Places(both, old.slope + slopes[n], tuple(map(max, y.shape, old.sizes)), both)
    return {p: _of_rows(run, p, found[p.step]) for p in products if p.step in found}


def _indices(y: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    """For each entry of each leaf, the index along each axis of the output that it feeds: one bit of it after the other."""
    weights, codes = weights_like(y), [torch.zeros(*x.shape, y.dim(), dtype=torch.long, device=x.device) for x in leaves]
    all_fed = [g[0] != 0 for g in pull(y, leaves, weights[None])]
    for axis, size in enumerate(y.shape):
        index = torch.arange(size, device=y.device).view([-1 if a == axis else 1 for a in range(y.dim())])
        several = [torch.zeros_like(x, dtype=torch.bool) for x in leaves]
        for bit in range((size - 1).bit_length()):
            if all(both.sum() == fed.sum() for both, fed in zip(several, all_fed)):
                break  # such as channels after a projection
            is_set = index >> bit & 1
            halves = pull(y, leaves, torch.stack([weights * (1 - is_set), weights * is_set]))
            for code, both, (zero, one) in zip(codes, several, (g != 0 for g in halves)):
                code[..., axis] += one.long() << bit
                both |= zero & one
        for code, both in zip(codes, several):
            code[..., axis][both] = SEVERAL
    for code, fed in zip(codes, all_fed):
        code[~fed] = NOTHING
    return codes


def _of_rows(run: Run, product: Product, feeds: Places) -> Places:
    """What rows feed, from what their entries feed."""
    m, w = matrices(run, product)
    each = torch.stack([product.result(x, m, w) for x in feeds.index.unbind(-1)], -1)  # (G, I, E, 1 + axes)
    fed = each[..., :1] != NOTHING
    least, most = torch.where(fed, each, 1 << 40).amin(2), torch.where(fed, each, NOTHING).amax(2)
    of_rows = torch.where(least == most, most, SEVERAL)
    of_rows[~fed.any(2).expand_as(of_rows)] = NOTHING
    ends = torch.where(least == SEVERAL, SEVERAL, torch.stack([least, most]))
    return Places(of_rows, product.result(feeds.slope, m, w), feeds.sizes, ends)


class Sources:
    """What factors of products depend on among the arguments, past other products: whole tokens, not what attention mixed."""

    def __init__(self, tape: Tape, products: Sequence[Product]) -> None:
        self.products = products
        self.inputs = [tape.of(s).detach().clone().requires_grad_() for s in tape.inputs]
        given = {s: x.clone() for s, x in zip(tape.inputs, self.inputs)}
        self.run = tape.rerun(given, hold={p.step for p in products}, catch={p.at for p in products})

    def of(self, rows: Tensor) -> list[Tensor]:
        """For each row (rows, width): which entries of each argument it depends on, as (rows, entries)."""
        rows = rows * weights_like(rows)
        each = torch.eye(len(rows), dtype=rows.dtype, device=rows.device)[..., None].expand(-1, -1, rows.shape[1])
        return [g != 0 for g in pull(rows, self.inputs, each)]

    def carried(self, rows: Tensor) -> list[Tensor | None]:
        """For each argument that rows (rows, width) depend on: where the entries stand that each row alone depends on.

        That is the place along the axes that tell tokens apart, counted on. One gradient counts each row once, another as often
        as its number: where one row alone depends on an entry, the number is their ratio. None for an argument of which most
        entries have an effect on several rows.
        """
        weights, found = weights_like(rows), list[Tensor | None]()
        numbers = torch.arange(len(rows), device=rows.device, dtype=rows.dtype)
        for total, weighted in pull(rows, self.inputs, torch.stack([weights, weights * numbers[:, None]])):
            # small ones are sums that nearly cancel, and their ratio is off
            at = (total.abs() > 0.01 * total.abs().max()).nonzero()
            number = weighted[tuple(at.T)] / total[tuple(at.T)]
            alone = (number - number.round()).abs() < 0.01 + 1e-5 * number
            if alone.sum() > 0.9 * len(at):
                found.append(_stand(at[alone], number[alone].round().long(), len(rows), total.shape))
            elif len(at):
                found.append(None)
        return found


def _stand(at: Tensor, row: Tensor, rows: int, shape: Sequence[int]) -> Tensor:
    """Where the entries of each row begin, those of (entries, axes) `at`, along the axes that tell rows apart."""
    count = torch.zeros(rows, device=at.device).index_add(0, row, torch.ones(len(row), device=at.device))
    place = torch.zeros(rows, dtype=torch.long, device=at.device)
    for axis, size in enumerate(shape):
        index = at[:, axis].to(count.dtype)
        mean = torch.zeros_like(count).index_add(0, row, index) / count.clamp(min=1)
        within, over_all = (index - mean[row]).abs().mean(), (index - index.mean()).abs().mean()
        if within < 0.75 * over_all:  # along others, such as channels, those of one row lie as far apart as all do
            begin = torch.full_like(place, size).scatter_reduce(0, row, at[:, axis], "amin")
            place = place * (size + 1) + begin
    return place[count > 0]


def reach(tape: Tape, output: int, axis: int) -> str:
    """Whether an output at different indices of an axis depends on equal, overlapping or separate entries of the arguments."""
    inputs: dict[Slot, Tensor] = {s: tape.of(s).detach().clone().requires_grad_() for s in tape.inputs}
    y = tape.rerun({s: x.clone() for s, x in inputs.items()}).values[tape.outputs[output]]
    at = torch.tensor(sorted({0, 1, y.shape[axis] // 2, y.shape[axis] - 1}), device=y.device)
    index = torch.arange(y.shape[axis], device=y.device).view([-1 if a == axis else 1 for a in range(y.dim())])
    parts = weights_like(y) * (index == at.view(-1, *[1] * y.dim()))
    each = [(g != 0).reshape(len(at), -1) for g in pull(y, list(inputs.values()), parts)]
    # an argument that all share, such as angles of positions, tells nothing of what each has for itself
    own = [mask for mask in each if (mask != mask[0]).any()]
    if not own:
        return "equal"
    masks = torch.cat(own, 1)
    return "overlapping" if (masks[1:] & masks[:-1]).any() else "separate"
