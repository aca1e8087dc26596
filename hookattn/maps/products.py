"""Where a map meets its values in a forward: watched, or with something else in place of what comes out."""

from __future__ import annotations

import math
import string
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from .arrangement import Part
from .formed import Fused
from .intercept import Run
from .norms import Norm
from .sites import Watch, tensors_in

_MATRICES = {"matmul", "bmm", "mm", "__matmul__"}
_AS_IT_IS = {  # functions that lay the same values out in another way, or a part of them
    "T", "mT", "H", "bfloat16", "cat", "chunk", "clone", "contiguous", "detach", "double", "dropout", "expand", "expand_as",
    "flatten", "float", "half", "movedim", "narrow", "permute", "reshape", "select", "split", "squeeze", "stack", "swapaxes",
    "to", "transpose", "type", "type_as", "unbind", "unflatten", "unsqueeze", "view", "__getitem__",
}  # fmt: skip


@dataclass(frozen=True)
class Product:
    """A map times values, as a forward multiplies them.

    Attributes:
        number: of the SDPA calls and softmaxes of the forward, the how manieth; or of its multiplications.
        operand: None for a call of SDPA; else which factor of the multiplication is the map.
        letters: names of the axes of the map, the values and the outcome, as in einsum.
        sizes: of these axes.
    """

    number: int
    operand: int | None
    letters: tuple[str, str, str]
    sizes: tuple[tuple[str, int], ...]

    @cached_property
    def part(self) -> Part:
        """Where rows of the map stand in it."""
        shape, (key,) = self._sizes_of(self.letters[0]), set(self.letters[0]) - set(self.letters[2])
        return Part(self.number, self.operand, shape, self.letters[0].index(key))

    @property
    def groups(self) -> Tensor:
        """(rows,): which of the matrices of values each row of the map is multiplied onto."""
        lead, own = self._lead, [a for a in self._lead if a in self.letters[1]]
        numbers = torch.arange(math.prod(self._sizes_of(own)), device="cpu").view(
            [dict(self.sizes)[a] if a in own else 1 for a in lead]
        )
        return numbers.expand(self._sizes_of(lead)).flatten()

    def values(self, factor: Tensor) -> Tensor:
        """(groups, keys, width) of the values as they are multiplied."""
        of_map, own, _ = self.letters
        order = [*(a for a in self._lead if a in own), of_map[self.part.axis], *self._width]
        return self._merged(factor.expand(self._sizes_of(own)).permute([own.index(a) for a in order]), len(self._width))

    def rows(self, outcome: Tensor) -> Tensor:
        """(rows, width) of what comes out."""
        out = self.letters[2]
        return self._merged(outcome.permute([out.index(a) for a in (*self._lead, *self._width)]), len(self._width), keys=0)

    def outcome(self, rows: Tensor) -> Tensor:
        """What comes out, again, of (rows, width)."""
        axes = [*self._lead, *self._width]
        return rows.reshape(self._sizes_of(axes)).permute([axes.index(a) for a in self.letters[2]])

    @property
    def _lead(self) -> list[str]:
        return [a for a in self.letters[0] if a in self.letters[2]]

    @property
    def _width(self) -> list[str]:
        return [a for a in self.letters[2] if a not in self.letters[0]]

    def _sizes_of(self, letters: Iterable[str]) -> tuple[int, ...]:
        sizes = dict(self.sizes)
        return tuple([sizes[a] for a in letters])

    @staticmethod
    def _merged(t: Tensor, width: int, keys: int = 1) -> Tensor:
        lead, rest = t.shape[: t.dim() - width - keys], t.shape[t.dim() - width :]
        middle = t.shape[t.dim() - width - keys : t.dim() - width]
        return t.reshape(math.prod(lead), *middle, math.prod(rest))


def product_of(name: str, args: tuple[Any, ...], number: int, operand: int) -> Product | None:
    """The product that a function of torch is, if it is one of two matrices, or of stacks of them, one of which is a map."""
    if (found := _letters(name, args)) is None:
        return None
    (x, y), (of_x, of_y, out) = found
    sizes = {a: n for of, t in ((of_x, x), (of_y, y)) for a, n in zip(of, t.shape) if n > 1}
    full = tuple((a, sizes.get(a, 1)) for a in dict.fromkeys(of_x + of_y))
    of_map, of_values = (of_x, of_y) if operand == 0 else (of_y, of_x)
    keys = set(of_map) & set(of_values) - set(out)
    # a factor that is spread over images or heads has no rows of its own for each
    is_spread = (y if operand else x).shape != tuple(dict(full)[a] for a in of_map)
    if len(keys) != 1 or is_spread or set(of_map) - set(out) != keys or set(of_values) - set(out) != keys:
        return None
    return Product(number, operand, (of_map, of_values, out), full)


def _letters(name: str, args: tuple[Any, ...]) -> tuple[tuple[Tensor, Tensor], tuple[str, str, str]] | None:
    """The two factors of a product and names of their axes and of those of what comes out."""
    if name == "einsum" and isinstance(args[0], str):
        x, y, *more = args[1] if len(args) == 2 and isinstance(args[1], (tuple, list)) else (*args[1:], None)
        given, arrow, out = args[0].replace(" ", "").partition("->")
        if "..." in given or not arrow or given.count(",") != 1 or any(t is not None for t in more):
            return None
        first, second = given.split(",")
        return ((x, y), (first, second, out)) if len({*first}) == len(first) and len({*second}) == len(second) else None
    if name not in _MATRICES or len(args) != 2 or min(args[0].dim(), args[1].dim()) < 2:
        return None
    lead = string.ascii_uppercase[: max(t.dim() for t in args) - 2]
    first, second = (lead[len(lead) - (t.dim() - 2) :] + own for t, own in zip(args, ("ij", "jk")))
    return (args[0], args[1]), (first, second, lead + "ik")


@dataclass
class Met:
    """A product of a map and values that a forward has formed.

    Attributes:
        factor: the map as it is multiplied; None inside of SDPA.
        values, outcome: the values, and what came out.
        of: which SDPA calls or softmaxes the map comes from.
        as_it_is: whether it is what they put out, laid out in whatever way.
    """

    product: Product
    factor: Tensor | None
    values: Tensor
    outcome: Tensor
    of: frozenset[int]
    as_it_is: bool


class WatchProducts(Watch):
    """Notes where maps are multiplied onto values, and what is done afterwards, with dropout of both left out.

    Args:
        factors: parts that are factors of products, of maps that were made by hand.

    Attributes:
        met: the products, in the order they are met in.
        norms: of what came out, in their order, each with what it divides by and what comes out of it.
        linears: projections of what came out: what went in, the weight, and what came out of these.
    """

    def __init__(self, factors: Iterable[Part] = ()) -> None:
        super().__init__(factors)
        self.met: list[Met] = []
        self.norms: list[tuple[Norm, Tensor, Tensor]] = []
        self.linears: list[tuple[Tensor, Tensor, Tensor]] = []
        self._made: dict[int, tuple[Tensor, frozenset[int], bool]] = {}  # by id, of a softmax; kept alive, as are the others
        self._after: dict[int, Tensor] = {}
        self._constant: dict[int, Tensor] = {}  # of parameters alone

    def fused(self, run: Run, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Note the values."""
        out: Tensor = super().fused(run, args, kwargs)
        site, number = self.softmaxes[-1], len(self.softmaxes) - 1
        assert isinstance(site, Fused)
        lead = string.ascii_uppercase[: len(site.lead)]
        sizes = (*site.lead, site.q.shape[-2], site.k.shape[-2], site.v.shape[-1])
        product = Product(number, None, (f"{lead}ij", f"{lead}jk", f"{lead}ik"), tuple(zip(f"{lead}ijk", sizes)))
        return self._meet(Met(product, None, site.v.expand(*site.lead, -1, -1), out, frozenset([number]), True))

    def softmax(self, run: Run, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Note what comes out, to know it where it is multiplied."""
        out: Tensor = super().softmax(run, args, kwargs)
        self._made[id(out)] = out, frozenset([len(self.softmaxes) - 1]), True
        return out

    def multiply(self, run: Run, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Note the product, if it is one of a map and values."""
        self._products += 1
        out, tensors = run(*args, **kwargs), tensors_in((args, kwargs))
        if (found := self._find_map(tensors)) is None:
            return out
        operand, of, as_it_is = found
        product = product_of(getattr(run, "__name__", ""), args, self._products, operand)
        if product is None:
            return out
        return self._meet(Met(product, tensors[operand], tensors[1 - operand], out, of, as_it_is))

    def drop(self, run: Run, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Leave dropout of a map, and of what comes of it, out."""
        (first, *_) = tensors_in((args, kwargs))
        return first if id(first) in self._made or id(first) in self._after else run(*args, **kwargs)

    def normalise(self, run: Run, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Note what a norm of what came out divides by."""
        norm = Norm.of(getattr(run, "__name__", ""), args, kwargs)
        if norm is None or id(norm.x) not in self._after:
            return run(*args, **kwargs)
        return self._normalise(norm, run(*args, **kwargs))

    def follow(self, func: Run, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """Note what is made of what."""
        super().follow(func, args, kwargs, out)
        name, given = _name(func), tensors_in((args, kwargs))
        made = [t for t in (given[:1] if name == "__setitem__" else tensors_in(out)) if t.is_floating_point()]
        if any(id(t) in self._after for t in made):  # what a product has put out, or what was written into
            return
        maps = [self._made[id(t)] for t in given if id(t) in self._made]
        if "softmax" in name:
            return
        if maps:
            of = frozenset().union(*(each[1] for each in maps))
            as_it_is = name in _AS_IT_IS and len(maps) == len(given) and all(each[2] for each in maps)
            self._made.update((id(t), (t, of, as_it_is)) for t in made)
        elif any(id(t) in self._after for t in given):
            self._after.update((id(t), t) for t in made)
            if name == "linear" and id(args[0]) in self._after and len(args) > 1:
                self.linears.append((args[0], args[1], out))
        elif all(map(self._is_constant, given)):
            self._constant.update((id(t), t) for t in made)

    def _find_map(self, tensors: list[Tensor]) -> tuple[int, frozenset[int], bool] | None:
        """Which of two factors is a map, where the other is none and depends on what the module was called with."""
        if len(tensors) != 2:
            return None
        if (part := self._wanted.get(self._products)) is not None:
            return part.operand or 0, frozenset(), True
        which = [n for n, t in enumerate(tensors) if id(t) in self._made]
        if len(which) != 1 or self._is_constant(tensors[1 - which[0]]):
            return None
        return which[0], *self._made[id(tensors[which[0]])][1:]

    def _meet(self, met: Met) -> Tensor:
        out = self._after[id(met.outcome)] = met.outcome
        # copies, since the forward may write into them
        factor = None if met.factor is None else met.factor.clone()
        self.met.append(replace(met, factor=factor, values=met.values.clone(), outcome=out.clone()))
        return out

    def _normalise(self, norm: Norm, out: Tensor) -> Tensor:
        self.norms.append((norm, norm.scale(), out))
        return out

    def _is_constant(self, t: Tensor) -> bool:
        return isinstance(t, nn.Parameter) or id(t) in self._constant


class PutOutcomes(WatchProducts):
    """Puts other outcomes in place of those of products, and lets norms of them divide by what they did.

    Args:
        outcomes: by number and operand of the product, (rows, width).
        norms: of a run that was watched.
    """

    def __init__(
        self, factors: Iterable[Part], outcomes: Mapping[Product, Tensor], norms: list[tuple[Norm, Tensor, Tensor]]
    ) -> None:
        super().__init__(factors)
        self._outcomes, self._norms = outcomes, norms

    def _meet(self, met: Met) -> Tensor:
        if (rows := self._outcomes.get(met.product)) is not None:
            # as strided as it was, for forwards that call `view`
            met.outcome = torch.empty_like(met.outcome).copy_(met.product.outcome(rows))
        return super()._meet(met)

    def _normalise(self, norm: Norm, out: Tensor) -> Tensor:
        scale = self._norms[len(self.norms)][1]
        out = norm.divided_by(scale).to(out.dtype)
        self.norms.append((norm, scale, out))
        return out


def _name(func: Run) -> str:
    """The name of a function, or of the property that it gets."""
    name = getattr(func, "__name__", "")
    return getattr(getattr(func, "__self__", None), "__name__", name) if name == "__get__" else name
