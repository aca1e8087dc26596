"""A captured call: what an attention module was called with, under which modes, and whether all of it is still there."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from functools import lru_cache
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from .absent import is_freed, is_left_behind, is_spread
from .arguments import kept, tensors_in
from .errors import StaleMapError, UnreadableError
from .hooks import is_ours
from .stamps import SAMPLES, Samples, Steps, counted_steps, stamps, stamps_of_arguments

_PLAIN = (int, float, bool, str)
_TRAINING = attrgetter("training")
INTERNAL = set(vars(nn.Module()))
_HARMLESS = ("training", "fused_attn", "call_super_init", "_is_full_backward_hook", "_is_torch_compile")
_NOTHING = object()
_reading: ContextVar[bool] = ContextVar("reading", default=False)


def is_reading() -> bool:
    """Whether a map is being read, so that what runs now is no forward of the model."""
    return _reading.get()


def in_backward() -> bool:
    """Whether autograd runs, in this thread."""
    return torch._C._current_graph_task_id() != -1


class Target(NamedTuple):
    """An attention module chosen for recording, and what has to be looked at each time it is called.

    Attributes:
        name: its name in the model.
        module: the module.
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
            None, as `hold_now` has it while it is empty.
        hooks: dicts of the hooks of all modules below this one.
        structure: what `structure_of` gave when all this was looked up.
        steps: counts the steps of optimizers on parameters.
    """

    name: str
    module: nn.Module
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

    def read_now(self) -> tuple[tuple[str, Tensor], ...]:
        """What a call reads of the state, the statistics and the moving buffers, where no copies of them are held."""
        if not self.statistics and not self.moving:
            return self.state
        still = [(name, tensor) for name, tensor, norm in self.statistics if not norm.training]
        still += [(path, b) for path, m, name in self.moving if not m.training and (b := m._buffers[name]) is not None]
        return (*self.state, *still)

    def hold_now(self) -> tuple[tuple[dict[str, Any], str, Any], ...]:
        """What a call may change as it runs: caches and moving buffers as they are before, each with where it hangs."""
        held: list[tuple[dict[str, Any], str, Any]] = []
        for empty in self.caches:
            holder, name, _ = empty
            held.append(empty if (value := holder.get(name)) is None else (holder, name, _copied(value)))
        moved = [(m._buffers, name, m._buffers[name]) for _, m, name in self.moving if m.training]
        return (*held, *[(holder, name, buffer.clone()) for holder, name, buffer in moved if buffer is not None])

    def up_to_date(self) -> Target:
        """The same, looked up again if the module is another one than it was: tensors swapped, layers wrapped, numbers set."""
        return self if self._is_up_to_date() else target(self.name, self.module)

    def _is_up_to_date(self) -> bool:
        try:
            for holder, key, value in self.parts:
                if holder[key] is not value:
                    return False
        except KeyError:
            return False
        for attributes in self.bare:
            if "forward" in attributes:
                return False
        return not self.samples.are_left()


def target(name: str, module: nn.Module) -> Target:
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
    parts += [(vars(m), name, value) for m in inner for name, value in vars(m).items() if _is_number(name, value)]
    parts += [(m._modules, name, child) for m in inner for name, child in m._modules.items()]
    parts += [(vars(m), "forward", vars(m)["forward"]) for m in inner if "forward" in vars(m)]
    bare = tuple(vars(m) for m in inner if "forward" not in vars(m))
    caches = tuple((vars(m), name, None) for m in inner for name, v in vars(m).items() if name not in INTERNAL and _is_cache(v))
    hooks = tuple(hooks for m in inner[1:] for hooks in (m._forward_hooks, m._forward_pre_hooks))
    structure, steps = structure_of(inner), counted_steps()
    return Target(
        name, module, inner, state, statistics, moving, slots, tuple(parts), bare, samples, caches, hooks, structure, steps
    )


def _moving_buffers(module: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    for prefix, m in module.named_modules():
        if not isinstance(m, _NormBase):
            for name, buffer in m.named_buffers(recurse=False):
                if buffer.numel() <= SAMPLES:
                    yield (f"{prefix}.{name}" if prefix else name), m, name


def _is_number(name: str, value: Any) -> bool:
    return type(value) in _PLAIN and name not in _HARMLESS


def structure_of(modules: tuple[nn.Module, ...]) -> list[Any]:
    """What changes when a part of a module is replaced or wrapped, or an attribute is set to another number."""
    found: list[Any] = []
    for module in modules:
        attributes = vars(module)
        found += [value for name, value in attributes.items() if _is_number(name, value)]
        found += [id(part) for part in attributes["_modules"].values()]
        found += [*attributes["_parameters"], *attributes["_buffers"]]
        found.append(id(attributes.get("forward")))
    return found


def _hooks_of_others(target: Target) -> list[int]:
    """Hooks below the module, which change what is read; those of a recorder do not."""
    if not any(target.hooks):
        return []
    return [id(hook) for hooks in target.hooks if hooks for hook in list(hooks.values()) if not is_ours(hook)]


class Modes(NamedTuple):
    """What the outcome of a call depends on besides its arguments."""

    grad: bool
    autocast: tuple[str, bool, torch.dtype, bool] | None
    training: tuple[bool, ...]
    random: tuple[Tensor, Tensor | None] | None


class Call(NamedTuple):
    """One call of one attention module.

    Attributes:
        target: the module and where it stands.
        args, kwargs: what `forward` received. Tensors are the module's own, cut off from the graph unless asked otherwise.
        modes: grad mode, autocast and training flags of the call.
        tensors: the tensors among the arguments.
        state: the parameters and buffers the call reads, by name.
        held: what the caches and the moving buffers of the module held, each with the dict and the key it hangs at.
        stamps: what tells a change: one for each argument, one for each tensor of the state, one for some values of
            parameters, one for hooks.
    """

    target: Target
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    modes: Modes
    tensors: tuple[Tensor, ...]
    state: tuple[tuple[str, Tensor], ...]
    held: tuple[tuple[dict[str, Any], str, Any], ...]
    stamps: tuple[Any, ...]

    @property
    def x(self) -> Tensor:
        """The first argument of the module's `forward`.

        Raises:
            UnreadableError: it is no tensor.
        """
        first = next(iter(inspect.signature(self.target.module.forward).parameters), "")
        x = self.args[0] if self.args else self.kwargs.get(first)
        if isinstance(x, Tensor):
            return x
        if not self.tensors:
            raise UnreadableError(f"{self.target.name!r} was called without a tensor; what it was called with is m.call.")
        return self.tensors[0]

    @contextmanager
    def resumed(self) -> Iterator[None]:
        """The modes of the call, for as long as the block lasts.

        Raises:
            StaleMapError: an argument or a parameter has changed since the call.
        """
        self.check_fresh()
        with self.in_its_modes():
            yield

    @contextmanager
    def in_its_modes(self) -> Iterator[None]:
        """The modes of the call and what its module held, whatever has become of its arguments."""
        with ExitStack() as stack:
            stack.callback(_reading.reset, _reading.set(True))
            stack.enter_context(torch.set_grad_enabled(self.modes.grad))
            if self.modes.autocast is not None:
                device, enabled, dtype, cached = self.modes.autocast
                cached = cached and self.modes.grad  # a parameter that is cast without grad must not be met by a forward with
                stack.enter_context(torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=cached))
            stack.enter_context(_training(self.target.inner, self.modes.training))
            stack.enter_context(_in_place(self.target.slots))
            stack.enter_context(_in_place([(holder, key, _copied(value)) for holder, key, value in self.held]))
            yield

    def restore_random_streams(self) -> None:
        """Set the random streams to where they were when the call began, if it was in train mode."""
        if self.modes.random is not None:
            cpu, cuda = self.modes.random
            torch.set_rng_state(cpu)
            if cuda is not None:
                torch.cuda.set_rng_state(cuda, self.x.device)

    def check_fresh(self) -> None:
        """Raise StaleMapError if the map of this call can no longer be computed, UnreadableError if not here."""
        self.check_at_hand()
        now = _stamps_of(self.target, self.tensors, self.state, self.held)
        if now != self.stamps:
            names = [f"argument {i}" if i else "x" for i in range(len(self.tensors))]
            names += [*(repr(name) for name, _ in self.state), "a cache inside the module", "values of parameters"]
            names += ["hooks inside the module"]
            changed = [name for name, a, b in zip(names, self.stamps, now) if a != b]
            changed = [name for name in changed if name != "values of parameters"] or changed
            self._raise_stale(f"{', '.join(changed[:4])} changed in place after the forward")
        if structure_of(self.target.inner) != self.target.structure:
            self._raise_stale("a layer, a forward or a number inside the module was replaced after the forward")

    def renewed(self) -> Call:
        """The same right after its forward or during its backward: but for its arguments, it is not compared with before.

        By then FSDP has written the parameters anew, and the forward may have counted its calls; the user has had no say.
        """
        read, first = stamps([tensor for _, tensor in self.state], self.target.steps), len(self.tensors)
        renewed = (*self.stamps[:first], *read, *self.stamps[first + len(read) :])
        return self._replace(stamps=renewed, target=self.target._replace(structure=structure_of(self.target.inner)))

    def check_at_hand(self) -> None:
        """Raise StaleMapError or UnreadableError if the values of what the call reads are elsewhere; nothing looks at them."""
        read = (*self.tensors, *(tensor for _, tensor in self.state), *tensors_in(self.held))
        who = f"{self.target.name!r} ({type(self.target.module).__name__})"
        if any(map(is_left_behind, read)):
            raise UnreadableError(
                f"{who} ran under torch.vmap, and what it was called with is gone with it. Open the recorder inside "
                "what is mapped, and return from there what is read: m[...]."
            )
        if is_spread(self.target.inner[1:], read):
            raise UnreadableError(
                f"what {who} reads is spread over several processes while it runs, and reading would wait for the others. Give "
                "FSDP the attention module or its block, not the layers inside; tensor-parallel attention is not read."
            )
        if any(map(is_freed, read)):
            self._raise_stale("its parameters are sharded again, as FSDP does when the forward has left them")

    def _raise_stale(self, what: str) -> None:
        raise StaleMapError(
            f"the map of {self.target.name!r} ({type(self.target.module).__name__}) is stale: {what}. Read it before that "
            'happens, or record with AttentionRecorder(model, keep="maps").'
        )


def capture(target: Target, args: tuple[Any, ...], kwargs: dict[str, Any], *, detach: bool) -> Call:
    """Keep a call: the arguments themselves (no copy), and what it takes to resume it later."""
    (args, kwargs), tensors = kept(args, kwargs, detach=detach)
    target = target.up_to_date()
    modes, state, held = modes_of(target, tensors, detach=detach), target.read_now(), target.hold_now()
    return Call(target, args, kwargs, modes, tensors, state, held, _stamps_of(target, tensors, state, held))


def modes_of(target: Target, tensors: tuple[Tensor, ...], *, detach: bool) -> Modes:
    """The modes that a call with some tensors comes under."""
    grad, training = torch.is_grad_enabled() and not detach, tuple(map(_TRAINING, target.inner))
    if not tensors:
        return Modes(grad, None, training, None)
    random = _random_streams(tensors[0].device) if True in training else None
    return Modes(grad, _autocast("cpu" if tensors[0].is_cpu else tensors[0].device.type), training, random)


def as_received(call: Call, args: tuple[Any, ...], kwargs: dict[str, Any], *, detach: bool) -> Call:
    """A call with the arguments that hooks which came after ours have made of it."""
    return capture(call.target, args, kwargs, detach=detach)._replace(modes=call.modes)


def _random_streams(device: torch.device) -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _stamps_of(
    target: Target, tensors: tuple[Tensor, ...], state: tuple[tuple[str, Tensor], ...], held: tuple[Any, ...]
) -> tuple[Any, ...]:
    """One stamp for each argument and each tensor of the state, one for caches, one for some values, one for hooks."""
    steps = target.steps
    arguments, read = stamps_of_arguments(tensors, steps), stamps([t for _, t in state], steps)
    filled = [value for _, _, value in held if value is not None]
    cached = stamps(list(tensors_in(filled)), steps) if filled else filled
    return (*arguments, *read, cached, target.samples.take(), _hooks_of_others(target))


def _is_cache(value: Any) -> bool:
    """Whether an attribute holds what a forward may fill or replace."""
    return value is None or isinstance(value, (dict, list, set, Tensor))


def _copied(value: Any) -> Any:
    return value.copy() if isinstance(value, (dict, list, set)) else value


def _autocast(device: str) -> tuple[str, bool, torch.dtype, bool] | None:
    off = _no_autocast(device)
    if off is None or not torch._C._is_any_autocast_enabled() or not torch.is_autocast_enabled(device):
        return off
    return device, True, torch.get_autocast_dtype(device), torch.is_autocast_cache_enabled()


@lru_cache
def _no_autocast(device: str) -> tuple[str, bool, torch.dtype, bool] | None:
    """Autocast that is off, where a device has it: the dtype is that of no operation then."""
    return (device, False, torch.get_autocast_dtype(device), False) if torch.amp.is_autocast_available(device) else None


@contextmanager
def _in_place(wanted: Iterable[tuple[dict[str, Any], str, Any]]) -> Iterator[None]:
    """Put values where they hung when a call was captured (a dict, the key, the value), and put back what hangs there now."""
    other = [(holder, key, value) for holder, key, value in wanted if holder.get(key, _NOTHING) is not value]
    now = [(holder, key, holder.get(key, _NOTHING)) for holder, key, _ in other]
    try:
        for holder, key, value in other:
            holder[key] = value
        yield
    finally:
        for holder, key, value in now:
            if value is _NOTHING:
                del holder[key]
            else:
                holder[key] = value


@contextmanager
def _training(modules: tuple[nn.Module, ...], flags: tuple[bool, ...]) -> Iterator[None]:
    """Set training flags one by one (`train()` may do more than that) and set them back."""
    before = tuple(m.training for m in modules)
    if before == flags:
        yield
        return
    try:
        for module, flag in zip(modules, flags):
            module.training = flag
        yield
    finally:
        for module, flag in zip(modules, before):
            module.training = flag
