"""Classes that form no map over pairs of a query and a key, each with the reason."""

from __future__ import annotations

from torch import nn

from .registry import Registry, is_known

_REASONS: Registry[str] = Registry("reason")


_REASONS.register(
    "its softmax runs over positions alone; no pair of a query and a key has a weight",
    "timm.models.coat.FactorAttnConvRelPosEnc",
    "timm.models.efficientvim.HSMSSD",
    "timm.models.mobilevit.LinearSelfAttention",
    "timm.models.mobilevit.MobileVitV2Block",
    "timm.layers.global_context.GlobalContext",
    "timm.layers.lambda_layer.LambdaLayer",
    "transformers.models.mobilevitv2.modeling_mobilevitv2.MobileViTV2LinearSelfAttention",
    "vit_pytorch.cct.TransformerClassifier",
)


_REASONS.register(
    "it is a gate: its weights choose channels, places or branches, not keys for a query",
    "timm.layers.split_attn.SplitAttn",
    "timm.layers.split_attn.RadixSoftmax",
    "timm.layers.selective_kernel.SelectiveKernelAttn",
    "timm.layers.cbam.ChannelAttn",
    "timm.layers.cbam.LightChannelAttn",
    "timm.layers.cbam.SpatialAttn",
    "timm.layers.cbam.LightSpatialAttn",
    "timm.layers.gather_excite.GatherExcite",
    "timm.models.csatv2.SpatialAttention",
)


_REASONS.register(
    "it is linear attention: there is no softmax and no map",
    "timm.models.efficientvit_mit.LiteMLA",
    "timm.models.swiftformer.EfficientAdditiveAttention",
    "timm.models.focalnet.FocalModulation",
    "transformers.models.swiftformer.modeling_swiftformer.SwiftFormerEfficientAdditiveAttention",
    "vit_pytorch.jet_vit.JetViTLinearAttention",
)


_REASONS.register(
    "its softmax runs over the outputs of earlier layers",
    "vit_pytorch.attn_residual_with_dca_simple_vit.AttentionResidual",
)


_REASONS.register(
    "its softmax runs over the queries",
    "transformers.models.groupvit.modeling_groupvit.GroupViTAssignAttention",
    "vit_pytorch.wwt.MutualAttention",
)


_REASONS.register(
    "its rows are normalised sigmoids, not a softmax",
    "timm.layers.non_local_attn.BilinearAttnTransform",
)


_REASONS.register(
    "it is a convolution in heads: there is no softmax and no map",
    "timm.models.nextvit.ConvAttention",
)


_REASONS.register(
    "its softmax runs over the batch and is always 1 / batch",
    "timm.models.csatv2.SpatialTransformerBlock",
)


def may_have_no_map(cls: type) -> bool:
    """Whether a module of a class may be known to have no readable map, see `why_no_map`."""
    return _REASONS.is_about(cls)


def why_no_map(module: nn.Module) -> str | None:
    """Why a module that is known to have no readable map has none; None for all others."""
    # also where a derived class has a forward of its own: it is not known to be attention, and looks like it
    reason = _REASONS.find_inherited(module)
    return None if reason is None or is_known(module) else f"{type(module).__name__}: {reason}"
