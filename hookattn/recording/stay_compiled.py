"""Compiled models that stay compiled while they are recorded: which may, and the hooks that their graphs call."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from ..calls.hooks import Around, is_hooked_by_others
from ..conditions.compiled import COMPILED
from ..conditions.graphs import GraphsWithHooks, backend_for, compiled_with
from ..errors import UnreadableError
from .wanted import Wanted


def find_backend(
    modules: Sequence[nn.Module], recorded: Mapping[str, nn.Module], wanted: Wanted, called_from: bool
) -> GraphsWithHooks | None:
    """What makes graphs of a compiled model that call our hooks; None where it runs eagerly, of which it is warned.

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
        if (backend := backend_for(modules[1], inductor, recorded, wanted.maps)) is not None:
            return backend
        why = "other layers= of it have been recorded three times, and further ones are"
    said = f"the compiled {type(modules[1]).__name__} runs eagerly while this recorder is open: {why} not for its graphs."
    warnings.warn(said, stacklevel=4)  # where the block begins
    return None


def join_graphs(arounds: Iterable[Around], backend: GraphsWithHooks) -> None:
    """Let a compiled model run on graphs that call these hooks, while they are on and nobody opens another recorder."""
    for around in arounds:
        around.join_graphs()
    COMPILED.call_hooks(backend)


def check_call(around: Around) -> None:
    """Raise UnreadableError where a graph that calls the hook of a module runs it in a way that the hook is not told of."""
    if around.is_followed():
        raise UnreadableError("a hook that was put on inside the block changes what it is called with; put it on before")
    if any(module.training for module in around.module.modules()):
        raise UnreadableError(
            "it was put into train mode inside the block, where a graph draws random numbers of its own: put it into train "
            "mode before, and it runs eagerly."
        )
