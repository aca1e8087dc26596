"""What tells that a module is another one than it was: its layers, its forwards, its numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import nn

# Plain numbers and words, such as a scale or a window size, that a forward may depend on. `type(...) in` these, not isinstance:
# what a subclass of float or str makes of `==` is not known.
PLAIN = frozenset({int, float, bool, str})
# What may be set between a call and its reading without the map being another one: training flags, which are set back when it
# is read; the choice of a kernel; and marks of PyTorch's own. Undocumented: `_is_full_backward_hook` is set by backward hooks
# (torch 2.6 to 2.15); `_is_torch_compile` by torch.compile on its wrapper, which hands it on to the module (2.14, not in 2.6).
_HARMLESS = frozenset({"training", "fused_attn", "call_super_init", "_is_full_backward_hook", "_is_torch_compile"})


class Structure(NamedTuple):
    """What a module was made of; differs later if a part of it was replaced or wrapped, or an attribute set to another number.

    Attributes:
        cls, forward: the class of the module, and its forward.
        numbers: of each module in it, attributes that are plain numbers or words.
        children: of each, ids of the modules in it.
        tensors: of each, names of parameters and buffers.
        forwards: of each, the id of a forward of its own.
    """

    # Ids, not the things themselves: a kept call must not keep alive what was taken out of the model. The class of the module
    # itself alone: that of a layer may be set inside the block, as FSDP does, before the call that is read.
    cls: type
    forward: Any
    numbers: list[dict[str, Any]]
    children: list[list[int]]
    tensors: list[set[str]]
    forwards: list[int]

    def leave_out(self, held: Sequence[tuple[dict[str, Any], str, Any]], attributes: Sequence[dict[str, Any]]) -> None:
        """Leave out the names of parameters and buffers that attributes of the same name, which a call holds, hide."""
        # An adapter that is merged for the time of a call puts a tensor of the same name before a parameter, and may put in
        # another parameter afterwards. Python finds attributes first, so what they hide does not matter.
        for holder, name, _ in held:
            for each, names in zip(attributes, self.tensors):
                if holder is each:
                    names.discard(name)


def structure_of(modules: tuple[nn.Module, ...], held: Sequence[tuple[dict[str, Any], str, Any]]) -> Structure:
    """Look at what a module is made of.

    Args:
        modules: the module and all below it.
        held: attributes that a call holds: the attributes of a module, the name, the value.
    """
    attributes = [vars(module) for module in modules]
    found = Structure(
        type(modules[0]),
        type(modules[0]).forward,
        [
            {name: value for name, value in each.items() if type(value) in PLAIN and name not in _HARMLESS}
            for each in attributes
        ],
        [[*map(id, each["_modules"].values())] for each in attributes],
        [{*each["_parameters"], *each["_buffers"]} for each in attributes],
        [id(each.get("forward")) for each in attributes],
    )
    found.leave_out(held, attributes)
    return found
