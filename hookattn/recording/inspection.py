"""What of a model can be read, how, and who calls it with what: one forward, looked at."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..calls.callsite import CallSite
from ..conditions.devices import telling_apart
from ..errors import HookattnError
from ..maps.attention_map import AttentionMap
from ..recipes.registry import find_recipe
from .detect import Detection
from .recorder import AttentionRecorder


@dataclass(frozen=True)
class Entry:
    """One call of one attention module.

    Attributes:
        name: name of the module in the model.
        class_name: its class.
        read_by: name of the recipe that reads it, or "replay".
        shape: (batch, heads, queries, keys) of its map; None where it cannot be read.
        kind: what attends to what: "tokens", "windows" of tokens, or "channels".
        reason: why it cannot be read; empty where it can.
        fused: whether the module goes through `scaled_dot_product_attention`; None where it does not say (`fused_attn`).
        called_from: who calls it, and what x is.
    """

    name: str
    class_name: str
    read_by: str
    shape: tuple[int, int, int, int] | None
    kind: str
    reason: str
    fused: bool | None
    called_from: CallSite

    @property
    def bytes(self) -> int:
        """Bytes of the whole map in float32."""
        return 0 if self.shape is None else 4 * torch.Size(self.shape).numel()


@dataclass(frozen=True)
class Inspection:
    """Attention of a model: what is read, and what is not.

    Attributes:
        entries: each call of an attention module.
        skipped: modules that form no map that could be read, each with the reason.
        missed: names of modules that formed a map but are not known as attention; `layers=` records them by name.
    """

    entries: list[Entry]
    skipped: dict[str, str]
    missed: list[str]


def inspect(model: nn.Module, *args: Any, **kwargs: Any) -> Inspection:
    """Run a model once on the arguments and report on each of its attention modules.

    Works on the meta device too, where it costs neither memory nor time: `with torch.device("meta"): model = ...`.

    Raises:
        ModelError: the attention of the model forms no maps, or it lies on another device than what it is called with.
        NoMapError: the model has no attention.
    """
    formed: list[nn.Module] = []
    with AttentionRecorder(model, called_from=True) as rec, ExitStack() as stack, torch.no_grad():
        # inside the recorder, which knows only what is named like attention or has a recipe: this sees what it misses
        Detection(model, lambda *_: None, lambda module, *_: formed.append(module), lambda _: None).hook(stack)
        with telling_apart(model, args, kwargs):
            model(*args, **kwargs)
    maps = rec.maps
    modules = dict(model.named_modules())
    told = [inside for name in (*rec.layers, *rec.skipped) if name in modules for inside in modules[name].modules()]
    missed = [name for name, module in modules.items() if module in formed and module not in told and module is not model]
    return Inspection([_entry(m) for m in maps.values()], rec.skipped, missed)


def _entry(m: AttentionMap) -> Entry:
    module = m.call.layer.module
    recipe = find_recipe(module)
    shape, kind, reason = None, "", ""
    try:
        shape = m.shape
        kind = "channels" if "channel" in m.axes else "windows" if "windows" in m.axes[0] else "tokens"
    except HookattnError as error:
        reason = str(error)
    return Entry(
        m.name,
        type(module).__name__,
        "replay" if recipe is None else recipe.__name__,
        shape,
        kind,
        reason,
        getattr(module, "fused_attn", None),
        m.called_from,
    )
