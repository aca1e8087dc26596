"""An attention module of a model, and what has to be looked at each time it is called."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module
from torch.nn.modules.batchnorm import _NormBase  # undocumented, torch 2.6 to 2.14: what batch and instance norms derive from

from ..conditions.changes import SAMPLES, Samples, Steps, counted_steps, stamps, stamps_of_arguments
from .arguments import tensors_in
from .hooks import is_ours
from .restore import INTERNAL, copied
from .staleness import is_number, structure_of


class Layer(NamedTuple):
    """An attention module that is recorded, and what has to be looked at each time it is called.

    Looked up once, since to walk a module costs many times what a recorded call does. The dicts it refers to (`_parameters`,
    `_buffers`, `_modules`, `_forward_hooks`, `_forward_pre_hooks` of each module, undocumented, torch 2.6 to 2.14) are those of
    the modules themselves, and so show what has become of them.

    Attributes:
        trunk: the part of the model that cuts the image for it, where that is known.
        block: the block around it that cuts windows, if there is one.
        inner: the module and all below it.
        state: its parameters and buffers by name, all but the statistics.
        statistics: running statistics by name, each with its norm: a norm reads them unless it is in train mode, where it
            moves them.
        moving: small buffers of other modules, such as the vectors of a spectral norm: a module, the name of the buffer. In
            train mode a forward may move them, so a call holds copies.
        slots: where each parameter and buffer hangs: a dict of a module, the key, the tensor or None.
        parts: the same and where each submodule, number and forward of an instance's own hangs.
        bare: attributes of the modules that have no forward of their own.
        forward: the forward of the class of the module.
        caches: attributes that a forward may fill or replace, such as a cache of biases: a module's attributes, the name, and
            None, as `mutable_now` has it while it is empty.
        hooks: dicts of the hooks of all modules below this one, and of those of all modules.
        structure: what `structure_of` gave when all this was looked up.
    """

    name: str
    module: nn.Module
    trunk: nn.Module | None
    block: nn.Module | None
    inner: tuple[nn.Module, ...]
    state: tuple[tuple[str, Tensor], ...]
    statistics: tuple[tuple[str, Tensor, nn.Module], ...]
    moving: tuple[tuple[str, nn.Module, str], ...]
    slots: tuple[tuple[dict[str, Any], str, Tensor | None], ...]
    parts: tuple[tuple[dict[str, Any], str, Any], ...]
    bare: tuple[dict[str, Any], ...]
    forward: Any
    samples: Samples
    caches: tuple[tuple[dict[str, Any], str, None], ...]
    hooks: tuple[dict[int, Any], ...]
    structure: list[Any]
    steps: Steps

    def state_now(self) -> tuple[tuple[str, Tensor], ...]:
        """Parameters and buffers that a call made now reads as they are, by name; to be compared when its map is read."""
        # A norm in train mode moves its statistics, and reads those of its batch: they must not make its map stale. Buffers
        # that a forward in train mode may move are held as copies, see `mutable_now`.
        if not self.statistics and not self.moving:
            return self.state
        still = [(name, tensor) for name, tensor, norm in self.statistics if not norm.training]
        still += [(path, b) for path, m, name in self.moving if not m.training and (b := m._buffers[name]) is not None]
        return (*self.state, *still)

    def mutable_now(self) -> tuple[tuple[dict[str, Any], str, Any], ...]:
        """Caches and moving buffers as they are before a call, which may change them: a dict, the key, a copy of the value."""
        # Copies of dicts and lists are shallow: a forward puts tensors in and takes some out, and a tensor that is written
        # into is told by its version.
        held: list[tuple[dict[str, Any], str, Any]] = []
        for empty in self.caches:
            holder, name, _ = empty
            held.append(empty if (value := holder.get(name)) is None else (holder, name, copied(value)))
        moved = [(m._buffers, name, m._buffers[name]) for _, m, name in self.moving if m.training]
        return (*held, *[(holder, name, buffer.clone()) for holder, name, buffer in moved if buffer is not None])

    def refreshed(self) -> Layer:
        """This layer, or one looked up anew if somebody has swapped tensors, wrapped layers or set numbers of the module."""
        return self if self._is_as_it_was() else look_up(*self[:4])

    def _is_as_it_was(self) -> bool:
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


def look_up(name: str, module: nn.Module, trunk: nn.Module | None = None, block: nn.Module | None = None) -> Layer:
    """Look up what every call of a module will need, when it is hooked and whenever it has become another one."""
    inner = tuple(module.modules())
    norms = [(f"{prefix}.", m) if prefix else ("", m) for prefix, m in module.named_modules() if isinstance(m, _NormBase)]
    statistics = tuple((prefix + name, b, norm) for prefix, norm in norms for name, b in norm.named_buffers(recurse=False))
    moving = tuple(_moving_buffers(module))
    apart = {name for name, _, _ in (*statistics, *moving)}
    named = [*module.named_parameters(), *module.named_buffers()]
    state = tuple((n, tensor) for n, tensor in named if n not in apart)
    samples = Samples(module.parameters())
    holders: list[dict[str, Any]] = [holder for m in inner for holder in (m._parameters, m._buffers)]
    slots = tuple((holder, key, tensor) for holder in holders for key, tensor in holder.items())
    parts: list[tuple[dict[str, Any], str, Any]] = [*slots]
    parts += [(vars(m), name, value) for m in inner for name, value in vars(m).items() if is_number(name, value)]
    parts += [(m._modules, name, child) for m in inner for name, child in m._modules.items()]
    parts += [(vars(m), "forward", vars(m)["forward"]) for m in inner if "forward" in vars(m)]
    # "forward" of an instance: accelerate, for one, patches it there, and the recipe of the class no longer holds
    bare = tuple(vars(m) for m in inner if "forward" not in vars(m))
    caches = tuple((vars(m), name, None) for m in inner for name, v in vars(m).items() if name not in INTERNAL and _is_cache(v))
    # [1:], since hooks on the module itself run outside of what is read
    below = [hooks for m in inner[1:] for hooks in (m._forward_hooks, m._forward_pre_hooks)]
    everywhere = (nn_module._global_forward_hooks, nn_module._global_forward_pre_hooks)
    return Layer(
        name=name,
        module=module,
        trunk=trunk,
        block=block,
        inner=inner,
        state=state,
        statistics=statistics,
        moving=moving,
        slots=slots,
        parts=tuple(parts),
        bare=bare,
        forward=type(module).forward,
        samples=samples,
        caches=caches,
        hooks=(*below, *everywhere),
        structure=structure_of(inner, caches),
        steps=counted_steps(),
    )


def _moving_buffers(module: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    # What moves cannot be told from outside. Large buffers (tables of positions, masks) are taken for constants, whose version
    # tells if they are none; copies of them at every call in train mode would be too dear.
    for prefix, m in module.named_modules():
        if not isinstance(m, _NormBase):
            for name, buffer in m.named_buffers(recurse=False):
                if buffer.numel() <= SAMPLES:
                    yield (f"{prefix}.{name}" if prefix else name), m, name


def stamps_of(
    layer: Layer, tensors: tuple[Tensor, ...], state: tuple[tuple[str, Tensor], ...], held: tuple[Any, ...]
) -> tuple[Any, ...]:
    """Stamps of a call: one for each argument and each tensor of the state, then of caches, of some values and of hooks.

    `Call.check_fresh` names what has changed by their order.
    """
    if torch._C._len_torch_function_stack():  # undocumented, torch 2.6 to 2.14; modes of the user's see nothing of it
        with torch._C.DisableTorchFunction():
            return _stamps_of(layer, tensors, state, held)
    return _stamps_of(layer, tensors, state, held)


def _stamps_of(
    layer: Layer, tensors: tuple[Tensor, ...], state: tuple[tuple[str, Tensor], ...], held: tuple[Any, ...]
) -> tuple[Any, ...]:
    hooks, steps = _hooks_of_others(layer), layer.steps
    filled = [value for _, _, value in held if value is not None]
    cached = list(tensors_in(filled)) if filled else filled
    arguments, read = stamps_of_arguments(tensors, steps), stamps([t for _, t in state], steps)
    return (
        *arguments,
        *read,
        stamps(cached, steps) if cached else cached,
        layer.samples.take([at for _, at, _ in read]),
        hooks,
    )


def _hooks_of_others(layer: Layer) -> list[int]:
    """Ids of the hooks below a module that others have put on, which may change what is read; a recorder's do not."""
    if not any(layer.hooks):
        return []
    return [id(hook) for hooks in layer.hooks if hooks for hook in list(hooks.values()) if not _only_looks_on(hook)]


def _only_looks_on(hook: Any) -> bool:
    """Whether a hook changes nothing: a recorder's, or one of PyTorch's own observers, such as FlopCounterMode has."""
    return is_ours(hook) or str(getattr(hook, "__module__", "")).startswith("torch.utils.")


def _is_cache(value: Any) -> bool:
    """Whether an attribute holds what a forward may fill or replace."""
    return value is None or isinstance(value, (dict, list, set, tuple, Tensor))
