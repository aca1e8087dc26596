"""The modules of a model by name, as fast as can be: a recorder that is opened for each batch asks for them each time."""

from __future__ import annotations

from torch import nn


def walk(model: nn.Module) -> dict[str, nn.Module]:
    """Find a module and all below it, each once, by name: as `named_modules` has them, in the same order."""
    found = {model: ""}
    _visit(model, "", found)
    return dict(zip(found.values(), found))


def _visit(module: nn.Module, prefix: str, found: dict[nn.Module, str]) -> None:
    for key, child in module._modules.items():
        if child is not None and child not in found:
            found[child] = prefix + key
            if child._modules:  # most have none
                _visit(child, f"{prefix}{key}.", found)
