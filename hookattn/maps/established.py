"""Where the map of a call stands in its module's forward: as its recipe has it, or as evidence has established it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any
from weakref import WeakKeyDictionary

import torch

from ..attention.sources import Source
from ..calls.call import Call
from ..calls.restore import restoring
from ..conditions.function_modes import SDPA
from ..conditions.meta import advise, name_missing
from ..conditions.setting import Setting
from ..conditions.transforms import are_wrapped
from ..errors import HookattnError, UnreadableError
from ..recipes.registry import find_axes, find_recipe, qualified_name
from .arrangement import Arrangement, arrange_by_recipe
from .evidence.establish import establish_axes, form_of
from .sites import Following

_MOST = 64  # arrangements that are remembered of a class
# By class, then by what was called with what and went which way: an arrangement, or why there is none.
_KNOWN: WeakKeyDictionary[type, dict[Any, Arrangement | str]] = WeakKeyDictionary()
_deferred: ContextVar[bool] = ContextVar("deferred", default=False)


class NotEstablishedError(Exception):
    """Raised in `deferring` where derivatives of a forward would be taken."""


def deferring() -> Setting[bool]:
    """A block, inside of the user's forward, in which no evidence is looked for that is not there yet."""
    return Setting(_deferred, True)


def source_by_recipe(call: Call) -> Source | None:
    """Queries and keys of a call by recipe; None where its class has none, or one that declines such a call.

    None, too, under modes of the user's or an SDPA of theirs: a recipe leaves out what it does not need, so it does not show
    what they make of it.
    """
    as_written = not call.modes.functions and call.modes.sdpa is SDPA
    return _describe(call) if as_written else None


def _describe(call: Call) -> Source | None:
    """What a recipe makes of a call, if it describes it."""
    with NameInErrors(call):
        for tensor in call.tensors:
            if tensor.is_nested:
                raise UnreadableError("it was called with nested tensors; make the encoder with enable_nested_tensor=False.")
        recipe = find_recipe(call.layer.module)
        source = NotImplemented if recipe is None else recipe(call.layer.module, *call.args, **call.kwargs)
        return None if source is NotImplemented else source


def as_in_training(call: Call) -> AbstractContextManager[None]:
    """Set random streams as they were in a call in train mode, and put back what a recipe changes there."""
    # A projection may have dropout in it (LoRA) or take a step of its own (spectral norm).
    return _with_its_random_numbers(call) if True in call.modes.training else _NOTHING


_NOTHING = nullcontext()


@contextmanager
def _with_its_random_numbers(call: Call) -> Iterator[None]:
    with restoring(call.layer.module):
        call.restore_random_streams()
        yield


class NameInErrors:
    """Put the name of the layer before the reason why something in the block cannot be read."""

    # Classes, and not generators, here and below: since Python 3.12 an error that leaves a generator as another one is a
    # cycle, and would keep what the module was called with until the garbage collector comes.

    def __init__(self, call: Call) -> None:
        self._call = call

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if (
            kind is not None
            and isinstance(error, UnreadableError)
            and not str(error).startswith(name := repr(self._call.layer.name))
        ):
            # from None: the traceback of the error would keep what the module was called with
            raise UnreadableError(f"{name}: {error}") from None


class TellWhy:
    """Say of what something could not be computed, and why, where a module or a recipe raises in the block.

    Args:
        but: errors that are let through, as ours are and those of memory that ran out.

    Attributes:
        name: of what is computed; another one where the block goes on with that.
    """

    def __init__(self, name: str, *but: type[Exception]) -> None:
        self.name = name
        self._but: tuple[type[Exception], ...] = (HookattnError, NotEstablishedError, MemoryError, torch.OutOfMemoryError, *but)

    def __enter__(self) -> TellWhy:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if kind is not None and isinstance(error, Exception) and not isinstance(error, self._but):
            raise UnreadableError(f"{self.name!r}: {reason_of(error)}") from error


def reason_of(error: Exception) -> str:
    """What to say of an error that was kept: ours speak for themselves."""
    if isinstance(error, HookattnError):
        return str(error)
    return f"it could not be computed: {type(error).__name__}: {error}{advise(error)}"


def arrange(call: Call, sites: Following) -> Arrangement:
    """Find where in a forward of a call, which has run with these sites, its map stands.

    Raises:
        UnreadableError: its forward forms something else than its recipe tells, or evidence does not tell what it forms.
    """
    with NameInErrors(call):
        with as_in_training(call):
            source = _describe(call)
        if source is None:
            return arrange_by_evidence(call, sites)
        if not sites.parts:
            raise UnreadableError(
                f"{qualified_name(type(call.layer.module))} calls neither scaled_dot_product_attention nor softmax: there is "
                "nothing in its forward to put a map into."
            )
        return arrange_by_recipe(sites.parts, find_axes(call.layer.module), source.shape)


def arrange_by_evidence(call: Call, sites: Following) -> Arrangement:
    """As `arrange`, for a call that no recipe describes; remembered for calls of its class that go the same way.

    Raises:
        UnreadableError: evidence does not tell what it forms.
        NotEstablishedError: it would have to be looked for, inside of `deferring`.
    """
    module, known = call.layer.module, _KNOWN.setdefault(type(call.layer.module), {})
    key = (form_of(call.args, call.kwargs), sites.went)
    found = known.get(key)
    if found is None:
        if _deferred.get():
            raise NotEstablishedError
        while len(known) >= _MOST:
            known.pop(next(iter(known)), None)
        found = _establish(call, sites)
        if not isinstance(found, str) or not are_wrapped((*call.tensors, *call.state)):  # of others evidence may tell
            known[key] = found
    if not isinstance(found, str) and found.is_random and True not in call.modes.training:  # then random streams are set back
        found = "its map is made of random numbers"
    if isinstance(found, str):
        name = type(module).__qualname__.split(".<locals>.")[-1]
        advice = name_missing(module) or "describe its map with @hookattn.recipe."
        raise UnreadableError(f"{name}: {found}; {advice}")
    return found


def _establish(call: Call, sites: Following) -> Arrangement | str:
    try:
        return establish_axes(call.layer.module, call.args, call.kwargs, sites.way, as_called=sites.as_called)
    except UnreadableError as reason:
        return str(reason)
