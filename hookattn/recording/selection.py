"""Which modules of a model form attention maps: found by class, not by path."""

from __future__ import annotations

import fnmatch
import inspect
import operator
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import FunctionType
from typing import Any, NamedTuple, Union

import torch
from torch import nn

from ..errors import LayerNotFoundError, ModelError, UnreadableError, did_you_mean, explained, listed
from ..recipes.no_map import may_have_no_map, why_no_map
from ..recipes.registry import is_known, may_be_known

Named = Mapping[str, nn.Module]
"""All modules of a model by name, itself under ""."""
Layer = Union[str, int]
Layers = Union[None, Layer, Sequence[Layer], Callable[[str, nn.Module], bool]]
_NO_LIST = (str, bytes, type, nn.Module, torch.Tensor)
_SOFTMAXES = {"softmax", "log_softmax", "scaled_dot_product_attention"}
_LOOKS_LIKE_ATTENTION = re.compile(r"(Attention|Attn|MHSA|MHA|SHMA|SHSA|GPSA)")


class Found(NamedTuple):
    """The attention modules of a model, those that can be read and those that cannot.

    Attributes:
        readable: attention modules by name, in the order of `named_modules`.
        skipped: names of the others, each with its class and the reason why no map of it can be read.
    """

    readable: dict[str, nn.Module]
    skipped: dict[str, str]


def find_attention(named: Named) -> Found:
    """Find all attention of a model: what has a recipe, and the innermost modules whose class is named like attention."""
    # innermost: classes such as `ViTAttention` of transformers 4 wrap the module that forms the map
    # by class first: a model has hundreds of modules, of a few classes
    may_be = {cls for cls in {*map(type, named.values())} if _may_be_attention(cls)}
    named = {name or type(module).__name__: module for name, module in named.items() if type(module) in may_be}
    skipped = {name: reason for name, module in named.items() if (reason := why_no_map(module))}
    likely = {name: m for name, m in named.items() if name not in skipped and _is_attention(m)}
    inner = [*likely.values(), *(named[name] for name in skipped)]
    readable = {name: m for name, m in likely.items() if is_known(m) or not _holds_another(m, inner)}
    return Found(readable, skipped)


def choose(named: Named, layers: Layers) -> Found:
    """Choose the attention modules of a model that `layers` names, out of all its modules.

    Returns:
        What was found; nothing readable and nothing skipped if no class of the model is named like attention.

    Raises:
        ModelError: all attention of the model is of a kind that forms no map.
        LayerNotFoundError: a name, pattern or index fits nothing, or a name is that of a module around attention.
        UnreadableError: a name asks for a module that forms no readable map.
    """
    found, model = find_attention(named), named[""]
    if layers is None:
        if found.skipped and not found.readable:
            reasons = explained(f"{name!r}: {reason}" for name, reason in found.skipped.items())
            raise ModelError(f"{type(model).__name__} has no attention map that can be read. {reasons}")
        return found
    if callable(layers) and not isinstance(layers, (type, nn.Module)):
        chosen = [name for name, module in found.readable.items() if layers(name, module)]
        if not chosen:
            raise _nothing(model, found) if not found.readable else _none("layers= accepts none of", found)
    else:
        wanted = list(layers) if isinstance(layers, Iterable) and not isinstance(layers, _NO_LIST) else [layers]
        if not wanted:
            raise _none(f"layers={layers!r} names nothing. There is:", found)
        chosen = [name for layer in wanted for name in _named(named, found, layer)]
    modules = {**found.readable, **named}
    # in the order of the model, whatever that of `layers`, and each once: positions count in this order
    in_order = [name for name in modules if name in set(chosen)]
    return Found({name: modules[name] for name in in_order}, found.skipped)


def find_unnamed(named: Named) -> dict[str, str]:
    """Names of modules that may form a map though nothing names them attention, each with the `layers=` that reads it.

    Told by the code of their classes, which takes a softmax or calls SDPA; whether it weighs values shows when they run.
    """
    found = find_attention(named)
    known = [*found.readable, *found.skipped]
    unnamed = {}
    for name, module in named.items():
        inside = any(name == other or name.startswith(f"{other}.") for other in known)
        around = any(not name or other.startswith(f"{name}.") for other in known)
        if not inside and not around and _takes_a_softmax(type(module)):
            unnamed[name] = (
                f"{type(module).__name__}: it takes a softmax and is not named like attention; if that is a map, "
                f"layers=[..., {name!r}] reads it"
            )
    return unnamed


def _takes_a_softmax(cls: type[nn.Module]) -> bool:
    """Whether a method of a class, PyTorch's own apart, calls a softmax or SDPA."""
    if cls.__module__.partition(".")[0] == "torch":
        return False
    methods = [value for value in vars(cls).values() if isinstance(value, FunctionType)]
    return any(not _SOFTMAXES.isdisjoint(inspect.unwrap(method).__code__.co_names) for method in methods)


def _named(named: Named, found: Found, layer: Any) -> list[str]:
    """Names of the modules that one entry of `layers` stands for."""
    names = list(found.readable)
    if not isinstance(layer, str):
        layer = _position(layer)
        if not names:
            raise _nothing(named[""], found)
        if not -len(names) <= layer < len(names):
            raise LayerNotFoundError(
                f"there is no layer {layer}: the model has {len(names)} attention modules, 0 to {len(names) - 1}."
            )
        return [names[layer]]
    if layer in found.readable:
        return [layer]
    if layer in found.skipped:
        raise UnreadableError(f"{layer!r} has no map to read. {found.skipped[layer]}.")
    if layer and (module := named.get(layer)) is not None:
        inside = [name for name in names if name.startswith(f"{layer}.")]
        if inside and not _is_attention(module):
            raise LayerNotFoundError(
                f"{layer!r} is a {type(module).__name__}, and attention is inside: {listed(inside)}. Name that, or all of it, "
                f"{layer + '.*'!r}."
            )
        return [layer]
    matches = fnmatch.filter(names, layer)
    if not matches and not names:
        raise _nothing(named[""], found)
    if not matches:
        raise LayerNotFoundError(f"no attention module is called {layer!r}. {did_you_mean(layer, names)}")
    return matches


def _position(layer: Any) -> int:
    """The number that an entry of `layers` is, NumPy's too; an error if it is none."""
    # True would be layer 1; and tensors and arrays have an __index__, whatever their size
    if isinstance(layer, bool) or not hasattr(layer, "__index__") or bool(getattr(layer, "ndim", False)):
        what = f"the class {layer.__name__}" if isinstance(layer, type) else f"a {type(layer).__name__}"
        raise LayerNotFoundError(
            f"layers= takes names, positions, a list of these, or a predicate such as lambda name, module: ...; {what} names "
            "nothing."
        )
    return operator.index(layer)


def _none(what: str, found: Found) -> LayerNotFoundError:
    return LayerNotFoundError(f"{what} {listed(found.readable)}.")


def _nothing(model: nn.Module, found: Found) -> LayerNotFoundError:
    inside = f"only what forms no map ({listed(found.skipped)})" if found.skipped else "nothing"
    return LayerNotFoundError(
        f"layers= has nothing to choose from: {inside} in {type(model).__name__} is named like attention. Name modules as "
        "model.named_modules() does, layers=[...], or leave layers= out to have the first forward watched."
    )


def _is_attention(module: nn.Module) -> bool:
    return is_known(module) or _is_named_like_attention(type(module))


def _may_be_attention(cls: type) -> bool:
    return _is_named_like_attention(cls) or may_be_known(cls) or may_have_no_map(cls)


def _is_named_like_attention(cls: type) -> bool:
    name = cls.__name__  # what projects queries or keys is named after the attention that it belongs to
    return _LOOKS_LIKE_ATTENTION.search(name) is not None and not name.endswith("Projection")


def _holds_another(module: nn.Module, others: Iterable[nn.Module]) -> bool:
    inside = set(module.modules()) - {module}
    return any(other in inside for other in others)


def find_replaced(model: nn.Module, chosen: Mapping[str, nn.Module]) -> Iterator[str]:
    """Names of chosen modules under which another module stands in the model by now; one that was taken out is none."""
    for name, module in chosen.items():
        try:
            if model.get_submodule(name) is not module and module is not model:
                yield name
        except AttributeError:  # nothing stands there
            continue
