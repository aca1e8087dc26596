"""What of a model can be read, how, and who calls it with what: one forward, looked at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .errors import HookattnError
from .maps import AttentionMap
from .recipes import find_recipe
from .recorder import AttentionRecorder
from .trace import CallSite


@dataclass(frozen=True)
class Entry:
    """One call of one attention module.

    Attributes:
        name: name of the module in the model.
        class_name: its class.
        read_by: name of the recipe that reads it, or "replay".
        shape: (batch, heads, queries, keys) of its map; None where it cannot be read.
        reason: why it cannot be read; empty where it can.
        fused: whether the module goes through `scaled_dot_product_attention`; None where it does not say (`fused_attn`).
        called_from: who calls it, and what x is.
    """

    name: str
    class_name: str
    read_by: str
    shape: tuple[int, int, int, int] | None
    reason: str
    fused: bool | None
    called_from: CallSite

    @property
    def bytes(self) -> int:
        """Bytes of the whole map in float32."""
        return 0 if self.shape is None else 4 * torch.Size(self.shape).numel()


@dataclass(frozen=True)
class Inspection:
    """Attention of a model: what is read, and what is not, with the reason."""

    entries: list[Entry]
    skipped: dict[str, str]


def inspect(model: nn.Module, *args: Any, **kwargs: Any) -> Inspection:
    """Run a model once on the arguments and report on each of its attention modules.

    Works on the meta device too, where it costs neither memory nor time: `with torch.device("meta"): model = ...`.

    Raises:
        ModelError: the model has no attention that could be recorded.
    """
    with AttentionRecorder(model, called_from=True) as rec, torch.no_grad():
        model(*args, **kwargs)
    return Inspection([_entry(m) for m in rec.maps.values()], rec.skipped)


def _entry(m: AttentionMap) -> Entry:
    module = m.call.target.module
    recipe = find_recipe(module)
    shape, reason = None, ""
    try:
        shape = m.shape
    except HookattnError as error:
        reason = str(error)
    return Entry(
        m.name,
        type(module).__name__,
        "replay" if recipe is None else recipe.__name__,
        shape,
        reason,
        getattr(module, "fused_attn", None),
        m.called_from,
    )
