"""Classes whose queries and keys are channels."""

from __future__ import annotations

from .registry import channels

channels(
    "timm.models.xcit.XCA",
    "timm.models.edgenext.CrossCovarianceAttn",
    "timm.models.davit.ChannelAttention",
    "timm.models.davit.ChannelAttentionV2",
)
