"""Blocks that cut the image into windows before they call their attention."""

from __future__ import annotations

from typing import Any

from ..tokens import Tokens, cut
from .registry import partition
from .setting import Setting


@partition("timm.models.swin_transformer.SwinTransformerBlock", "timm.models.swin_transformer_v2.SwinTransformerV2Block")
def swin_block(self: Any, setting: Setting) -> Tokens:
    _, rows, columns, _ = setting.block_argument(self, "x")
    return cut((rows, columns), self.window_size, self.shift_size)
