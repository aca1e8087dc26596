"""hookattn: read the attention of Vision Transformers, exactly, while the fused kernel runs.

    with AttentionRecorder(model) as rec:
        logits = model(images)
    rec.maps["blocks.11.attn"][:, :, 0]      # (batch, heads, keys): what the class token looks at

Rooms. An import may only point down this list, and down the list of files that each room begins with:

    cli          the command line; the demo: the only room that prints
    figures      pictures of maps
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

from .attention.projection import project
from .attention.sources import QK
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
from .figures.page import show_page as _show_page
from .figures.page import write_page as _write_page
from .maps.attention_map import AttentionMap
from .recipes import layout, partition, recipe
from .recording.inspection import inspect
from .recording.recorder import AttentionRecorder

# a recorder knows nothing of pages, which are made of its maps
AttentionRecorder.explore, AttentionRecorder.show = _write_page, _show_page

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
    "partition",
    "project",
    "recipe",
]
__version__ = "0.1.0"
