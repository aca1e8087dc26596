"""Where a forward forms its map: watched, filled with another map, or taken for a variable to differentiate by."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from typing import Any
from weakref import ref

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from ..attention.sources import Source
from ..conditions.autocast import without_autocast
from ..conditions.training import random_streams
from ..errors import UnreadableError
from .arrangement import Arrangement, Part
from .formed import Factor, Formed, Fused, Softmaxed, slope_of_rows, source_of_rows
from .intercept import Run, Sites, scores_and_axis, sdpa_arguments

WHOLE = {torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}
_CHOOSE = {"__getitem__", "masked_select", "masked_scatter", "masked_scatter_", "index_put", "index_put_", "nonzero"}
# What may give back the very tensor that it was given: dropout that is off, tensors that are of a type or contiguous already.
_MAY_BE_SAME = {"to", "type", "type_as", "float", "double", "half", "bfloat16", "cpu", "cuda", "contiguous"}


class Following(Sites):
    """Base of sites that number what a forward forms, and note the way that it takes.

    Args:
        factors: parts that are factors of products, to be noted too.
        as_called: whether the forward is to return all that it would, with dropout of the map, and weights that are asked for.

    Attributes:
        softmaxes: SDPA calls and softmaxes, in the order they are met in.
        way: the functions of torch that were called, with sizes and settings, and with which of the tensors that were there.
        ends: which of these it was given and has put out. Calls of one way and ends form their maps at the same places.
        is_sorted: whether values have decided where something stands.
    """

    def __init__(self, factors: Iterable[Part] = (), *, as_called: bool = False) -> None:
        self.as_called = as_called
        self.softmaxes: list[Fused | Softmaxed] = []
        self.way: list[Any] = []
        self.ends: Any = None
        self._identities: dict[int, tuple[ref[Tensor], int]] = {}  # by id, of tensors; weakly, since they are the forward's
        self._numbered, self._foreign, self.is_sorted = 0, 0, False
        self._wanted = {part.number: part for part in factors if part.operand is not None}
        self._factors: dict[int, Factor] = {}
        self._products = -1
        self._of_values: dict[int, Tensor] = {}  # whole numbers that were computed from others

    @property
    def parts(self) -> list[Part]:
        """What of it forms the map, by the rule that recipes go by: the SDPA calls, or the softmaxes if there are none."""
        # a softmax beside SDPA weighs something else: branches, experts, channels
        fused = any(isinstance(each, Fused) for each in self.softmaxes)
        return [each.part(n) for n, each in enumerate(self.softmaxes) if isinstance(each, Fused) or not fused]

    @property
    def went(self) -> tuple[Any, ...]:
        """The way and its ends, to be compared."""
        return tuple(self.way), self.ends

    def formed(self, arrangement: Arrangement) -> list[Formed]:
        """What holds the rows of the map, part by part."""
        return [self.softmaxes[p.number] if p.operand is None else self._factors[p.number] for p in arrangement.parts]

    def multiply(self, run: Run, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Number a product, and hand the factor that is wanted of it to `see_factor`."""
        self._products += 1
        if (part := self._wanted.get(self._products)) is None:
            return run(*args, **kwargs)
        leaves, spec = pytree.tree_flatten((args, kwargs))
        place = [n for n, leaf in enumerate(leaves) if isinstance(leaf, Tensor)][part.operand or 0]
        leaves[place] = self.see_factor(part, leaves[place])
        args, kwargs = pytree.tree_unflatten(leaves, spec)
        return run(*args, **kwargs)

    def see_factor(self, part: Part, factor: Tensor) -> Tensor:
        """Note a factor; what is returned is multiplied in its place."""
        self._factors[part.number] = Factor(factor.clone(), part.axis)
        return factor

    def follow(self, func: Run, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """Note that the forward came by here."""
        made = tensors_in(out)
        if made or func.__name__ == "__setitem__":
            of = getattr(func, "__self__", None)  # of a property, such as `mT`: which
            # a mask that chooses tokens tells where they stand; one that hides scores tells nothing
            chooses = func.__name__ in _CHOOSE or (func.__name__ == "__setitem__" and isinstance(args[2], Tensor))
            settings = self._settings(args, chooses), self._settings(kwargs, chooses)
            self.way.append((func.__name__, getattr(of, "__name__", None), *settings, *(tuple(t.shape) for t in made)))
        is_same = func.__name__ in _MAY_BE_SAME or "dropout" in func.__name__
        for t in made:
            self._numbered += 1
            self._identities[id(t)] = ref(t), self._number_of(tensors_in((args, kwargs))[0]) if is_same else self._numbered
        whole = [t for t in made if not t.is_floating_point()]
        of_values = (whole or self._of_values) and [t for t in tensors_in((args, kwargs)) if self._is_of_values(t)]
        if whole and of_values:
            self._of_values.update((id(t), t) for t in whole)
        elif of_values:  # and floats come out, or are written into
            self.is_sorted |= any(t.dtype in WHOLE for t in of_values)

    def finish(self, given: Any, output: Any) -> None:
        """Note which tensors the forward was given, and which it has put out."""
        self.ends = tuple([tuple(map(self._number_of, tensors_in(each))) for each in (given, output)])
        self._identities.clear()

    def _number_of(self, t: Tensor) -> int:
        """A number for a tensor, in the order in which they are made; below zero for those that the forward has not made."""
        known, number = self._identities.get(id(t), (None, 0))
        if known is None or known() is not t:
            self._foreign += 1
            number = -self._foreign
            self._identities[id(t)] = ref(t), number
        return number

    def _is_of_values(self, t: Tensor) -> bool:
        # in torch 2.6 masks without values, see `Fused`, answer no question
        return hasattr(t, "_materialize") or t.is_floating_point() or t.is_complex() or id(t) in self._of_values

    def _tell_apart(self, t: Tensor, chooses: bool) -> Any:
        if self._is_of_values(t):
            return "tensor"
        return code_of(t) if chooses or t.dtype in WHOLE else "mask"

    def _settings(self, value: Any, chooses: bool) -> Any:
        """What of an argument may decide where things stand: which tensors, whole numbers, words, indices; no other values."""
        if isinstance(value, Tensor):
            return self._number_of(value), self._tell_apart(value, chooses)
        if isinstance(value, (tuple, list)):
            return tuple([self._settings(each, chooses) for each in value])
        if isinstance(value, dict):
            return tuple([(key, self._settings(each, chooses)) for key, each in value.items()])
        if isinstance(value, slice):
            return "slice", self._settings((value.start, value.stop, value.step), chooses)
        return value if isinstance(value, (int, str, type(None), type(...))) else type(value).__name__


class Watch(Following):
    """Notes what every SDPA call and every softmax is made of, and lets them run.

    Args:
        copies: whether to note copies, for a forward that writes into what it has formed its map of.
    """

    def __init__(self, factors: Iterable[Part] = (), *, as_called: bool = False, copies: bool = False) -> None:
        super().__init__(factors, as_called=as_called)
        self._copies = copies
        self._versions: list[tuple[Tensor, int]] = []

    def fused(self, run: Run, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Note queries, keys and values."""
        named = sdpa_arguments(args, kwargs)
        site = Fused(**named)
        site.q, site.k = self._kept(site.q), self._kept(site.k)
        site.mask = None if site.mask is None else self._kept(site.mask)
        # maps are those before dropout, so two runs are to be compared without it
        dropped = named.get("dropout_p") and not self.as_called
        return self._ran(site, run(**{**named, "dropout_p": 0.0}) if dropped else run(*args, **kwargs))

    def softmax(self, run: Run, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Note scores."""
        scores, axis = scores_and_axis(*args, **kwargs)
        # it may be about to be written into them
        site = Softmaxed(scores.clone() if kwargs.get("out") is not None else self._kept(scores), axis)
        return self._ran(site, run(*args, **kwargs))

    def is_overwritten(self) -> bool:
        """Whether something that was noted has been written into since."""
        return any(t._version != version for t, version in self._versions)

    def source(self, arrangement: Arrangement) -> Source:
        """What the map is computed from."""
        return source_of_rows(self.formed(arrangement), arrangement)

    def _ran(self, site: Fused | Softmaxed, out: Tensor) -> Tensor:
        site.dtype = out.dtype
        self.softmaxes.append(site)
        return out

    def _kept(self, t: Tensor) -> Tensor:
        if self._copies or t.is_inference():  # these do not count what is written into them
            return t.clone()
        self._versions.append((t, t._version))
        return t


class Inject(Following):
    """Puts a map where a watched run of the same call formed its own, dropped out as the module would if `as_called`."""

    def __init__(self, watch: Watch, arrangement: Arrangement, attention: Tensor, *, as_called: bool = False) -> None:
        super().__init__(arrangement.parts, as_called=as_called)
        self._dtypes = [site.dtype for site in watch.softmaxes]
        self._numbers = {part.number: n for n, part in enumerate(arrangement.parts) if part.operand is None}
        self._arrangement, self._attention = arrangement, attention

    def fused(self, run: Run, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Multiply the map onto the values."""
        site = Fused(**sdpa_arguments(args, kwargs))
        self.softmaxes.append(site)
        if (n := self._numbers.get(len(self.softmaxes) - 1)) is None:
            return run(*args, **kwargs)
        with without_autocast(site.v.device):
            rows = self._arrangement.spread(self._attention, n, site.rows)
            rows = F.dropout(rows, site.dropout_p if self.as_called else 0.0)
            return site.multiplied(rows).to(self._dtypes[len(self.softmaxes) - 1])

    def softmax(self, run: Run, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Put the map in the place of what comes out."""
        site = Softmaxed(*scores_and_axis(*args, **kwargs))
        self.softmaxes.append(site)
        out: Tensor = run(*args, **kwargs)
        if (n := self._numbers.get(len(self.softmaxes) - 1)) is None:
            return out
        part = self._arrangement.parts[n]
        other = part.of_rows(self._arrangement.spread(self._attention, n, lambda: part.as_rows(out))).to(out.dtype)
        return other if kwargs.get("out") is None else out.copy_(other)

    def see_factor(self, part: Part, factor: Tensor) -> Tensor:
        """Multiply the map in place of the factor."""
        n = self._arrangement.parts.index(part)
        return part.of_rows(self._arrangement.spread(self._attention, n, lambda: part.as_rows(factor))).to(factor.dtype)


class Variables(Following):
    """Makes what SDPA and softmax put out the variables that the module's output is differentiated by.

    With `as_called` off, PyTorch's own attention goes through SDPA where it can, and a row is had without the others.

    Attributes:
        draws: whether the forward has drawn random numbers.
    """

    def __init__(self, device: torch.device, factors: Iterable[Part] = (), *, as_called: bool = False) -> None:
        super().__init__(factors, as_called=as_called)
        self.draws, self._streams = False, random_streams(device)

    def finish(self, given: Any, output: Any) -> None:
        """Note whether random streams have moved, too."""
        super().finish(given, output)
        before, after = self._streams, random_streams(self._streams.device)
        on_gpu = before.cuda is not None and after.cuda is not None and not torch.equal(before.cuda, after.cuda)
        self.draws = on_gpu or not torch.equal(before.cpu, after.cpu)

    def fused(self, run: Run, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Note values, and what came out."""
        return self._noted(Fused(**sdpa_arguments(args, kwargs)), run(*args, **kwargs))

    def softmax(self, run: Run, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Note what came out."""
        return self._noted(Softmaxed(*scores_and_axis(*args, **kwargs)), run(*args, **kwargs))

    def see_factor(self, part: Part, factor: Tensor) -> Tensor:
        """Note the factor."""
        site = self._factors[part.number] = Factor(factor, part.axis)
        return self._variable(site, factor)

    def variables(self, arrangement: Arrangement) -> list[Tensor]:
        """What the output is differentiated by.

        Raises:
            UnreadableError: parts of a map are dropped out where it cannot be told which.
        """
        formed = self.formed(arrangement)
        if any(isinstance(site, Fused) and site.dropout_p for site in formed):
            raise UnreadableError(
                "it drops out parts of its map inside the fused kernel, which does not tell which. For gradients of the map, "
                "set the dropout of attention to 0 (attn_drop_rate=0), or call the model in eval mode."
            )
        return [site.out for site in formed if site.out is not None]

    def slope(self, arrangement: Arrangement, grads: list[Tensor]) -> Source:
        """What the gradient of the map is computed from, out of those of the variables."""
        return slope_of_rows(self.formed(arrangement), arrangement, grads)

    def _noted(self, site: Fused | Softmaxed, out: Tensor) -> Tensor:
        self.softmaxes.append(site)
        return self._variable(site, out)

    def _variable(self, site: Formed, out: Tensor) -> Tensor:
        """Give the forward a copy to go on with, into which it may write."""
        site.out = out if out.requires_grad else out.detach().requires_grad_()
        return site.out.clone()


def code_of(tensor: Tensor) -> Any:
    """A number that tells the values of a tensor apart."""
    try:
        return zlib.crc32(tensor.detach().cpu().clone().contiguous().numpy().tobytes())
    except (RuntimeError, TypeError):  # without values, or mapped over
        return "indices"


def tensors_in(tree: Any) -> list[Tensor]:
    """The tensors among what a function is given, or puts out."""
    return [tree] if isinstance(tree, Tensor) else [t for t in pytree.tree_leaves(tree) if isinstance(t, Tensor)]
