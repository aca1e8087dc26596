"""An attention module of a model, and what has to be looked at each time it is called."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.modules import module as nn_module
from torch.nn.modules.batchnorm import _NormBase  # undocumented, torch 2.6 to 2.15: what batch and instance norms derive from

from ..conditions.changes import SAMPLES, Stamps, Steps, counted_steps, stamps, values_of_arguments
from ..conditions.modules import walk
from ..conditions.samples import Samples
from .arguments import tensors_in
from .hooks import is_ours
from .restore import INTERNAL, copied
from .staleness import PLAIN, Structure, structure_of

Held = tuple[tuple[dict[str, Any], str, Any], ...]
"""What hung where when a call was made: the dict, the key, the value."""
_CACHES = frozenset({type(None), dict, list, set, tuple})


class Layer(NamedTuple):
    """An attention module that is recorded, and what has to be looked at each time it is called.

    Looked up once, since to walk a module costs many times what a recorded call does. The dicts it refers to (`_parameters`,
    `_buffers`, `_modules`, `_forward_hooks`, `_forward_pre_hooks` of each module, undocumented, torch 2.6 to 2.15) are those of
    the modules themselves, and so show what has become of them.

    Attributes:
        trunk: the part of the model that cuts the image for it, where that is known.
        block: the block around it that cuts windows, if there is one.
        inner: the module and all below it.
        classes: of these.
        attributes: of each of these.
        state: names of its parameters and buffers, all but the statistics.
        tensors: these parameters and buffers.
        all_state, all_tensors: the same with statistics and moving buffers: parameters and buffers that a call in eval mode
            reads as they are, names and tensors; to be compared when it is read.
        statistics: running statistics by name, each with its norm: a norm reads them unless it is in train mode, where it
            moves them.
        moving: small buffers of other modules, such as the vectors of a spectral norm: a module, the name of the buffer. In
            train mode a forward may move them, so a call holds copies.
        slots: where each parameter and buffer hangs: a dict of a module, the key, the tensor or None.
        parts: the same and where each submodule, number and forward of an instance's own hangs.
        things: the same of what is none of these and no cache, such as functions.
        sized: the dicts that things hang in, in which there may be more of them later.
        sizes: of these.
        bare: attributes of the modules that have no forward of their own.
        forward: the forward of the class of the module.
        caches: attributes that a forward may fill or replace, such as a cache of biases: a module's attributes, the name, and
            what `mutable_now` has of it as long as nothing does: None, or a tuple of numbers and words.
        hooks: dicts of the hooks of all modules below this one, and of those of all modules.
        structure: what `structure_of` gave when all this was looked up.
    """

    name: str
    module: nn.Module
    trunk: nn.Module | None
    block: nn.Module | None
    inner: tuple[nn.Module, ...]
    classes: list[type]
    attributes: tuple[dict[str, Any], ...]
    state: tuple[str, ...]
    tensors: tuple[Tensor, ...]
    all_state: tuple[str, ...]
    all_tensors: tuple[Tensor, ...]
    statistics: tuple[tuple[str, Tensor, nn.Module], ...]
    moving: tuple[tuple[str, nn.Module, str], ...]
    slots: Held
    parts: Held
    things: Held
    sized: tuple[dict[str, Any], ...]
    sizes: list[int]
    bare: tuple[dict[str, Any], ...]
    forward: Any
    samples: Samples
    caches: Held
    hooks: tuple[dict[int, Any], ...]
    structure: Structure
    steps: Steps

    def state_in_training(self) -> tuple[tuple[str, ...], tuple[Tensor, ...]]:
        """`all_state` and `all_tensors` but what a call made now, with a module in train mode, does not read as it is."""
        # A norm in train mode moves its statistics, and reads those of its batch: they must not make its map stale. Buffers
        # that a forward in train mode may move are held as copies, see `mutable_now`.
        still = [(name, tensor) for name, tensor, norm in self.statistics if not norm.training]
        still += [(path, b) for path, m, name in self.moving if not m.training and (b := m._buffers[name]) is not None]
        return (*self.state, *[name for name, _ in still]), (*self.tensors, *[tensor for _, tensor in still])

    def mutable_now(self, *, in_eval: bool) -> Held:
        """Caches and moving buffers as they are before a call, which may change them: a dict, the key, a copy of the value."""
        if self.moving and not in_eval:
            return self._filled_now()
        for holder, name, usual in self.caches:
            if name not in holder or holder[name] is not usual:
                return self._filled_now()
        return self.caches  # the usual call: all that could be filled is empty

    def _filled_now(self) -> Held:
        # Copies of dicts and lists are shallow: a forward puts tensors in and takes some out, and a tensor that is written
        # into is told by its version.
        held = [(holder, name, copied(holder.get(name))) for holder, name, _ in self.caches]
        moved = [(m._buffers, name, m._buffers[name]) for _, m, name in self.moving if m.training]
        return (*held, *[(holder, name, buffer.clone()) for holder, name, buffer in moved if buffer is not None])

    def is_as_it_was(self) -> bool:
        """Whether all that hung in the modules still does; not whether there is more."""
        # by the dicts that things hang in: `getattr` of a parameter goes through Module.__getattr__, in Python
        if type(self.module).forward is not self.forward:
            return False
        for attributes in self.bare:  # a loop, since it runs at every call and costs half of what any(...) does
            if "forward" in attributes:
                return False
        try:
            for holder, key, value in self.parts:
                if holder[key] is not value:
                    return False
        except KeyError:
            return False
        return True

    def has_changed(self, held: Held) -> bool:
        """Whether a layer, a forward or a number of the module is another one than when a call was made that held this."""
        # What is the very same needs no closer look. Caches are put back when the call is read, whatever they are now.
        is_same = type(self.module) is self.structure.cls and self.is_as_it_was()
        if is_same and [*map(len, self.sized)] == self.sizes:
            for attributes, name, value in self.things:
                if attributes.get(name) is not value:
                    break
            else:
                return False
        return structure_of(self.inner, held) != self.structure


class _Looking:
    """What is gathered of the modules of a layer, one after the other."""

    def __init__(self, structure: Structure) -> None:
        self.structure = structure
        self.state: dict[int, tuple[str, Tensor]] = {}  # each tensor once, under the first of its names
        self.statistics: list[tuple[str, Tensor, nn.Module]] = []
        self.moving: list[tuple[str, nn.Module, str]] = []
        self.slots: list[tuple[dict[str, Any], str, Any]] = []
        self.parts: list[tuple[dict[str, Any], str, Any]] = []
        self.things: list[tuple[dict[str, Any], str, Any]] = []
        self.caches: list[tuple[dict[str, Any], str, Any]] = []

    def look_at(self, number: int, prefix: str, module: nn.Module) -> None:
        """Gather what a module has."""
        attributes = module.__dict__
        parameters, buffers, children = attributes["_parameters"], attributes["_buffers"], attributes["_modules"]
        if parameters:
            self.slots += [(parameters, key, parameters[key]) for key in parameters]
            for key in parameters:
                if (parameter := parameters[key]) is not None:
                    self.state.setdefault(id(parameter), (prefix + key, parameter))
        if buffers:
            self.slots += [(buffers, key, buffers[key]) for key in buffers]
            self._look_at_buffers(prefix, module)
        if numbers := self.structure.numbers[number]:
            self.parts += [(attributes, name, numbers[name]) for name in numbers]
        if children:
            self.parts += [(children, name, children[name]) for name in children]
        if "forward" in attributes:
            self.parts.append((attributes, "forward", attributes["forward"]))
        for name in attributes.keys() - INTERNAL - numbers.keys():
            value = attributes[name]
            if type(value) in _CACHES or isinstance(value, (dict, list, set, tuple, Tensor)):
                self.caches.append((attributes, name, value if type(value) is tuple and _is_plain(value) else None))
            else:
                self.things.append((attributes, name, value))

    def _look_at_buffers(self, prefix: str, module: nn.Module) -> None:
        # What moves cannot be told from outside. Large buffers (tables of positions, masks) are taken for constants, whose
        # version tells if they are none; copies of them at every call in train mode would be too dear.
        for key, buffer in module._buffers.items():
            if buffer is None:
                continue
            if isinstance(module, _NormBase):
                self.statistics.append((prefix + key, buffer, module))
            elif buffer.numel() <= SAMPLES:
                self.moving.append((prefix + key, module, key))
            else:
                self.state.setdefault(id(buffer), (prefix + key, buffer))


def _is_plain(values: tuple[Any, ...]) -> bool:
    return all(type(each) in PLAIN for each in values)


def look_up(name: str, module: nn.Module, trunk: nn.Module | None = None, block: nn.Module | None = None) -> Layer:
    """Look up what every call of a module will need, when it is hooked and whenever it has become another one."""
    named = walk(module)
    inner = tuple(named.values())
    attributes = tuple([m.__dict__ for m in inner])
    found = _Looking(structure := structure_of(inner, ()))
    for number, (path, m) in enumerate(named.items()):
        found.look_at(number, f"{path}." if path else "", m)
    structure.leave_out(found.caches, attributes)
    names, tensors = zip(*found.state.values()) if found.state else ((), ())
    apart = {path: buffer for path, buffer, _ in found.statistics}
    apart |= {path: buffer for path, m, name in found.moving if (buffer := m._buffers[name]) is not None}
    # "forward" of an instance: accelerate, for one, patches it there, and the recipe of the class no longer holds
    bare = tuple([each for each in attributes if "forward" not in each])
    # [1:], since hooks on the module itself run outside of what is read
    below = [each[hooks] for each in attributes[1:] for hooks in ("_forward_hooks", "_forward_pre_hooks")]
    sized = (*attributes, *[each[kind] for each in attributes for kind in ("_parameters", "_buffers", "_modules")])
    return Layer(
        name=name,
        module=module,
        trunk=trunk,
        block=block,
        inner=inner,
        classes=[*map(type, inner)],
        attributes=attributes,
        state=names,
        tensors=tensors,
        all_state=(*names, *apart),
        all_tensors=(*tensors, *apart.values()),
        statistics=tuple(found.statistics),
        moving=tuple(found.moving),
        slots=tuple(found.slots),
        parts=(*found.slots, *found.parts),
        things=tuple(found.things),
        sized=sized,
        sizes=[*map(len, sized)],
        bare=bare,
        forward=type(module).forward,
        samples=Samples(tensors),
        caches=tuple(found.caches),
        hooks=(*below, nn_module._global_forward_hooks, nn_module._global_forward_pre_hooks),
        structure=structure,
        steps=counted_steps(),
    )


def stamps_of(
    layer: Layer, tensors: tuple[Tensor, ...], state: tuple[Tensor, ...], held: Held, sampled: bool
) -> tuple[Any, ...]:
    """What tells a change: stamps of arguments and of the state, values of both, stamps of caches, hooks of others.

    Values of parameters that take a kernel to look at are left out unless `sampled`. `name_changes` names what has changed by
    their order. Modes of the user's should see nothing of it.
    """
    read = stamps((*tensors, *state), layer.steps)
    return read, *values_of(layer, tensors, read, held, sampled)


def values_of(layer: Layer, tensors: tuple[Tensor, ...], read: Stamps, held: Held, sampled: bool) -> tuple[Any, ...]:
    """The rest of `stamps_of`, for which memory is looked at; `read` are stamps of arguments and of the state."""
    hooks: list[int] = []
    for each in layer.hooks:  # as in `is_as_it_was`
        if each:
            hooks = _hooks_of_others(layer.hooks)
            break
    if held is layer.caches:  # as they hang there while nothing fills them
        cached = None
    else:
        cached = stamps([*tensors_in([value for _, _, value in held if value is not None])], layer.steps)
    given = values_of_arguments(tensors, read[0], read[1])
    return given, layer.samples.take(read[1][len(tensors) :], sampled), cached, hooks


def name_changes(names: Sequence[str], before: tuple[Any, ...], now: tuple[Any, ...]) -> list[str]:
    """What has changed between two stamps of a call; `names` are those of its arguments and, behind them, of its state."""
    changed = [name for name, *stamp in zip(names, *before[0], *now[0]) if stamp[:3] != stamp[3:]]
    changed += ["a cache inside the module"] * (before[3] != now[3]) + ["hooks inside the module"] * (before[4] != now[4])
    # that values differ is told only where nothing else is: whoever stepped or wrote has changed them as well
    return changed or ["x" if before[1] != now[1] else "values of parameters"]


def _hooks_of_others(held: tuple[dict[int, Any], ...]) -> list[int]:
    """Ids of the hooks below a module that others have put on, which may change what is read; a recorder's do not."""
    return [id(hook) for hooks in held if hooks for hook in list(hooks.values()) if not _only_looks_on(hook)]


def _only_looks_on(hook: Any) -> bool:
    """Whether a hook changes nothing: a recorder's, or one of PyTorch's own observers, such as FlopCounterMode has."""
    return is_ours(hook) or str(getattr(hook, "__module__", "")).startswith("torch.utils.")
