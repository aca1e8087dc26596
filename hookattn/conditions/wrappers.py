"""What wraps a model, or is no model any more: DDP and FSDP are looked through, DataParallel and exported graphs refused."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..errors import ModelError
from .modules import walk

# By name, since to import torch.distributed takes long. One process each, in which the model inside is called as it is.
_WRAPPERS = {"DistributedDataParallel", "FullyShardedDataParallel"}


def recordable(model: nn.Module) -> dict[str, nn.Module]:
    """The module that a recorder can be opened around, under "", and all below it by name, out of what it was given.

    Raises:
        ModelError: there is none, and why.
    """
    if not isinstance(model, nn.Module):
        raise ModelError(f"a torch.nn.Module is needed, not {type(model).__name__}{_instead_of(model)}.")
    model = _unwrapped(model)
    named = walk(model)
    if any(issubclass(cls, _NOT_RECORDABLE) for cls in {*map(type, named.values())}):
        for name, module in named.items():
            _refuse(module, f" (its module {name!r})" if name else "")
    return named


_GRAPHS = (torch.fx.GraphModule, torch.export.UnflattenedModule)
_NOT_RECORDABLE = (nn.DataParallel, torch.jit.ScriptModule, *_GRAPHS)


def _refuse(module: nn.Module, where: str) -> None:
    if isinstance(module, nn.DataParallel):
        raise ModelError(
            f"DataParallel{where} runs copies of the model in threads that share the hooks; record the model inside: "
            "AttentionRecorder(model.module)."
        )
    if isinstance(module, torch.jit.ScriptModule):
        raise ModelError(f"a scripted or traced model{where} runs no Python hooks with the arguments; record the eager model.")
    if isinstance(module, _GRAPHS):
        raise ModelError(f"an exported or traced graph{where} has no attention modules left; record the eager model.")


def _instead_of(thing: Any) -> str:
    """Words that say what to record instead of something that is no module."""
    # Undocumented, torch 2.6 to 2.15: what torch.compile makes of a function has this attribute.
    if hasattr(thing, "_torchdynamo_orig_callable"):
        return ": it was compiled, and runs eagerly inside the block; record the model that it calls"
    if type(thing).__module__.startswith("torch."):
        return ": what was exported or packaged has no attention modules left; record the eager model"
    return ""


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model inside what torch.compile, DistributedDataParallel and FullyShardedDataParallel wrap around it."""
    # Undocumented, torch 2.6 to 2.15: `_orig_mod` of what torch.compile makes of a module. Hooks on the wrapper would do, but
    # names are to be those of the model.
    wraps = any(cls.__name__ in _WRAPPERS for cls in type(model).__mro__)
    inner = getattr(model, "module" if wraps else "_orig_mod", None)
    return _unwrapped(inner) if isinstance(inner, nn.Module) else model
