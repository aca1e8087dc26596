"""What `hookattn demo` shows: a small Vision Transformer of our own and the scenes it was trained on.

From top to bottom, an import may only point down:

    model        plain timm blocks behind a convolutional stem, and the trained weights
    scenes       one shape on a textured ground, drawn from a seed
"""

from __future__ import annotations

from .model import attention_on, build, load, to_input
from .scenes import SHAPES, Scene, draw

__all__ = ["SHAPES", "Scene", "attention_on", "build", "draw", "load", "to_input"]
