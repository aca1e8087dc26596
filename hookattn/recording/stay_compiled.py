"""Compiled models that stay compiled while they are recorded: which may, and the hooks that their graphs call."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from ..calls.hooks import Around, is_hooked_by_others
from ..conditions.compiled import COMPILED
from ..conditions.graphs import backend_for, compiled_with
from .wanted import Wanted


def find_inductor(modules: Sequence[nn.Module], recorded: Mapping[str, nn.Module], wanted: Wanted, called_from: bool) -> Any:
    """What a model was compiled with, if its graphs can call our hooks; None where it runs eagerly, of which it is warned.

    Args:
        modules: what the recorder was given, the model itself, and all below it.
        recorded: those whose maps are recorded, by name.
        wanted: what is kept of them.
        called_from: whether callers are looked for.
    """
    if (inductor := compiled_with(modules)) is None or not COMPILED.is_usual():
        return None
    reasons = {
        "gradients=True is": wanted.gradients,
        "verify=True is": wanted.verify,
        "detach=False is": not wanted.detach,
        "called_from=True is": called_from,
        "nothing in it is named like attention, which is": not recorded,
        "another recorder is open, which is": not COMPILED.may_call_hooks(),
        "it is in train mode, which is": any(m.training for module in recorded.values() for m in module.modules()),
        "others have put hooks on it, which is": any(map(is_hooked_by_others, modules)),
    }
    why = next((why for why, holds in reasons.items() if holds), None)
    if why is None:
        return inductor
    said = f"the compiled {type(modules[1]).__name__} runs eagerly while this recorder is open: {why} not for its graphs."
    warnings.warn(said, stacklevel=4)  # where the block begins
    return None


def join_graphs(model: nn.Module, arounds: Sequence[Around], inductor: Any) -> None:
    """Let a compiled model run on graphs that call these hooks, while they are on and nobody opens another recorder."""
    names = {module: name for name, module in model.named_modules()}
    for around in arounds:
        around.join_graphs()
    COMPILED.call_hooks(backend_for(model, inductor, [(type(each).__name__, names[each.module]) for each in arounds]))
