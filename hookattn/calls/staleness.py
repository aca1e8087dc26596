"""What tells that a module is another one than it was: its layers, its forwards, its numbers."""

from __future__ import annotations

from typing import Any

from torch import nn

_PLAIN = (int, float, bool, str)
_HARMLESS = ("training", "fused_attn", "call_super_init", "_is_full_backward_hook", "_is_torch_compile")


def structure_of(modules: tuple[nn.Module, ...]) -> list[Any]:
    """What changes when a part of a module is replaced or wrapped, or an attribute is set to another number."""
    found: list[Any] = []
    for module in modules:
        attributes = vars(module)
        found += [value for name, value in attributes.items() if is_number(name, value)]
        found += [id(part) for part in attributes["_modules"].values()]
        found += [*attributes["_parameters"], *attributes["_buffers"]]
        found += [id(attributes.get("forward")), type(module), type(module).forward]
    return found


def is_number(name: str, value: Any) -> bool:
    return type(value) in _PLAIN and name not in _HARMLESS
