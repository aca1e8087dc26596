"""hookattn: read the attention of Vision Transformers, exactly, while the fused kernel runs.

    with AttentionRecorder(model) as rec:
        logits = model(images)
    rec.maps["blocks.11.attn"][:, :, 0]      # (batch, heads, keys): what the class token looks at

Rooms, an import may only point down:

    cli                   the only file that prints
    demo  plot            the demo's model and scenes; matplotlib
    analysis  statistics  pure functions of maps; figures of a map that is never held whole
    testing  inspection   the conformance test of a recipe; what of a model can be read, and how
    recorder              what touches a model, with watching and edits, and leaves it as it was
    watching              which modules form maps, where names do not tell
    forwards  edits       what counts as one forward; maps put in place of the own
    passing               maps made while a module runs, of the queries and keys it makes itself
    discovery             which modules are attention
    maps                  AttentionMap, read when sliced
    layouts/  gradients   where the queries and keys of a class lie on the image; what backward brings to a map
    replay  tokens  trace the map a forward forms; prefix tokens, grids, windows; who calls an attention module with what
    modes                 what a forward forms its map of, seen or replaced while it runs
    folding               how modules fold the axes of their maps
    recipes/              how queries and keys come out of a call
    calls  indexing       a captured call; what an index asks for
    chunks                what a map is computed from, a chunk of rows at a time
    classes  functional   facts filed by class; the mathematics, the only softmax
    projected             queries and keys that are cut to what is asked for before they are computed
    hooks  threads  eager what a recorder puts on modules, whose forwards it sees, what compiled code does meanwhile
    stamps  absent        what tells that a tensor has changed; that its values are not to be had
    arguments             what a module was called with, as it is kept
    checkpoints           which activation checkpoint a module runs in
    errors
"""

from __future__ import annotations

from .errors import (
    HookattnError,
    LayerNotFoundError,
    MissingExtraError,
    ModelError,
    NoGradientError,
    NoMapError,
    RecorderError,
    StaleMapError,
    TokenError,
    UnfaithfulMapError,
    UnreadableError,
)
from .functional import QK
from .maps import AttentionMap
from .recipes import project, recipe
from .recorder import AttentionRecorder

__all__ = [
    "QK",
    "AttentionMap",
    "AttentionRecorder",
    "HookattnError",
    "LayerNotFoundError",
    "MissingExtraError",
    "ModelError",
    "NoGradientError",
    "NoMapError",
    "RecorderError",
    "StaleMapError",
    "TokenError",
    "UnfaithfulMapError",
    "UnreadableError",
    "project",
    "recipe",
]
__version__ = "0.1.0"
