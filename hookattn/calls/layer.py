"""An attention module of a model, and what has to be looked at each time it is called."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from ..conditions.changes import SAMPLES, Samples, Steps, counted_steps, stamps, stamps_of_arguments
from .arguments import tensors_in
from .hooks import is_ours
from .restore import INTERNAL, copied
from .staleness import is_number, structure_of


class Layer(NamedTuple):
    """An attention module chosen for recording, and what has to be looked at each time it is called.

    Attributes:
        name: its name in the model.
        module: the module.
        trunk: the part of the model that cuts the image for it, where that is known.
        block: the block around it that cuts windows, if there is one.
        inner: the module and all below it.
        state: its parameters and buffers by name, all but the statistics.
        statistics: running statistics by name, each with its norm: a norm reads them unless it is in train mode, where it
            moves them.
        moving: small buffers of other modules, such as the vectors of a spectral norm: a module, the name of the buffer. In
            train mode a forward may move them, so a call holds copies.
        slots: where each tensor of the state, the statistics and the moving buffers hangs: a dict of a module, the key, the
            tensor.
        parts: the same and where each submodule, number and forward of an instance's own hangs.
        bare: attributes of the modules that have no forward of their own.
        samples: a few values of each parameter.
        caches: attributes that a forward may fill or replace, such as a cache of biases: a module's attributes, the name, and
            None, as `mutable_now` has it while it is empty.
        hooks: dicts of the hooks of all modules below this one.
        structure: what `structure_of` gave when all this was looked up.
        steps: counts the steps of optimizers on parameters.
    """

    name: str
    module: nn.Module
    trunk: nn.Module | None
    block: nn.Module | None
    inner: tuple[nn.Module, ...]
    state: tuple[tuple[str, Tensor], ...]
    statistics: tuple[tuple[str, Tensor, nn.Module], ...]
    moving: tuple[tuple[str, nn.Module, str], ...]
    slots: tuple[tuple[dict[str, Any], str, Tensor], ...]
    parts: tuple[tuple[dict[str, Any], str, Any], ...]
    bare: tuple[dict[str, Any], ...]
    samples: Samples
    caches: tuple[tuple[dict[str, Any], str, None], ...]
    hooks: tuple[dict[int, Any], ...]
    structure: list[Any]
    steps: Steps

    def state_now(self) -> tuple[tuple[str, Tensor], ...]:
        """What a call reads of the state, the statistics and the moving buffers, where no copies of them are held."""
        if not self.statistics and not self.moving:
            return self.state
        still = [(name, tensor) for name, tensor, norm in self.statistics if not norm.training]
        still += [(path, b) for path, m, name in self.moving if not m.training and (b := m._buffers[name]) is not None]
        return (*self.state, *still)

    def mutable_now(self) -> tuple[tuple[dict[str, Any], str, Any], ...]:
        """What a call may change as it runs: caches and moving buffers as they are before, each with where it hangs."""
        held: list[tuple[dict[str, Any], str, Any]] = []
        for empty in self.caches:
            holder, name, _ = empty
            held.append(empty if (value := holder.get(name)) is None else (holder, name, copied(value)))
        moved = [(m._buffers, name, m._buffers[name]) for _, m, name in self.moving if m.training]
        return (*held, *[(holder, name, buffer.clone()) for holder, name, buffer in moved if buffer is not None])

    def refreshed(self) -> Layer:
        """The same, looked up again if the module is another one than it was: tensors swapped, layers wrapped, numbers set."""
        return self if self._is_as_it_was() else look_up(*self[:4])

    def _is_as_it_was(self) -> bool:
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
    """Look up once what every call of the module will need."""
    inner = tuple(module.modules())
    norms = [(f"{prefix}.", m) if prefix else ("", m) for prefix, m in module.named_modules() if isinstance(m, _NormBase)]
    statistics = tuple((prefix + name, b, norm) for prefix, norm in norms for name, b in norm.named_buffers(recurse=False))
    moving = tuple(_moving_buffers(module))
    apart = {name for name, _, _ in (*statistics, *moving)}
    named = [*module.named_parameters(), *module.named_buffers()]
    state = tuple((n, tensor) for n, tensor in named if n not in apart)
    samples = Samples(module.parameters())
    holders: list[dict[str, Any]] = [holder for m in inner for holder in (m._parameters, m._buffers)]
    slots = tuple((holder, key, tensor) for holder in holders for key, tensor in holder.items() if tensor is not None)
    parts: list[tuple[dict[str, Any], str, Any]] = [*slots]
    parts += [(vars(m), name, value) for m in inner for name, value in vars(m).items() if is_number(name, value)]
    parts += [(m._modules, name, child) for m in inner for name, child in m._modules.items()]
    parts += [(vars(m), "forward", vars(m)["forward"]) for m in inner if "forward" in vars(m)]
    bare = tuple(vars(m) for m in inner if "forward" not in vars(m))
    caches = tuple((vars(m), name, None) for m in inner for name, v in vars(m).items() if name not in INTERNAL and _is_cache(v))
    hooks = tuple(hooks for m in inner[1:] for hooks in (m._forward_hooks, m._forward_pre_hooks))
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
        samples=samples,
        caches=caches,
        hooks=hooks,
        structure=structure_of(inner),
        steps=counted_steps(),
    )


def _moving_buffers(module: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    for prefix, m in module.named_modules():
        if not isinstance(m, _NormBase):
            for name, buffer in m.named_buffers(recurse=False):
                if buffer.numel() <= SAMPLES:
                    yield (f"{prefix}.{name}" if prefix else name), m, name


def stamps_of(
    layer: Layer, tensors: tuple[Tensor, ...], state: tuple[tuple[str, Tensor], ...], held: tuple[Any, ...]
) -> tuple[Any, ...]:
    """One stamp for each argument and each tensor of the state, one for caches, one for some values, one for hooks."""
    hooks, steps = _hooks_of_others(layer), layer.steps
    filled = [value for _, _, value in held if value is not None]
    cached = list(tensors_in(filled)) if filled else filled
    arguments, read = stamps_of_arguments(tensors, steps), stamps([t for _, t in state], steps)
    return (*arguments, *read, stamps(cached, steps) if cached else cached, layer.samples.take(), hooks)


def _hooks_of_others(layer: Layer) -> list[int]:
    """Hooks below the module, which change what is read; those of a recorder do not."""
    if not any(layer.hooks):
        return []
    return [id(hook) for hooks in layer.hooks if hooks for hook in list(hooks.values()) if not is_ours(hook)]


def _is_cache(value: Any) -> bool:
    """Whether an attribute holds what a forward may fill or replace."""
    return value is None or isinstance(value, (dict, list, set, Tensor))
