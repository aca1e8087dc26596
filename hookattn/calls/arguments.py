"""What a module was called with: what is kept of it, and the tensors in it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

_AS_THEY_ARE = frozenset({int, float, bool, str, type(None)})
# `_pytree` is undocumented, torch 2.6 to 2.14, and PyTorch has no public one. It opens what others have registered with it,
# such as the outputs of transformers.
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def keep_arguments(args: tuple[Any, ...], kwargs: dict[str, Any], *, detach: bool) -> tuple[Arguments, tuple[Tensor, ...]]:
    """Arguments of a call as they are kept, no copies but cut off from the graph if asked to; and the tensors among them."""
    tensors: list[Tensor] = []
    # The usual call, bare tensors and numbers, is told without walking trees. The dict is copied all the same: a hook of
    # somebody else may be given it after ours, and put other values in.
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
    # `type(...) is`: named tuples, ordered dicts and outputs of transformers are more than their items, and go to `_pytree`
    if isinstance(value, tuple) and type(value) is tuple:
        return tuple([_detached(v) for v in value])
    if type(value) is dict:
        return {k: _detached(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, dict)):
        return pytree.tree_map(lambda v: v.detach() if isinstance(v, Tensor) else v, value)
    return value
