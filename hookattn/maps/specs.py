"""Shape, dtype and device of maps that are not computed, remembered by the sizes of what their modules are called with."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from ..calls.call import Call
from ..calls.staleness import PLAIN, Structure
from ..conditions.function_modes import SDPA
from ..recipes.registry import find_recipe
from .established import source_by_recipe
from .lazy import Spec


def needs_values(call: Call) -> bool:
    """Whether shape, dtype and device of a map are not to be had without running what looks at values."""
    # A replay needs values, since forwards branch on them, and so do hooks of others and train mode, with its random streams.
    return find_recipe(call.layer.module) is None or any(call.layer.hooks) or any(call.modes.training)


def known_spec(call: Call) -> Spec | None:
    """Shape, dtype and device of a map, if they are remembered of an earlier call with arguments of the same sizes."""
    return _specs_of(call).get(_sizes_of(call))


def spec_without_values(call: Call) -> Spec | None:
    """The same by recipe, remembered for calls of the module with arguments of the same sizes; None where it declines one."""
    if (key := _sizes_of(call)) is None:
        return _spec_by_recipe(call)
    if key not in (known := _specs_of(call)):
        while len(known) >= _MOST:
            known.pop(next(iter(known)), None)
        known[key] = _spec_by_recipe(call)
    return known[key]


def _specs_of(call: Call) -> dict[Any, Spec | None]:
    structure, known = _SPECS.get(call.layer.module, (None, {}))
    if structure != call.layer.structure:  # it has become another module
        _, known = _SPECS[call.layer.module] = call.layer.structure, {}
    return known


_MOST = 64  # sizes of arguments that are remembered of a module
_SPECS: WeakKeyDictionary[nn.Module, tuple[Structure, dict[Any, Spec | None]]] = WeakKeyDictionary()


def _sizes_of(call: Call) -> Any:
    """All that a recipe sees of a call without values; None where it is given more than tensors, numbers and words."""
    modes = call.modes
    try:
        sizes = [*map(_size_of, (*call.args, *call.kwargs.values()))]
        held = None if call.held is call.layer.caches else tuple([(name, _size_of(value)) for _, name, value in call.held])
    except TypeError:
        return None
    state = [(tensor.shape, tensor.dtype) for tensor in call.state]
    key = len(call.args), tuple(call.kwargs), tuple(sizes), held, tuple(state), modes.autocast, modes.sdpa is SDPA
    return None if modes.functions else key


def _size_of(value: Any) -> Any:
    """A tensor by its size, all else by what it is, to be compared; a TypeError for what is more than that."""
    if type(value) in _TENSORS:
        return value.shape, value.dtype, value.device
    if type(value) in _PLAIN:
        return value
    if type(value) in (tuple, list, torch.Size):  # a grid, in most
        return type(value), tuple(map(_size_of, value))
    if type(value) is dict:  # a cache, by device or by resolution
        return tuple(map(_size_of, value)), tuple(map(_size_of, value.values()))
    raise TypeError


_TENSORS = frozenset({Tensor, nn.Parameter})
_PLAIN = frozenset({*PLAIN, type(None)})


def _spec_by_recipe(call: Call) -> Spec | None:
    """What a recipe makes of tensors that have a shape and no values, which costs no arithmetic."""
    bare = pytree.tree_map_only(Tensor, Tensor.detach, (call.args, call.kwargs))
    # Undocumented, torch 2.6 to 2.15: tensors with shape, dtype and device that know what comes of any operator. Parameters
    # stay what they are (`allow_non_fake_inputs`), since the recipe takes them from the module.
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        bare = pytree.tree_map_only(Tensor, fake.from_tensor, bare)
        shapes = call._replace(args=bare[0], kwargs=bare[1], modes=call.modes._replace(grad=False))
        with shapes.in_its_modes():
            source = source_by_recipe(shapes)
    return None if source is None else Spec(source.shape, source.dtype, call.x.device)
