"""Put a module back as it was: while a captured call is read, and after it was run once more."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn

# Of a context, not of a thread: another thread or task may be in a forward of the same model meanwhile, which is recorded.
reading: ContextVar[bool] = ContextVar("reading", default=False)


def is_reading() -> bool:
    """Whether a map is being read, so that what runs now is no forward of the model."""
    return reading.get()


# Undocumented, but asked of the PyTorch that is there: attributes that every module has (hooks, children, tensors, flags).
# Tensors and flags are put back by name where that is needed, and hooks are the business of whoever has put them on.
INTERNAL = set(vars(nn.Module()))
_NOTHING = object()


@contextmanager
def in_place(wanted: Iterable[tuple[dict[str, Any], str, Any]]) -> Iterator[None]:
    """Put values where they hung when a call was captured (a dict, the key, the value), and put back what hangs there now."""
    # Only what differs: mostly nothing, and another thread that runs the module must not meet a dict that is being written.
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
def training_flags(modules: tuple[nn.Module, ...], flags: list[bool]) -> Iterator[None]:
    """Set training flags as they were in a call, for as long as the block lasts."""
    # One by one, without `train()`: modules of one model may differ, and LeViT empties its cache there.
    before = [m.training for m in modules]
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


def copied(value: Any) -> Any:
    """A shallow copy of a dict, a list or a set; anything else as it is."""
    return value.copy() if isinstance(value, (dict, list, set)) else value


@contextmanager
def restoring(module: nn.Module) -> Iterator[None]:
    """Run a module once more without a trace: random streams, buffers, caches and attributes are afterwards as before."""
    inner = list(module.modules())
    devices = {t.device for t in module.parameters() if t.device.type == "cuda"}
    attributes = [_contents(m) for m in inner]
    buffers = [dict(m._buffers) for m in inner]
    with torch.random.fork_rng(devices=list(devices)):
        try:
            # It writes into clones. The originals come back untouched: written back by values, they would count a version, and
            # maps of other calls that read them would be stale.
            for m in inner:
                m._buffers.update({name: b.clone() for name, b in m._buffers.items() if b is not None})
            yield
        finally:
            for m, own, kept in zip(inner, attributes, buffers):
                _put_back(m, own)
                _refill(m._buffers, kept)


def _contents(module: nn.Module) -> dict[str, tuple[Any, Any]]:
    """Attributes that a module has besides those of every module, each with a copy of what it holds if it is a container."""
    own = {name: value for name, value in vars(module).items() if name not in INTERNAL}
    return {n: (v, copy.copy(v) if isinstance(v, (dict, list, set)) else None) for n, v in own.items()}


def _put_back(module: nn.Module, attributes: dict[str, tuple[Any, Any]]) -> None:
    for name in [name for name in vars(module) if name not in INTERNAL and name not in attributes]:
        del vars(module)[name]
    for name, (value, contents) in attributes.items():
        vars(module)[name] = value
        if isinstance(value, list):
            value[:] = contents
        elif contents is not None:
            _refill(value, contents)


def _refill(held: Any, contents: Any) -> None:
    """Make a dict or a set hold again what it held, the very object, since others may refer to it."""
    # never emptied on the way: another thread may be looking something up
    for extra in [key for key in list(held) if key not in contents]:
        held.discard(extra) if isinstance(held, set) else held.pop(extra)
    held.update(contents)
