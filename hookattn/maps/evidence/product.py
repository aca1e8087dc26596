"""Two activations that are multiplied and summed, as matrices: what may be a map and its values."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .seen import SOFTMAX
from .tape import Run, Slot, Step, Tape, aten

_FIRST = {  # operations that multiply matrices: where the first of the two factors stands
    aten.bmm: 0, aten.mm: 0, aten.mv: 0, aten.dot: 0, aten.baddbmm: 1, aten.addmm: 1, aten.addmv: 1,
}  # fmt: skip


AS_IT_IS = {  # operations that lay the same values out in another way, or a part of them
    aten.unsqueeze, aten.squeeze, aten.permute, aten.transpose, aten.t, aten.view, aten._unsafe_view, aten.reshape, aten.clone,
    aten._to_copy, aten.detach, aten.expand, aten.alias, aten.select, aten.slice, aten.split, aten.split_with_sizes,
    aten.unbind, aten.chunk, aten.cat, aten.stack, aten.repeat, aten.copy_,
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Product:
    """M (G, I, J) @ W (G, J, E) = O (G, I, E).

    Args:
        step: of the tape, the result of which is O.
        at: the step that has the two factors as arguments; another one where a broadcast product is summed afterwards.
        first: where the first of the factors stands among its arguments.
        axes: of a broadcast product: those of G, I, E and J.
        flipped: whether the second factor is taken for M.
    """

    step: int
    at: int
    first: int
    axes: tuple[Sequence[int], ...] | None = None
    shape: tuple[int, ...] = ()
    flipped: bool = False

    def map_in(self, steps: Sequence[Step]) -> Slot:
        """Where the factor that is taken for M stands."""
        slot: Slot = steps[self.at].args[self.first + self.flipped]
        return slot

    def factors(self, args: Sequence[Any]) -> tuple[Tensor, Tensor]:
        """M and W of the arguments of the step that multiplies."""
        x, y = args[self.first : self.first + 2]
        m, w = (_matrix(x), _matrix(y.unsqueeze(-1) if y.dim() == 1 else y)) if self.axes is None else self._broadcast(x, y)
        return (w.mT, m.mT) if self.flipped else (m, w)

    def _broadcast(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        assert self.axes is not None
        g, i, e, j = self.axes
        sizes = [math.prod(self.shape[a] for a in axes) for axes in self.axes]
        x = x.expand(self.shape)[_one_of(e, len(self.shape))].permute(*g, *i, *j, *e)
        y = y.expand(self.shape)[_one_of(i, len(self.shape))].permute(*g, *j, *e, *i)
        return x.reshape(sizes[0], sizes[1], sizes[3]), y.reshape(sizes[0], sizes[3], sizes[2])

    def result(self, o: Tensor, like: Tensor, values: Tensor) -> Tensor:
        """(G, I, E) of something that has the shape of the result, given M and W."""
        if self.axes is not None:
            g, i, e = self.axes[:3]
            rest = sorted([*g, *i, *e])
            o = o.reshape([self.shape[a] for a in rest]).permute([rest.index(a) for a in (*g, *i, *e)])
        if self.flipped:
            return o.reshape(len(like), values.shape[2], like.shape[1]).mT
        return o.reshape(len(like), like.shape[1], values.shape[2])


def _matrix(x: Tensor) -> Tensor:
    x = x.unsqueeze(0) if x.dim() == 1 else x
    return x.unsqueeze(0) if x.dim() == 2 else x


def _one_of(axes: Sequence[int], rank: int) -> tuple[slice, ...]:
    return tuple(slice(0, 1) if a in axes else slice(None) for a in range(rank))


def products_in(tape: Tape) -> Iterator[Product]:
    """Products of two factors that both depend on the arguments, each with either factor as M."""
    multiplied: dict[Slot | None, int] = {}
    single: set[Slot | None] = set()  # softmaxes over one key, which einsum multiplies entry by entry, without a sum
    for n, step in enumerate(tape.steps):
        if _is_of_one_key(tape, step) or (step.func.overloadpacket in AS_IT_IS and not single.isdisjoint(step.slots())):
            single.add(step.outs[0])
        first = _FIRST.get(step.func.overloadpacket)
        if step.func is aten.mul.Tensor and all(step.live[:2]):
            multiplied[step.outs[0]] = n
            yield from (_broadcast(tape, n, n, [], flipped=k == 1) for k in range(2) if step.args[k] in single)
        if first is not None and all(step.live[first : first + 2]):
            yield Product(n, n, first)
            yield Product(n, n, first, flipped=True)
        if step.func is aten.sum.dim_IntList and step.args[0] in multiplied and step.args[1]:
            at = multiplied[step.args[0]]
            yield from (_broadcast(tape, n, at, step.args[1], flipped=flipped) for flipped in (False, True))


def _is_of_one_key(tape: Tape, step: Step) -> bool:
    return step.func in SOFTMAX and tape.of(step.args[0]).shape[step.args[1]] == 1


def _broadcast(tape: Tape, n: int, at: int, summed: Sequence[int], *, flipped: bool) -> Product:
    """A broadcast product that is summed: axes that both factors have, that one has, that are summed."""
    factors = [tape.of(a) for a in tape.steps[at].args[:2]]
    shape = torch.broadcast_shapes(*[f.shape for f in factors])  # type: ignore[no-untyped-call]
    x, y = (_own_axes(f, shape) for f in factors)
    j = sorted(a % len(shape) for a in summed)
    rest = [a for a in range(len(shape)) if a not in j]
    g, i, e = ([a for a in rest if x[a] - y[a] == d] for d in (0, 1, -1))
    return Product(n, at, 0, (g, i, e, j), tuple(shape), flipped)


def _own_axes(t: Tensor, shape: Sequence[int]) -> list[bool]:
    """Along which axes of a shape that it is broadcast to a tensor has different values."""
    lead = len(shape) - t.dim()
    return [a >= lead and t.shape[a - lead] == n > 1 and t.stride(a - lead) != 0 for a, n in enumerate(shape)]


def matrices(run: Run, product: Product) -> tuple[Tensor, Tensor]:
    """M and W as a run caught them."""
    return product.factors(run.caught[product.at])
