"""A forward that is run to show what multiplies its values, what comes out, and what it puts out with something else there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..attention.sources import exact_dtype
from ..calls.call import Call
from ..calls.staleness import Structure
from ..errors import UnreadableError
from .arrangement import Arrangement, Part
from .carried import SEVERAL_VALUES, Carried, find_carried
from .established import arrange
from .evidence.establish import form_of
from .evidence.values import draw_arguments
from .products import Met, PutOutcomes, WatchProducts
from .replay import run_under

_HIDING = 1e4  # what is about as large hides what is added to it
_MOST = 64  # kinds of calls that are remembered of a module, or of a class
_OF_MODULES: WeakKeyDictionary[nn.Module, tuple[Structure, dict[Any, Carried]]] = WeakKeyDictionary()
_OF_CLASSES: WeakKeyDictionary[type, dict[Any, Carried]] = WeakKeyDictionary()


class Forward:
    """A forward that has run to show what it does with its map.

    Args:
        call: whose modes are on already.
        carried: how its map is carried on, if that is remembered of such calls; found anew where it goes another way.

    Attributes:
        carried: how it carries the map on.
        watch: what was noted.
        output: what it has put out.
    """

    def __init__(self, call: Call, carried: Carried | None = None) -> None:
        self._run(call, carried)
        if carried is not None and carried.went == self.watch.went:
            self.carried = carried
            return
        self.carried = self._remembered()
        if any(part.operand is not None for part in self.carried.map.parts):
            self._run(call, self.carried)

    def _run(self, call: Call, carried: Carried | None) -> None:
        by_hand = [] if carried is None else [part for part in carried.map.parts if part.operand is not None]
        self.call = call
        self.output, self.watch = run_under(call, WatchProducts(by_hand))

    def find_once(self, name: str, find: Callable[[Forward], Any]) -> Any:
        """What else is found of such calls, by a forward with other numbers; not remembered where no numbers come out."""
        known = self.carried.found
        if name in known:
            return known[name]
        other = self._with_numbers(self.carried)
        found = find(other)
        if other._has_numbers():
            known[name] = found
        return found

    def _with_numbers(self, carried: Carried | None = None) -> Forward:
        """The same with arguments that hide nothing; this where with those it fails, goes another way or makes no numbers."""
        other = Forward.__new__(Forward)
        args, kwargs = draw_arguments(self.call.args, self.call.kwargs)
        try:
            other._run(self.call._replace(args=args, kwargs=kwargs), carried)
        except Exception:  # such as of places that are looked up
            return self
        if other.watch.went != self.watch.went or not other._has_numbers():
            return self
        if carried is not None:
            other.carried = carried
        return other

    def _has_numbers(self) -> bool:
        """Whether what comes out is neither NaN nor so large that it hides what is added to it."""
        return all(t.is_meta or bool((t.detach().abs() < _HIDING).all()) for t in floats_in(self.output))

    @property
    def met(self) -> list[Met]:
        """The products of the map."""
        met = {each.product: each for each in self.watch.met}
        return [met[product] for product in self.carried.products]

    def effective(self) -> Tensor:
        """What multiplies the values, (images * windows, heads, queries, keys), where that is not the map."""
        factors = [met.product.part.as_rows(met.factor) for met in self.met if met.factor is not None]
        return self.carried.rows.collect([rows.to(exact_dtype(rows.dtype)) for rows in factors])

    def outcomes(self) -> Tensor:
        """What the products put out, (images * windows, heads of the products, queries, width)."""
        return self.carried.rows.collect([met.product.rows(met.outcome) for met in self.met])

    def values(self) -> Tensor:
        """What is multiplied, (images * windows, heads, keys, width).

        Raises:
            UnreadableError: queries of one head have different values.
        """
        found = self._values()
        return found if self.carried.members is None else found[:, self.carried.members[:, 0]]

    def weights(self) -> Tensor:
        """What outcomes that are added up are multiplied by, (images * windows, heads, count, queries); the first by 1."""
        assert self.carried.members is not None
        heads = len(self.carried.members)
        slopes = self._slopes(in_graph=torch.is_grad_enabled())
        assert slopes is not None
        slopes = slopes[:, self.carried.members.flatten()].to(exact_dtype(slopes.dtype))
        slopes = rearrange(slopes, "b (h m) q e -> b h m q e", h=heads)
        first = slopes[:, :, :1]
        weights: Tensor = (slopes * first).sum(-1) / first.square().sum(-1)
        return weights

    def run_with(self, outcomes: Tensor) -> tuple[Any, PutOutcomes]:
        """What is put out with other outcomes of the products, arranged as `outcomes`; norms divide by what they did."""
        products, own = self.carried.products, [met.product.rows(met.outcome) for met in self.met]
        parts = tuple([Part(n, None, tuple(rows.shape), 1) for n, rows in enumerate(own)])
        laid = Arrangement(parts, self.carried.rows.index)
        rows = {product: laid.spread(outcomes, n, partial(_return, own[n])) for n, product in enumerate(products)}
        return run_under(self.call, PutOutcomes(self.carried.map.parts, rows, self.watch.norms))

    def _members(self) -> Tensor | None:
        """(heads, count), heads of the products with the same values and outcomes that are first of all added up."""
        try:
            values = self._values()
        except UnreadableError:  # told when they are read
            return None
        heads = range(values.shape[1])
        same = [[torch.equal(values[:, a], values[:, b]) for b in heads[:a]] for a in heads]
        if not any(map(any, same)) or (slopes := self._slopes()) is None:
            return None
        groups: list[list[int]] = []
        for a in heads:
            alike = [g for g in groups if same[a][g[0]] and _are_in_proportion(slopes[:, g[0]], slopes[:, a])]
            if alike:
                alike[0].append(a)
            else:
                groups.append([a])
        return torch.tensor(groups, device="cpu") if len(groups[0]) > 1 and len({len(g) for g in groups}) == 1 else None

    def _values(self) -> Tensor:
        each = [met.product.values(met.values) for met in self.met]
        if len({t.shape[1:] for t in each}) > 1:
            raise UnreadableError(SEVERAL_VALUES)
        slabs, groups = torch.cat(each), self.carried.groups
        first = groups.amax(2)
        for window, head, query in ((groups != first[..., None]) & (groups >= 0)).nonzero().tolist():
            if not torch.equal(slabs[groups[window, head, query]], slabs[first[window, head]]):
                raise UnreadableError(SEVERAL_VALUES)
        return slabs[first.to(slabs.device)]

    def _slopes(self, *, in_graph: bool = False) -> Tensor | None:
        """The gradient of something at the outcomes, (images * windows, heads, queries, width); None where there is none."""
        with torch.enable_grad():
            outcomes = self.outcomes().detach().requires_grad_()
            outputs = [t for t in floats_in(self.run_with(outcomes)[0]) if t.requires_grad]
            random = torch.Generator().manual_seed(7)
            ahead = [(torch.rand(t.shape, generator=random, device="cpu") + 0.5).to(t) for t in outputs]
            return torch.autograd.grad(outputs, outcomes, ahead, create_graph=in_graph)[0] if outputs else None

    def _remembered(self) -> Carried:
        """How such calls carry their map on: found once for a module, or a class, and arguments of the same form."""
        module, form = self.call.layer.module, _key_of(self.call)
        if (found := recall(self.call)) is not None and found.went == self.watch.went:
            return found
        arrangement = arrange(self.call, self.watch)
        key = (form, self.watch.went, arrangement.shape)
        of_class = _OF_CLASSES.setdefault(type(module), {})
        if (found := of_class.get(key)) is None:
            other = self._with_numbers()
            found = other.carried = find_carried(other.call, other.watch, arrangement)
            if any(part.operand is not None for part in found.map.parts):  # its products are met by those who know them
                other._run(other.call, found)
            found = replace(found, members=other._members())
            if not other._has_numbers():
                return found
            _keep(of_class, key, found)
        structure, known = _OF_MODULES.get(module, (None, {}))
        if structure != self.call.layer.structure:  # it has become another module
            _, known = _OF_MODULES[module] = self.call.layer.structure, {}
        _keep(known, form, found)
        return found


def _keep(known: dict[Any, Carried], key: Any, found: Carried) -> None:
    while len(known) >= _MOST:
        known.pop(next(iter(known)), None)
    known[key] = found


def _return(rows: Tensor) -> Tensor:
    return rows


def floats_in(output: Any) -> list[Tensor]:
    """Tensors of real numbers among what a forward puts out."""
    return [t for t in pytree.tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point()]


def _are_in_proportion(a: Tensor, b: Tensor) -> bool:
    """Whether vectors along the last axis have the same direction, or the opposite one."""
    rounding = max(1e-5, 4 * torch.finfo(a.dtype).eps ** 2)
    a, b = (each.to(exact_dtype(each.dtype)) for each in (a, b))  # the cosine itself is not to be rounded
    return bool((torch.cosine_similarity(a, b, dim=-1).abs() > 1 - rounding).all())


def recall(call: Call) -> Carried | None:
    """How such calls carry their map on, if it has been found of this module."""
    structure, known = _OF_MODULES.get(call.layer.module, (None, {}))
    return known.get(_key_of(call)) if structure == call.layer.structure else None


def _key_of(call: Call) -> Any:
    """What of a call, besides its module, its way may depend on."""
    return form_of(call.args, call.kwargs), tuple(call.modes.training), getattr(call.layer.module, "fused_attn", None)
