"""The meta device: what lies there has a shape and no values, as in a model whose weights are still to be loaded."""

from __future__ import annotations

import re

from torch import Tensor, nn

from ..errors import UnreadableError

LOAD = (
    'give the model memory and its weights, model.to_empty(device="cpu") and model.load_state_dict(...), and call it on images '
    "that lie there, too"
)
"""What to type."""
_NAMED = re.compile(r"\bmeta\b", re.IGNORECASE)


def without_values(name: str) -> UnreadableError:
    """What is raised of something that was computed there, where nobody asked for it on the meta device."""
    return UnreadableError(f"{name!r} was computed on the meta device, where there are shapes and no values: {LOAD}.")


def check_values(*factors: Tensor) -> None:
    """Check that what has values is not multiplied by what has none.

    Raises:
        UnreadableError: it would be.
    """
    # a fault of PyTorch, 2.6 to 2.15: on the CPU its products take memory that nobody has written for such weights
    lie_there = [t.is_meta for t in factors]
    if True in lie_there and False in lie_there:
        raise UnreadableError(f"weights of a projection lie on the meta device and have no values: {LOAD}.")


def name_missing(model: nn.Module) -> str:
    """A sentence that names what of a model has no values, and says what to type; nothing where all has some."""
    tensors: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    found = [name for name, tensor in tensors.items() if tensor.is_meta]
    if not found:
        return ""
    return f"{len(found)} of its {len(tensors)} tensors lie on the meta device and have no values, such as {found[0]}: {LOAD}."


def advise(error: Exception) -> str:
    """What to type where an operator met what has no values; nothing for other errors."""
    # Undocumented, torch 2.6 to 2.15: the errors are plain ones of many operators, which have this word in common
    return f". {LOAD[0].upper()}{LOAD[1:]}." if _NAMED.search(str(error)) else ""
