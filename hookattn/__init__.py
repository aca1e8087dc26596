"""hookattn: read the attention of Vision Transformers, exactly, while the fused kernel runs.

    with AttentionRecorder(model) as rec:
        logits = model(images)
    rec.maps["blocks.11.attn"][:, :, 0]      # (batch, heads, keys): what the class token looks at

Rooms. An import may only point down this list, and down the list of files that each room begins with:

    cli          the command line; the demo: the only room that prints
    figures      pictures of maps
    extraction   data sets: what is taken of each image, the store, the engines
    analysis     pure functions of maps: rollout, relevance, statistics
    testing      the conformance test of a recipe, a layout or a partition
    recording    what touches a running model, between `with` and the end of the block, and leaves it as it was
    maps         from a captured call to numbers: AttentionMap, gradient, replay
    recipes      how a class of attention makes its queries and keys, and where its tokens lie
    attention    the mathematics: queries and keys, the only softmax
    calls        one captured call: the module, its arguments, its modes, whether it is still fresh
    image        tokens, grids, windows
    conditions   compiled code, checkpoints, threads, sharding, ...: one file each
    errors       everything that is raised on purpose
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .errors import (
    HookattnError,
    LayerNotFoundError,
    ModelError,
    NoGradientError,
    NoMapError,
    RecorderError,
    StaleMapError,
    TokenError,
    UnfaithfulMapError,
    UnreadableError,
)

if TYPE_CHECKING:
    from .attention.projection import project
    from .attention.sources import QK
    from .maps.attention_map import AttentionMap
    from .recipes import layout, partition, recipe
    from .recording.inspection import inspect
    from .recording.maps import load
    from .recording.recorder import AttentionRecorder
else:
    # imported when first asked for: torch takes seconds, and `hookattn --help` and a shell's completion need none of it
    _PLACES = {
        "QK": "attention.sources",
        "AttentionMap": "maps.attention_map",
        "AttentionRecorder": "recording.recorder",
        "inspect": "recording.inspection",
        "layout": "recipes",
        "load": "recording.maps",
        "partition": "recipes",
        "project": "attention.projection",
        "recipe": "recipes",
    }

    def __getattr__(name: str) -> object:
        from importlib import import_module

        if name not in _PLACES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
        if name == "AttentionRecorder":  # which knows nothing of pages: they are made of its maps
            page = import_module(f"{__name__}.figures.page")
            value.explore, value.show = page.write_page, page.show_page
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *_PLACES})


__all__ = [
    "QK",
    "AttentionMap",
    "AttentionRecorder",
    "HookattnError",
    "LayerNotFoundError",
    "ModelError",
    "NoGradientError",
    "NoMapError",
    "RecorderError",
    "StaleMapError",
    "TokenError",
    "UnfaithfulMapError",
    "UnreadableError",
    "inspect",
    "layout",
    "load",
    "partition",
    "project",
    "recipe",
]
__version__ = "0.1.0"
