"""Where a map comes from: a captured call, read by recipe or by replay; a tensor that was kept; or nowhere, and why."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import cached_property
from typing import Union

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from ..attention.sources import Dense, Source
from ..calls.call import Call
from ..calls.restore import restoring
from ..conditions.function_modes import SDPA
from ..conditions.transforms import is_left_behind
from ..errors import RecorderError, UnreadableError
from ..recipes.registry import find_recipe
from .lazy import Spec
from .replay import replayed


class Captured:
    """A map that is computed from a captured call each time it is sliced."""

    def __init__(self, call: Call) -> None:
        self.call = call

    @contextmanager
    def open(self) -> Iterator[Source]:
        """Queries and keys of the call, in its modes for as long as the block lasts."""
        with self.call.resumed():
            yield source_of(self.call)

    @cached_property
    def spec(self) -> Spec:
        """Shape, dtype and device of the map; looked up once, without computing it where its module has a recipe."""
        source = _source_of_shapes(self.call)
        return Spec(source.shape, source.dtype, self.call.x.device)


class Kept:
    """A map that was computed while the model ran; the call was let go."""

    def __init__(self, name: str, attention: Tensor) -> None:
        self._name, self._attention = name, attention
        self.spec = Spec(Dense(attention).shape, attention.dtype, attention.device)

    @contextmanager
    def open(self) -> Iterator[Source]:
        """The map as it was kept."""
        if is_left_behind(self._attention):
            raise UnreadableError(
                f"{self._name!r} ran under torch.vmap, which has returned; return m[...] from what is mapped."
            )
        yield Dense(self._attention)

    @property
    def call(self) -> Call:
        """Always raises: the call was let go."""
        raise RecorderError(f'the input of {self._name!r} was let go; record with AttentionRecorder(model, keep="inputs").')


class Lost:
    """A map that should have been computed while the model ran, and could not be, for the reason given."""

    def __init__(self, name: str, reason: str) -> None:
        self._name, self._reason = name, reason

    def open(self) -> AbstractContextManager[Source]:
        """Always raises, with the reason."""
        raise UnreadableError(self._reason)

    @property
    def spec(self) -> Spec:
        """Always raises, with the reason."""
        raise UnreadableError(self._reason)

    @property
    def call(self) -> Call:
        """Always raises: the call was let go."""
        raise RecorderError(f'the input of {self._name!r} was let go; record with AttentionRecorder(model, keep="inputs").')


Origin = Union[Captured, Kept, Lost]
"""Where a map comes from."""


def source_of(call: Call) -> Source:
    """Make what the map of a call is computed from, by recipe or by replay; the modes of the call are on already."""
    with name_in_errors(call), ExitStack() as stack:
        # In train mode a projection may have dropout in it (LoRA) or take a step of its own (spectral norm).
        if any(call.modes.training):
            stack.enter_context(restoring(call.layer.module))
            call.restore_random_streams()
        return _by_recipe(call) or replayed(call.layer.module, *call.args, **call.kwargs)


def source_by_recipe(call: Call) -> Source | None:
    """Queries and keys of a call by recipe; None where its class has none, or one that declines such a call."""
    with name_in_errors(call):
        return _by_recipe(call)


def _by_recipe(call: Call) -> Source | None:
    if any(t.is_nested for t in call.tensors):
        raise UnreadableError("it was called with nested tensors; make the encoder with enable_nested_tensor=False.")
    # a recipe leaves out what it does not need, so it does not show what the user's modes, or an SDPA of theirs, make of it
    as_written = not call.modes.functions and call.modes.sdpa is SDPA
    recipe = find_recipe(call.layer.module) if as_written else None
    source = NotImplemented if recipe is None else recipe(call.layer.module, *call.args, **call.kwargs)
    return None if source is NotImplemented else source


@contextmanager
def name_in_errors(call: Call) -> Iterator[None]:
    """Put the name of the layer before the reason why something in the block cannot be read."""
    try:
        yield
    except UnreadableError as error:
        # from None: the traceback of the error would keep what the module was called with
        raise UnreadableError(f"{call.layer.name!r}: {error}") from None


def _source_of_shapes(call: Call) -> Source:
    """As `source_of`, for shape and dtype alone: a recipe runs on tensors without values, which costs no arithmetic."""
    call.check_fresh()
    hooked = any(call.layer.hooks)  # hooks of others expect values
    # A replay needs values as well, since forwards branch on them, and so does train mode, with the random streams of the call.
    if find_recipe(call.layer.module) is not None and not hooked and not any(call.modes.training):
        bare = pytree.tree_map_only(Tensor, Tensor.detach, (call.args, call.kwargs))
        # Undocumented, torch 2.6 to 2.14: tensors with shape, dtype and device that know what comes of any operator. Parameters
        # stay what they are (`allow_non_fake_inputs`), since the recipe takes them from the module.
        with FakeTensorMode(allow_non_fake_inputs=True) as fake:
            bare = pytree.tree_map_only(Tensor, fake.from_tensor, bare)
            shapes = call._replace(args=bare[0], kwargs=bare[1], modes=call.modes._replace(grad=False))
            with shapes.in_its_modes():
                if (source := source_by_recipe(shapes)) is not None:
                    return source
    with call.in_its_modes():
        return source_of(call)
