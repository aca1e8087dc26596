"""From a module and one call to the arrangement of its map, or the reason why there is none."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ...errors import UnreadableError
from ..arrangement import Arrangement
from ..sites import WHOLE, tensors_in
from .judge import find_maps
from .locate import locate
from .table import arrange
from .tape import Tape, storage_of
from .unmix import softmax_before_mixing
from .values import ORDINARY, OWN, OWN_WEIGHTS, Numbers, drawn


def form_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """What of a call an arrangement depends on: shapes, and the values of whole numbers, which tell tokens apart."""
    leaves, spec = pytree.tree_flatten((args, kwargs))
    return (str(spec), *map(_form, leaves))


def _form(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value if isinstance(value, (int, float, str, type(None))) else type(value)
    return (tuple(value.shape), str(value.tolist()) if value.dtype in WHOLE and not value.is_meta else None)


def establish_axes(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], way: list[Any], *, as_called: bool = False
) -> Arrangement:
    """Find, by derivatives of its own forward, where a module's map stands and which of its axes is what.

    Args:
        way: that the forward took when it was called, see `Following`.

    Raises:
        UnreadableError: it forms no map over pairs of tokens, or evidence does not tell; what was found is told.
    """
    try:
        return _establish(module, args, kwargs, way, as_called)
    except (RuntimeError, NotImplementedError) as error:  # such as an operation that has no derivative
        if isinstance(error, (UnreadableError, torch.OutOfMemoryError)):
            raise
        raise UnreadableError(
            f"evidence of its axes ends at {type(error).__name__}: {str(error).partition(chr(10))[0]}"[:300]
        ) from error


def _establish(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], way: list[Any], as_called: bool
) -> Arrangement:
    on_meta = any(t.is_meta for t in tensors_in((args, kwargs)))  # parameters alone may be fetched when the module is called
    if on_meta:
        module, args, kwargs = _with_values(module, args, kwargs)

    def is_same(other: list[Any]) -> bool:
        # what came after its forward, such as hooks on the module itself, is no part of it; on meta there are no indices
        return other == way[: len(other)] or (on_meta and len(other) == len(way))

    refusals = list[str]()
    with _plainly(module, args, kwargs):
        # weights may go together, such as bounds that values are clipped to, so they are tried as they are, too
        for numbers in (ORDINARY, OWN_WEIGHTS):
            try:
                tape = _take_down(module, args, kwargs, numbers, is_same, as_called)
                found = _arrange(tape)
                if tape.seen.is_sorted:  # in this call, but maybe not in others
                    others = numbers._replace(argument=drawn)
                    if not found.is_like(_arrange(_take_down(module, args, kwargs, others, is_same, as_called))):
                        raise UnreadableError("where its rows stand depends on values")
                return found
            except UnreadableError as refusal:
                refusals.append(str(refusal))
    raise UnreadableError(refusals[0])


def _arrange(tape: Tape) -> Arrangement:
    with torch.autograd.graph.allow_mutation_on_saved_tensors() if tape.mutates else nullcontext():
        maps, index = arrange(tape, *find_maps(tape))
        products = [c.product for c in maps]
        is_random = any(storage_of(tape.of(product.map_in(tape.steps))) in tape.drawn for product in products)
        found = locate(tape, products, index, softmax_before_mixing(tape, products, index))
        return replace(found, is_random=is_random)


def _take_down(
    module: nn.Module, args: Any, kwargs: Any, numbers: Numbers, is_same: Callable[[list[Any]], bool], as_called: bool
) -> Tape:
    """A forward with other numbers, or with its own where with those it fails, takes another way or puts out no numbers."""
    taken, reason = list[Tape](), "its forward takes another way when its numbers are moved a little"
    for each in (numbers, OWN):
        try:
            tape = Tape(module, args, kwargs, each, as_called=as_called)
        except UnreadableError as error:
            reason = str(error)
            continue
        taken += [tape] if is_same(tape.seen.way) else []
        if taken and taken[-1].is_finite:
            return taken[-1]
    if not taken:
        raise UnreadableError(reason)
    return taken[0]


def _with_values(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[nn.Module, Any, Any]:
    """A copy of a module on the meta device, and of its arguments, with some values: where things stand depends on none."""
    module = copy.deepcopy(module).to_empty(device="cpu")
    random = torch.Generator().manual_seed(4)

    def fill(t: Tensor) -> Tensor:
        return t.normal_(generator=random) if t.is_floating_point() else t.zero_()

    with torch.no_grad():
        for t in (*module.parameters(), *module.buffers()):
            fill(t)
    args, kwargs = pytree.tree_map_only(Tensor, lambda t: fill(torch.empty_like(t, device="cpu")), (args, kwargs))
    return module, args, kwargs


@contextmanager
def _plainly(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[None]:
    """Derivatives on, and autocast off, which would keep what it casts for the user's own forwards."""
    with ExitStack() as stack:
        # "meta", of parameters that are fetched when the module is called, has no autocast
        for device in {t.device.type for t in (*module.parameters(), *tensors_in((args, kwargs)))} - {"meta"}:
            stack.enter_context(torch.autocast(device, enabled=False, cache_enabled=False))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        yield
