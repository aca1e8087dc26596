"""What a module was called with: what is kept of it, and the tensors in it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

_AS_THEY_ARE = frozenset({int, float, bool, str, type(None)})
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def keep_arguments(args: tuple[Any, ...], kwargs: dict[str, Any], *, detach: bool) -> tuple[Arguments, tuple[Tensor, ...]]:
    """The arguments themselves, no copies, or cut off from the graph; and the tensors among them."""
    tensors: list[Tensor] = []
    for value in (*args, *kwargs.values()):
        if type(value) is Tensor and not (detach and value.requires_grad):
            tensors.append(value)
        elif type(value) not in _AS_THEY_ARE:
            break
    else:
        return (args, {**kwargs}), tuple(tensors)
    given = (_detached(args), _detached(kwargs)) if detach else (args, {**kwargs})
    return given, tuple(tensors_in((*given[0], *given[1].values())))


def tensors_in(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among some values and in the lists, tuples and dicts among them."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple, dict)):
            yield from (leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor))


def _detached(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach() if value.requires_grad else value
    if isinstance(value, tuple) and type(value) is tuple:
        return tuple([_detached(v) for v in value])
    if type(value) is dict:
        return {k: _detached(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, dict)):
        return pytree.tree_map(lambda v: v.detach() if isinstance(v, Tensor) else v, value)
    return value
