"""From a module and one call to the arrangement of its map, or the reason why there is none."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ...errors import UnreadableError
from .judge import find_maps
from .product import Product
from .table import arrange
from .tape import Operations, Tape, exact, own_arguments, tensors_in
from .unmix import softmax_before_mixing


@dataclass(frozen=True, eq=False)
class Arrangement:
    """Where in a module's forward its map stands; holds for its class, its settings and such arguments.

    Args:
        form: of the arguments, as `form_of` gives it.
        steps: the operations of the forward, up to the last that is needed.
        products: those that multiply the map and its values, with the shapes of M.
        index: (images * windows, heads, queries), which of all rows of the products stands there; one beyond all is zeros.
        softmax: where heads are mixed after it: its step, and the order of its axes.
    """

    form: tuple[Any, ...]
    steps: tuple[str, ...]
    products: dict[Product, tuple[int, ...]]
    index: Tensor
    softmax: tuple[int, tuple[int, ...]] | None

    def read(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """The map (images * windows, heads, queries, keys) of another such call, in float32 or better; one run of the forward.

        Windows that are smaller than others are filled up with zeros.

        Raises:
            UnreadableError: the call or the way that the forward takes is another than the one that was looked at.
        """
        with _plainly(module, args, kwargs):
            if form_of(args, kwargs) != self.form:
                raise UnreadableError("its axes were established for arguments of other shapes")
            reader = _Reader(self)
            reader.run(module, *own_arguments(args, kwargs, exact))
            return reader.map()


def form_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """What of a call an arrangement depends on: shapes, and the values of whole numbers, which tell tokens apart."""
    leaves, spec = pytree.tree_flatten((args, kwargs))
    return (str(spec), *map(_form, leaves))


def _form(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value if isinstance(value, (int, float, str, type(None))) else type(value)
    counts = not value.is_floating_point() and value.dtype != torch.bool
    return (tuple(value.shape), value.dtype, str(value.tolist()) if counts else None)


class _Reader(Operations):  # type: ignore[no-untyped-call]
    """Keeps the map's rows while a forward runs."""

    def __init__(self, arrangement: Arrangement) -> None:
        super().__init__()
        self.arrangement = arrangement
        self.rows: list[Tensor] = []

    def step(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        known, softmax = self.arrangement, self.arrangement.softmax
        if known.steps[self.count : self.count + 1] not in ((), (str(func),)):
            raise UnreadableError(f"its forward takes another way than before: {func}, not {known.steps[self.count]}")
        if softmax and softmax[0] == self.count:
            self.rows = [out.permute(softmax[1]).reshape(known.index.numel(), -1)]
        for product, shape in known.products.items():
            if not softmax and product.at == self.count:
                m = product.factors(args)[0]
                if m.shape != shape:
                    raise UnreadableError(f"its forward multiplies {tuple(m.shape)}, where it was {shape} before")
                self.rows.append(m.flatten(0, 1).clone())

    def map(self) -> Tensor:
        index, keys = self.arrangement.index, max(rows.shape[1] for rows in self.rows)
        if self.arrangement.softmax:
            return self.rows[0].view(*index.shape, keys)
        rows = torch.cat([F.pad(rows, (0, keys - rows.shape[1])) for rows in self.rows])
        return F.pad(rows, (0, 0, 0, 1))[index.to(rows.device)]


def establish_axes(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arrangement:
    """Find, by derivatives of its own forward, where a module's map stands and which of its axes is what.

    Raises:
        UnreadableError: it forms no map over pairs of tokens, or evidence does not tell; what was found is told.
    """
    with _plainly(module, args, kwargs), ExitStack() as stack:
        tape = Tape(module, args, kwargs)
        if tape.mutates:
            stack.enter_context(torch.autograd.graph.allow_mutation_on_saved_tensors())
        maps, index = arrange(tape, *find_maps(tape))
        softmax = softmax_before_mixing(tape, [c.product for c in maps], index)
    steps = tuple(str(s.func) for s in tape.steps[: 1 + max(c.product.at for c in maps)])
    return Arrangement(form_of(args, kwargs), steps, {c.product: tuple(c.m.shape) for c in maps}, index, softmax)


@contextmanager
def _plainly(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[None]:
    """Derivatives on, autocast off, which would keep what it casts for the user's own forwards; refusals named."""
    try:
        with ExitStack() as stack:
            for device in {t.device.type for t in (*module.parameters(), *tensors_in((args, kwargs)))}:
                stack.enter_context(torch.autocast(device, enabled=False, cache_enabled=False))
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            yield
    except (UnreadableError, RuntimeError, NotImplementedError) as error:  # such as an operation that has no derivative
        name = type(module).__qualname__.split(".<locals>.")[-1]
        raise UnreadableError(f"{name}: {error}; describe its map with @hookattn.recipe.") from error
