"""What `hookattn demo` shows: a small Vision Transformer of our own and the scenes it was trained on."""

from __future__ import annotations

from .model import attention_on, build, load, to_input
from .scenes import SHAPES, Scene, draw

__all__ = ["SHAPES", "Scene", "attention_on", "build", "draw", "load", "to_input"]
