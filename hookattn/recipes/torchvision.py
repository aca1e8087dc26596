"""torchvision: Swin v1 and v2, MaxViT. Its ViT holds PyTorch's own `nn.MultiheadAttention`."""

from __future__ import annotations

from typing import Any

from ..image.geometry import Geometry
from ..image.tokens import Tokens
from ..image.windows import cut_padded_windows, cut_windows
from .registry import Shape, layout, partition


@layout(
    "torchvision.models.swin_transformer.ShiftedWindowAttention",
    "torchvision.models.swin_transformer.ShiftedWindowAttentionV2",
)
def shifted_window_attention_tokens(geometry: Geometry, shape: Shape) -> tuple[Tokens, Tokens]:
    """The grid is padded, then rolled; along an axis that one window covers it is not rolled."""
    self: Any = geometry.module
    _, rows, columns, _ = geometry.argument("x")
    # (rows, columns)
    shift = [0 if window >= n else step for n, window, step in zip((rows, columns), self.window_size, self.shift_size)]
    tokens = cut_padded_windows((rows, columns), self.window_size, shift)
    return tokens, tokens


@partition("torchvision.models.maxvit.PartitionAttentionLayer")
def torchvision_maxvit_block(self: Any, geometry: Geometry) -> Tokens:
    _, _, rows, columns = geometry.block_argument(self, "x")
    if self.partition_type == "window":
        return cut_windows((rows, columns), (self.p, self.p))
    return cut_windows((rows, columns), (rows // self.p, columns // self.p), strided=True)
