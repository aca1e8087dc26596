"""The model is as it was: every object on it, its flags, and what is set for everybody."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def everything_on(model: nn.Module) -> dict[tuple[str, ...], Any]:
    """What the `__dict__` of every module holds, and what the dicts in it hold: hooks, flags, parameters, buffers, caches."""
    found: dict[tuple[str, ...], Any] = {}
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            found[name, attribute] = value
            if isinstance(value, dict):
                found.update({(name, attribute, str(key)): inner for key, inner in value.items()})
    return found


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Everything on the model is afterwards the very object it was, and no mode is left, also when the block raises."""
    before, modes = everything_on(model), modes_in_force()
    try:
        yield
    finally:
        after = everything_on(model)
        assert after.keys() == before.keys()
        assert [key for key in after if after[key] is not before[key]] == []
        assert modes_in_force() == modes


def modes_in_force() -> list[Any]:
    """Of this thread."""
    stack = torch.overrides._get_current_function_mode_stack()  # type: ignore[no-untyped-call]
    return [*stack, torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")]


def state_of(model: nn.Module) -> list[Any]:
    """All that modules hold, by value as well: tensors by identity, version and sum, caches by their content, flags."""
    found: list[Any] = [torch.get_rng_state().tolist()]
    for module in model.modules():
        for name, value in {**vars(module), **module._buffers, **module._parameters}.items():
            if isinstance(value, Tensor):
                found.append((name, id(value), value._version, value.sum().item()))
            elif isinstance(value, dict) and not name.startswith("_"):
                found.append((name, id(value), [(key, id(v)) for key, v in value.items()]))
            elif isinstance(value, (bool, int, float, str, type(None))):
                found.append((name, value))
    return found


def hooks_of_ours(model: nn.Module) -> list[Any]:
    """Hooks on a model that come from the package."""
    hooks = [hook for m in model.modules() for hook in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    return [hook for hook in hooks if str(getattr(hook, "__module__", None)).split(".")[0] == "hookattn"]
