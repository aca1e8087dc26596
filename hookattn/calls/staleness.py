"""What tells that a module is another one than it was: its layers, its forwards, its numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

_PLAIN = (int, float, bool, str)
# What may be set between a call and its reading without the map being another one: training flags, which are set back when it
# is read; the choice of a kernel; and marks of PyTorch's own. Undocumented: `_is_full_backward_hook` is set by backward hooks
# (torch 2.6 to 2.14); `_is_torch_compile` by torch.compile on its wrapper, which hands it on to the module (2.14, not in 2.6).
_HARMLESS = ("training", "fused_attn", "call_super_init", "_is_full_backward_hook", "_is_torch_compile")


def structure_of(modules: tuple[nn.Module, ...], held: Sequence[tuple[dict[str, Any], str, Any]]) -> list[Any]:
    """A list that differs later if a part of a module was replaced or wrapped, or an attribute set to another number.

    Args:
        held: attributes that a call holds: the attributes of a module, the name, the value.
    """
    # An adapter that is merged for the time of a call puts a tensor of the same name before a parameter, and may put in another
    # parameter afterwards. Python finds attributes first, so what they hide does not matter.
    hidden = {(id(attributes), name) for attributes, name, _ in held}
    # Ids, not the things themselves: a kept call must not keep alive what was taken out of the model. The class of the module
    # itself alone: that of a layer may be set inside the block, as FSDP does, before the call that is read.
    found: list[Any] = [type(modules[0]), type(modules[0]).forward]
    for module in modules:
        attributes = vars(module)
        found += [value for name, value in attributes.items() if is_number(name, value)]
        found += [id(part) for part in attributes["_modules"].values()]
        named = (*attributes["_parameters"], *attributes["_buffers"])
        found.append({name for name in named if (id(attributes), name) not in hidden})
        found.append(id(attributes.get("forward")))
    return found


def is_number(name: str, value: Any) -> bool:
    """Whether an attribute is a plain number or word, such as a scale or a window size, that a forward may depend on."""
    # `type(...) in`, not isinstance: what a subclass of float or str makes of `==` is not known
    return type(value) in _PLAIN and name not in _HARMLESS
