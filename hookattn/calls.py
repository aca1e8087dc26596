"""A captured call: what an attention module was called with, under which modes, and whether all of it is still there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils import _pytree as pytree

from .errors import StaleMapError

_SAMPLES = 4096
_reading: ContextVar[bool] = ContextVar("reading", default=False)


def is_reading() -> bool:
    """Whether a map is being read, so that what runs now is no forward of the model."""
    return _reading.get()


class Target(NamedTuple):
    """An attention module chosen for recording, and what has to be looked at each time it is called.

    Attributes:
        name: its name in the model.
        module: the module.
        inner: the module and all below it.
        state: its parameters and buffers by name, all but the statistics.
        statistics: running statistics by name, each with its norm: a norm reads them unless it is in train mode, where it
            moves them.
    """

    name: str
    module: nn.Module
    inner: tuple[nn.Module, ...]
    state: tuple[tuple[str, Tensor], ...]
    statistics: tuple[tuple[str, Tensor, nn.Module], ...]

    def read_now(self) -> tuple[tuple[str, Tensor], ...]:
        """What a call reads of the state and the statistics."""
        if not self.statistics:
            return self.state
        return (*self.state, *((name, tensor) for name, tensor, norm in self.statistics if not norm.training))


def target(name: str, module: nn.Module) -> Target:
    """Look up once what every call of the module will need."""
    norms = [(f"{prefix}.", m) if prefix else ("", m) for prefix, m in module.named_modules() if isinstance(m, _NormBase)]
    statistics = tuple((prefix + name, b, norm) for prefix, norm in norms for name, b in norm.named_buffers(recurse=False))
    apart = {name for name, _, _ in statistics}
    named = [*module.named_parameters(), *module.named_buffers()]
    state = tuple((n, tensor) for n, tensor in named if n not in apart)
    return Target(name, module, tuple(module.modules()), state, statistics)


class Modes(NamedTuple):
    """What the outcome of a call depends on besides its arguments."""

    grad: bool
    autocast: tuple[str, bool, torch.dtype, bool] | None
    training: tuple[bool, ...]


class Call(NamedTuple):
    """One call of one attention module.

    Attributes:
        target: the module and where it stands.
        args, kwargs: what `forward` received. Tensors are the module's own, cut off from the graph unless asked otherwise.
        modes: grad mode, autocast and training flags of the call.
        tensors: the tensors among the arguments.
        state: the parameters and buffers the call reads, by name.
        stamps: what tells a change of an argument, then of each tensor of the state.
    """

    target: Target
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    modes: Modes
    tensors: tuple[Tensor, ...]
    state: tuple[tuple[str, Tensor], ...]
    stamps: tuple[Any, ...]

    @property
    def x(self) -> Tensor:
        """The first tensor the module was called with."""
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
        """The modes of the call, whatever has become of its arguments."""
        with ExitStack() as stack:
            stack.callback(_reading.reset, _reading.set(True))
            stack.enter_context(torch.set_grad_enabled(self.modes.grad))
            if self.modes.autocast is not None:
                device, enabled, dtype, cached = self.modes.autocast
                cached = cached and self.modes.grad  # a parameter that is cast without grad must not be met by a forward with
                stack.enter_context(torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=cached))
            stack.enter_context(_training(self.target.inner, self.modes.training))
            yield

    def check_fresh(self) -> None:
        """Raise StaleMapError if the map of this call can no longer be computed."""
        now = (*map(_stamp_of_argument, self.tensors), *_stamps([t for _, t in self.state]))
        if now != self.stamps:
            names = [*(f"argument {i}" if i else "x" for i in range(len(self.tensors)))]
            names += [f"{name!r}" for name, _ in self.state]
            changed = [name for name, a, b in zip(names, self.stamps, now) if a != b]
            self._raise_stale(f"{', '.join(changed[:4])} changed in place after the forward")
        present = {id(t) for t in (*self.target.module.parameters(), *self.target.module.buffers())}
        replaced = [name for name, tensor in self.state if id(tensor) not in present]
        if replaced:
            self._raise_stale(f"{', '.join(map(repr, replaced[:4]))} was replaced after the hooks went on")

    def _raise_stale(self, what: str) -> None:
        raise StaleMapError(
            f"the map of {self.target.name!r} ({type(self.target.module).__name__}) is stale: {what}. Read it before that "
            'happens, or record with AttentionRecorder(model, keep="maps").'
        )


def capture(target: Target, args: tuple[Any, ...], kwargs: dict[str, Any], *, detach: bool) -> Call:
    """Keep a call: the arguments themselves (no copy), and what it takes to resume it later."""
    if detach:
        args, kwargs = _detached(args), _detached(kwargs)
    tensors = tuple(_tensors((*args, *kwargs.values())))
    grad = torch.is_grad_enabled() and not detach
    autocast = _autocast(tensors[0].device.type) if tensors else None
    modes = Modes(grad, autocast, tuple([m.training for m in target.inner]))
    state = target.read_now()
    stamps = (*[_stamp_of_argument(t) for t in tensors], *_stamps([t for _, t in state]))
    return Call(target, args, kwargs, modes, tensors, state, stamps)


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


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple, dict)):
            yield from (leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor))


def _stamps(tensors: list[Tensor]) -> list[tuple[int, int]]:
    """What changes when a tensor is written to or moved."""
    try:
        return [(t._version, t.data_ptr()) for t in tensors]
    except RuntimeError:  # an inference tensor counts no versions, a fake or wrapped one has no address
        return [_stamp(t) for t in tensors]


def _stamp(tensor: Tensor) -> tuple[int, int]:
    """The same of one tensor of any kind; an inference tensor tells of moves alone."""
    return -1 if tensor.is_inference() else tensor._version, _address(tensor)


def _stamp_of_argument(tensor: Tensor) -> tuple[Any, ...]:
    """As `_stamp`; inference tensors count no versions, so up to 4096 of their values are kept and compared instead."""
    if not tensor.is_inference() or tensor.device.type == "meta":
        return _stamp(tensor)
    values = tensor.reshape(-1)
    return (_Values(values[:: max(1, values.numel() // _SAMPLES)].clone()), *_stamp(tensor))


class _Values:
    """Values of a tensor that compare equal when all are, NaN with NaN."""

    def __init__(self, values: Tensor) -> None:
        self.values = values

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Values) and torch.equal(self.values.nan_to_num(), other.values.nan_to_num())

    __hash__ = object.__hash__


def _address(tensor: Tensor) -> int:
    try:
        return tensor.data_ptr()
    except RuntimeError:  # a tensor without storage: fake, functional or a wrapper
        return 0


def _autocast(device: str) -> tuple[str, bool, torch.dtype, bool] | None:
    if not _autocast_exists(device):
        return None
    enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    return device, enabled, dtype, torch.is_autocast_cache_enabled()


@lru_cache
def _autocast_exists(device: str) -> bool:
    return torch.amp.is_autocast_available(device)


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
