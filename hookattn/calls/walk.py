"""The modules of a model by name, found without recursion, since a recorder that is opened for each batch does it each time."""

from __future__ import annotations

from torch import nn


def walk(model: nn.Module) -> dict[str, nn.Module]:
    """Find a module and all below it, each once, by name: as `named_modules` has them, in the same order."""
    found: dict[nn.Module, str] = {}
    waiting = [("", model)]
    while waiting:
        name, module = waiting.pop()
        if module in found:
            continue
        found[module] = name
        if below := module._modules:
            prefix = f"{name}." if name else ""
            waiting += [(prefix + key, child) for key, child in reversed(below.items()) if child is not None]
    return {name: module for module, name in found.items()}
