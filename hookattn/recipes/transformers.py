"""Hugging Face transformers: encoders that are much used, windows, tokens that come in another order.

Most of its attention needs no recipe: it is found by the name of its class and read by replay. Encoders that are much used
have one, so that rows and heads need not run them again.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from ..attention.projection import project_heads
from ..attention.sources import QK
from ..errors import TokenError
from ..image.geometry import Geometry
from ..image.tokens import Tokens
from ..image.windows import cut_padded_windows
from .mechanisms import append_tokens, cut_square_windows, group_in_mask_units, raise_shuffled, unroll_tokens
from .places import find_queries
from .registry import Shape, layout, partition, qualified_names, recipe

# Encoders


# implementations of attention whose plain calls mean the same
_FUNCTIONS = ("eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3", "flash_attention_4")


_MODELING = "transformers.models.{0}.modeling_{0}.{1}"


# model: class of its attention, read where that has `q_proj` and `k_proj`
_ENCODERS = {
    "aimv2": "Aimv2Attention",
    "altclip": "AltCLIPAttention",
    "audio_spectrogram_transformer": "ASTAttention",
    "beit": "BeitAttention",
    "chinese_clip": "ChineseCLIPVisionAttention",
    "clip": "CLIPAttention",
    "clipseg": "CLIPSegAttention",
    "deit": "DeiTAttention",
    "dinov2": "Dinov2Attention",
    "dinov2_with_registers": "Dinov2WithRegistersAttention",
    "eomt": "EomtAttention",
    "idefics2": "Idefics2VisionAttention",
    "idefics3": "Idefics3VisionAttention",
    "ijepa": "IJepaAttention",
    "lw_detr": "LwDetrViTAttention",
    "metaclip_2": "MetaClip2Attention",
    "pixio": "PixioAttention",
    "rf_detr": "RfDetrDinov2Attention",
    "siglip": "SiglipAttention",
    "siglip2": "Siglip2Attention",
    "smolvlm": "SmolVLMVisionAttention",
    "tipsv2": "Tipsv2VisionAttention",
    "vit": "ViTAttention",
    "vit_mae": "ViTMAEAttention",
    "vit_msn": "ViTMSNAttention",
    "vivit": "VivitAttention",
    "x_clip": "XCLIPAttention",
}


# the same in transformers 4, where another class makes queries and keys
_OLDER_ENCODERS = {
    "audio_spectrogram_transformer": "ASTSelfAttention",
    "deit": "DeiTSelfAttention",
    "dinov2": "Dinov2SelfAttention",
    "dinov2_with_registers": "Dinov2WithRegistersSelfAttention",
    "ijepa": "IJepaSelfAttention",
    "vit": "ViTSelfAttention",
    "vit_mae": "ViTMAESelfAttention",
    "vit_msn": "ViTMSNSelfAttention",
    "vivit": "VivitSelfAttention",
}


def encoder_values(self: Any, hidden_states: Tensor, *more: Any, **options: Any) -> Any:
    if not is_plain_call(self, hidden_states, *more, **options):
        return NotImplemented
    return project_heads(self.v_proj, hidden_states, heads_of_encoder(self))


@recipe(
    *(_MODELING.format(*names) for names in _ENCODERS.items()),
    values=encoder_values,
    where=lambda module: hasattr(module, "q_proj"),
)
def encoder_attention(self: Any, hidden_states: Tensor, *more: Any, **options: Any) -> Any:
    if not is_plain_call(self, hidden_states, *more, **options):
        return NotImplemented
    q, k = (project_heads(layer, hidden_states, heads_of_encoder(self)) for layer in (self.q_proj, self.k_proj))
    return QK(q, k, scale=self.scaling if hasattr(self, "scaling") else self.scale)


def older_encoder_values(self: Any, hidden_states: Tensor, *more: Any, **options: Any) -> Any:
    if not is_plain_call(self, hidden_states, *more, **options):
        return NotImplemented
    return project_heads(self.value, hidden_states, self.num_attention_heads)


@recipe(*(_MODELING.format(*names) for names in _OLDER_ENCODERS.items()), values=older_encoder_values)
def older_encoder_attention(self: Any, hidden_states: Tensor, *more: Any, **options: Any) -> Any:
    """Of transformers 4."""
    if not is_plain_call(self, hidden_states, *more, **options):
        return NotImplemented
    q, k = (project_heads(layer, hidden_states, self.num_attention_heads) for layer in (self.query, self.key))
    return QK(q, k, scale=self.scaling)


def heads_of_encoder(self: Any) -> int:
    """How many heads there are, under either name."""
    return int(self.num_attention_heads if hasattr(self, "num_attention_heads") else self.num_heads)


def is_plain_call(self: Any, hidden_states: Tensor, *more: Any, is_causal: bool | None = None, **options: Any) -> bool:
    """Whether all tokens of images see all others. What a mask, a bias or a window means is the affair of the function that the
    configuration names."""
    bare = all(value is None or isinstance(value, bool) for value in (*more, *options.values()))
    causal = getattr(self, "is_causal", True) if is_causal is None else is_causal
    return bare and not causal and hidden_states.dim() == 3 and self.config._attn_implementation in _FUNCTIONS


# Windows


@partition(
    "transformers.models.donut.modeling_donut_swin.DonutSwinLayer",
    "transformers.models.maskformer.modeling_maskformer_swin.MaskFormerSwinLayer",
    "transformers.models.swin.modeling_swin.SwinLayer",
)
def transformers_swin_layer(self: Any, geometry: Geometry) -> Tokens:
    """A small image shrinks the layer's window for good and ends its shift; what attention was called with tells both."""
    size = geometry.block_argument(self, "input_dimensions")
    window = math.isqrt(geometry.argument("hidden_states")[1])  # (batch * windows, tokens, channels)
    shift = 0 if geometry.argument("attention_mask") is None else window // 2
    return cut_padded_windows(size, (window, window), (shift, shift))


@partition(
    "transformers.models.swin2sr.modeling_swin2sr.Swin2SRLayer",
    "transformers.models.swinv2.modeling_swinv2.Swinv2Layer",
)
def transformers_swin_v2_layer(self: Any, geometry: Geometry) -> Tokens:
    size = geometry.block_argument(self, "input_dimensions")
    return cut_padded_windows(size, (self.window_size,) * 2, (self.shift_size,) * 2)


@partition(
    "transformers.models.deepseek_ocr2.modeling_deepseek_ocr2.DeepseekOcr2SamVisionLayer",
    "transformers.models.got_ocr2.modeling_got_ocr2.GotOcr2VisionLayer",
    "transformers.models.pp_formulanet.modeling_pp_formulanet.PPFormulaNetVisionLayer",
    "transformers.models.sam.modeling_sam.SamVisionLayer",
    "transformers.models.sam_hq.modeling_sam_hq.SamHQVisionLayer",
    "transformers.models.slanext.modeling_slanext.SLANeXtVisionLayer",
    "transformers.models.unlimited_ocr.modeling_unlimited_ocr.UnlimitedOcrSamVisionLayer",
)
def transformers_sam_layer(self: Any, geometry: Geometry) -> Tokens:
    _, rows, columns, _ = geometry.block_argument(self, "hidden_states")
    return cut_square_windows((rows, columns), self.window_size)


@partition("transformers.models.vitdet.modeling_vitdet.VitDetLayer")
def transformers_vitdet_layer(self: Any, geometry: Geometry) -> Tokens:
    _, _, rows, columns = geometry.block_argument(self, "hidden_states")
    return cut_square_windows((rows, columns), self.window_size)


@layout("transformers.models.hiera.modeling_hiera.HieraMaskUnitAttention")
def transformers_hiera_attention_tokens(geometry: Geometry, shape: Shape) -> tuple[Tokens, Tokens]:
    """Tokens come unroll_tokens; a block that pools its queries gets its keys from the stage before."""
    self: Any = geometry.module
    encoder = geometry.find_holder("schedule")
    path = list(geometry.path())
    stage = next(i for i, stage in enumerate(encoder.stages) if stage in path)
    # as in timm's Hiera, with one entry a stage
    queries = unroll_tokens(*encoder.schedule[stage])
    keys = unroll_tokens(*encoder.schedule[stage - 1]) if self.query_stride > 1 else queries
    windows = len(keys) // (self.query_stride * self.window_size) if self.use_mask_unit_attn else 1
    return group_in_mask_units(queries, windows), group_in_mask_units(keys, windows)


# Tokens in another order


@layout(
    "transformers.models.yolos.modeling_yolos.YolosAttention",
    "transformers.models.yolos.modeling_yolos.YolosSelfAttention",
)
def detections_at_the_end(geometry: Geometry, shape: Shape) -> tuple[Tokens, Tokens]:
    tokens = append_tokens(geometry, shape, geometry.find_holder("embeddings").embeddings.detection_tokens, ("cls",))
    return tokens, tokens


@layout("transformers.models.groupvit.modeling_groupvit.GroupViTAttention")
def group_tokens_at_the_end(geometry: Geometry, shape: Shape) -> tuple[Tokens, Tokens]:
    """The first stage sees patches and groups, or groups look at patches; later stages see groups."""
    stage = geometry.find_holder("group_token")
    if geometry.find_holder("stages").stages[0] is not stage:
        raise TokenError(f"{geometry.name!r} sees groups of patches, which have no place of their own; slice m[...].")
    if shape[2] != shape[3]:
        return find_queries(shape, keys := geometry.tokens(shape[3], prefix=False)), keys
    tokens = append_tokens(geometry, shape, stage.group_token)
    return tokens, tokens


@layout("transformers.models.vit_mae.modeling_vit_mae.ViTMAEAttention")
def masked_autoencoder_attention_tokens(geometry: Geometry, shape: Shape) -> tuple[Tokens, Tokens]:
    """The encoder sees the patches that were kept in a random order, the decoder all of them."""
    if not any(name.endswith(".ViTMAEDecoder") for module in geometry.path() for name in qualified_names(module)):
        raise_shuffled(geometry)
    tokens = Tokens(("cls",), geometry.tokens(shape[3] - 1, prefix=False).grid_size)
    return tokens, tokens
