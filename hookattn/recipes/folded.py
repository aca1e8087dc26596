"""How classes that fold windows or heads into other axes lay out the map they form."""

from __future__ import annotations

from .registry import file_form

file_form("b h w q k", "timm.models.nest.Attention", "timm.models.hiera.MaskUnitAttention")
file_form("b h w q k", "timm.models.volo.OutlookAttention")
file_form("b w h q k", "timm.models.twins.LocallyGroupedAttn")
file_form("(b h) w q k", "timm.layers.halo_attn.HaloAttn")
file_form("(b h) q k", "timm.layers.bottleneck_attn.BottleneckAttn", "timm.models.vision_transformer_sam.Attention")
file_form("b q k", "timm.models.efficientvit_msra.CascadedGroupAttention")
file_form("b q k", "timm.models.shvit.SHSA", "timm.models.iformer.SHMA")
file_form("b h q k", "timm.models.xcit.XCA")
