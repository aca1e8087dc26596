"""What a module was called with: what is kept of it, and the tensors in it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

_AS_THEY_ARE = frozenset({int, float, bool, str, type(None)})
# `_pytree` is undocumented, torch 2.6 to 2.15, and PyTorch has no public one. It opens what others have registered with it,
# such as the outputs of transformers.
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def keep_arguments(args: tuple[Any, ...], kwargs: dict[str, Any], *, detach: bool) -> tuple[Arguments, tuple[Tensor, ...]]:
    """Arguments of a call as they are kept, no copies but cut off from the graph if asked to; and the tensors among them.

    A cache of keys and values, which the call is about to fill, is kept as it is before: its tensors, in a copy of what holds
    them.
    """
    tensors: list[Tensor] = []
    # The usual call, bare tensors and numbers, is told without walking trees. The dict is copied all the same: a hook of
    # somebody else may be given it after ours, and put other values in.
    followed = False
    for value in (*args, *kwargs.values()) if kwargs else args:
        if type(value) is Tensor:
            tensors += (value,)  # no call of a method: this runs at every recorded call
            followed = followed or value.requires_grad
        elif type(value) not in _AS_THEY_ARE:
            break
    else:
        if not (detach and followed):
            return (args, {**kwargs}), tuple(tensors)
        values = [*args, *kwargs.values()]
        for tensor in tensors:
            if tensor.requires_grad:
                cut = tensor.detach()
                values = [cut if value is tensor else value for value in values]
        kwargs = dict(zip(kwargs, values[len(args) :]))
        return (tuple(values[: len(args)]), kwargs), tuple([a for a in values if type(a) is Tensor])
    args, kwargs = tuple([_kept(a) for a in args]), {name: _kept(a) for name, a in kwargs.items()}
    given = _detached((args, kwargs), {}) if detach else (args, kwargs)
    return given, tuple(tensors_in((*given[0], *given[1].values())))


def is_cache(value: Any) -> bool:
    """Whether an argument is one that a forward changes: a cache of keys and values, as transformers has them."""
    return callable(getattr(value, "update", None)) and not isinstance(value, (dict, set)) and hasattr(value, "__dict__")


def copy_structure(value: Any, copied: Callable[[Tensor], Tensor] | None = None, seen: dict[int, Any] | None = None) -> Any:
    """A copy of objects, lists, tuples and dicts one inside the other, what `copied` makes of tensors, else as it is."""
    seen = {} if seen is None else seen
    if id(value) in seen:
        return seen[id(value)]
    if isinstance(value, Tensor):
        return value if copied is None else copied(value)
    if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
        return type(value)([copy_structure(each, copied, seen) for each in value])
    if type(value) is dict:
        return {key: copy_structure(each, copied, seen) for key, each in value.items()}
    if isinstance(value, type) or callable(value) or not hasattr(value, "__dict__"):
        return value
    other = seen[id(value)] = copy.copy(value)
    for name, each in vars(value).items():
        object.__setattr__(other, name, copy_structure(each, copied, seen))
    return other


def tensors_in(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among some values and in the lists, tuples, dicts and caches among them."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple, dict)):
            yield from (leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor))
        elif is_cache(value):
            yield from _held_by(value, set())


def tensors_held_by(output: Any) -> list[Tensor]:
    """The tensors in what a module returned, be it a tree that PyTorch knows or an object of somebody's."""
    return [t for leaf in pytree.tree_leaves(output) for t in _held_by(leaf, set())]


def _held_by(value: Any, seen: set[int]) -> Iterator[Tensor]:
    """The tensors that an object holds, and the objects in it."""
    if isinstance(value, Tensor):
        yield value
    elif id(value) not in seen and not isinstance(value, type) and not callable(value):
        seen.add(id(value))
        for each in _parts_of(value):
            yield from _held_by(each, seen)


def _parts_of(value: Any) -> Iterable[Any]:
    if isinstance(value, (list, tuple)):
        return value
    return value.values() if isinstance(value, dict) else getattr(value, "__dict__", {}).values()


def _kept(value: Any) -> Any:
    return copy_structure(value) if is_cache(value) else value


def _detached(value: Any, once: dict[int, Tensor]) -> Any:
    """The same cut off from the graph, each tensor once: some forwards ask whether queries and keys are made of one tensor."""
    if isinstance(value, Tensor):
        if not value.requires_grad:
            return value
        if id(value) not in once:
            once[id(value)] = value.detach()
        return once[id(value)]
    # `type(...) is`: named tuples, ordered dicts and outputs of transformers are more than their items, and go to `_pytree`
    if isinstance(value, tuple) and type(value) is tuple:
        return tuple([_detached(v, once) for v in value])
    if type(value) is dict:
        return {k: _detached(v, once) for k, v in value.items()}
    if isinstance(value, (list, tuple, dict)):
        return pytree.tree_map_only(Tensor, lambda v: _detached(v, once), value)
    return value
