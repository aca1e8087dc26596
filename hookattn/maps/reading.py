"""Read a captured call: by the recipe of its class, or by replay."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from ..attention.sources import Source
from ..calls.call import Call
from ..calls.restore import restoring
from ..errors import UnreadableError
from ..recipes.registry import find_recipe
from .replay import replayed


def source_of(call: Call) -> Source:
    """Queries and keys of a call, by recipe or by replay; its modes are the caller's business."""
    with naming(call), ExitStack() as stack:
        if any(call.modes.training):  # dropout and power iterations within the projections
            stack.enter_context(restoring(call.target.module))
            call.restore_random_streams()
        return _described(call) or replayed(call.target.module, *call.args, **call.kwargs)


def described(call: Call) -> Source | None:
    """Queries and keys of a call by recipe; None where there is none, or none for such a call."""
    with naming(call):
        return _described(call)


def _described(call: Call) -> Source | None:
    if any(t.is_nested for t in call.tensors):
        raise UnreadableError("it was called with nested tensors; make the encoder with enable_nested_tensor=False.")
    recipe = find_recipe(call.target.module)
    source = NotImplemented if recipe is None else recipe(call.target.module, *call.args, **call.kwargs)
    return None if source is NotImplemented else source


@contextmanager
def naming(call: Call) -> Iterator[None]:
    """Whatever cannot be read is named."""
    try:
        yield
    except UnreadableError as error:
        raise UnreadableError(f"{call.target.name!r}: {error}") from None


def form_of(call: Call) -> Source:
    """The same for its shapes alone: a recipe runs on tensors without values, a replay runs as it is."""
    call.check_fresh()
    hooked = any(call.target.hooks)  # hooks of others, which expect values
    if find_recipe(call.target.module) is not None and not hooked and not any(call.modes.training):
        bare = pytree.tree_map_only(Tensor, Tensor.detach, (call.args, call.kwargs))
        with FakeTensorMode(allow_non_fake_inputs=True) as fake:
            bare = pytree.tree_map_only(Tensor, fake.from_tensor, bare)
            shapes = call._replace(args=bare[0], kwargs=bare[1], modes=call.modes._replace(grad=False))
            with shapes.in_its_modes():
                if (source := described(shapes)) is not None:
                    return source
    with call.in_its_modes():
        return source_of(call)
