"""Classes outside timm: how they fold the map they form, and recipes for those that replay cannot read.

Most attention of torchvision, transformers, open_clip and vit-pytorch needs neither: it is found by the name of its class and
read by replay. A form also makes known a class whose name does not look like attention. Encoders of transformers that are much
used have a recipe, so that rows and heads need not run them again.

`flex_attention` is one call that shows neither softmax nor `scaled_dot_product_attention`, so its callers have a recipe.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ..functional import QK
from .projections import project, project_heads
from .registry import file_form, recipe

_FUNCTIONS = ("eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3", "flash_attention_4")
_MODELING = "transformers.models.{0}.modeling_{0}.{1}"
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
PairMask = Callable[[Any, Any, Tensor, Tensor], Tensor]
"""Of a batch, a head, queries and keys by their numbers: True where a query may attend."""

file_form("b h q k", "vit_pytorch.vit_for_small_dataset.LSA")
file_form("b q k", "vit_pytorch.vit_with_patch_merger.PatchMerger")
file_form(
    "(b h) q k",
    "vit_pytorch.cvt.Attention",
    "vit_pytorch.rvt.Attention",
    "vit_pytorch.twins_svt.GlobalAttention",
    "vit_pytorch.twins_svt.LocalAttention",
    "transformers.models.deepseek_ocr2.modeling_deepseek_ocr2.DeepseekOcr2SamVisionAttention",
    "transformers.models.got_ocr2.modeling_got_ocr2.GotOcr2VisionAttention",
    "transformers.models.groupvit.modeling_groupvit.GroupViTAttention",
    "transformers.models.pp_formulanet.modeling_pp_formulanet.PPFormulaNetVisionAttention",
    "transformers.models.sam.modeling_sam.SamVisionAttention",
    "transformers.models.sam_hq.modeling_sam_hq.SamHQVisionAttention",
    "transformers.models.slanext.modeling_slanext.SLANeXtVisionAttention",
    "transformers.models.unlimited_ocr.modeling_unlimited_ocr.UnlimitedOcrSamVisionAttention",
    "transformers.models.vitdet.modeling_vitdet.VitDetAttention",
)
file_form("b h w q k", "transformers.models.hiera.modeling_hiera.HieraMaskUnitAttention")
file_form(
    "b w h q k",
    "torchvision.models.maxvit.RelativePositionalMultiHeadAttention",
    "vit_pytorch.mobile_vit.Attention",
)


@recipe(*(_MODELING.format(*names) for names in _ENCODERS.items()), where=lambda module: hasattr(module, "q_proj"))
def encoder_attention(self: Any, hidden_states: Tensor, *more: Any, **options: Any) -> Any:
    if not is_plain_call(self, hidden_states, *more, **options):
        return NotImplemented
    heads = self.num_attention_heads if hasattr(self, "num_attention_heads") else self.num_heads
    q, k = (project_heads(layer, hidden_states, heads) for layer in (self.q_proj, self.k_proj))
    return QK(q, k, scale=self.scaling if hasattr(self, "scaling") else self.scale)


@recipe(*(_MODELING.format(*names) for names in _OLDER_ENCODERS.items()))
def older_encoder_attention(self: Any, hidden_states: Tensor, *more: Any, **options: Any) -> Any:
    """Of transformers 4."""
    if not is_plain_call(self, hidden_states, *more, **options):
        return NotImplemented
    q, k = (project_heads(layer, hidden_states, self.num_attention_heads) for layer in (self.query, self.key))
    return QK(q, k, scale=self.scaling)


def is_plain_call(self: Any, hidden_states: Tensor, *more: Any, is_causal: bool | None = None, **options: Any) -> bool:
    """Whether all tokens of images see all others. What a mask, a bias or a window means is the affair of the function that the
    configuration names."""
    bare = all(value is None or isinstance(value, bool) for value in (*more, *options.values()))
    causal = getattr(self, "is_causal", True) if is_causal is None else is_causal
    return bare and not causal and hidden_states.dim() == 3 and self.config._attn_implementation in _FUNCTIONS


@recipe("vit_pytorch.vit_nd.Attention")
def nd_attention(self: Any, x: Tensor, block_mask: Any = None, mask_fn: PairMask | None = None) -> QK:
    q, k = project(self.to_qkv, self.norm(x), "b n (parts h d) -> parts b h n d", parts=2, of=3, h=self.heads)
    return QK(q, k, scale=self.scale, mask=open_pairs(mask_fn, x))


@recipe("vit_pytorch.vit_nd_rotary.Attention")
def nd_rotary_attention(
    self: Any, x: Tensor, pos: Tensor | None = None, block_mask: Any = None, mask_fn: PairMask | None = None
) -> QK:
    q, k = project(self.to_qk, self.norm(x), "b n (parts h d) -> parts b h n d", parts=2, of=2, h=self.heads)
    if self.rotary_emb is not None:
        q, k = self.rotary_emb(q, pos), self.rotary_emb(k, pos)
    return QK(q, k, scale=self.scale, mask=open_pairs(mask_fn, x))


@recipe("vit_pytorch.vit_nd_pope.Attention")
def nd_polar_attention(
    self: Any,
    x: Tensor,
    polar_pos_emb: tuple[Tensor, Tensor] | None = None,
    block_mask: Any = None,
    mask_fn: PairMask | None = None,
) -> QK:
    """Positions turn the angle of a number whose length is the query or key made positive."""
    q, k = project(self.to_qk, self.norm(x), "b n (parts h d) -> parts b h n d", parts=2, of=2, h=self.heads)
    if polar_pos_emb is not None:
        angles, bias = polar_pos_emb
        q, k = turned(q, angles), turned(k, angles + bias)
    return QK(q, k, scale=self.scale, mask=open_pairs(mask_fn, x))


@recipe("vit_pytorch.levjepa_nd.Attention")
def levjepa_nd_attention(self: Any, x: Tensor, rotary_emb: Any, pos: Tensor, block_mask: Any, dense_mask: Tensor | None) -> QK:
    q, k = project(self.to_qkv, self.norm(x), "b n (parts h d) -> parts b h n d", parts=2, of=3, h=self.heads)
    if rotary_emb is not None:
        sin, cos = (rearrange(t, "b n d -> b 1 n d") for t in rotary_emb(pos))
        q, k = rotated(q, sin, cos), rotated(k, sin, cos)
    if block_mask is not None:
        numbers = torch.arange(len(x), device=x.device)[:, None, None, None]
        mask = open_pairs(block_mask.mask_mod, x, numbers)
    else:
        mask = None if dense_mask is None else rearrange(dense_mask, "b q k -> b 1 q k")
    return QK(q, k, scale=self.scale, mask=mask)


def open_pairs(mask_fn: PairMask | None, x: Tensor, batch: Tensor | int = 0) -> Tensor | None:
    """Where a query may attend, (queries, keys) or (batch, 1, queries, keys), told by a function of their numbers."""
    if mask_fn is None:
        return None
    tokens = torch.arange(x.shape[1], device=x.device)
    return mask_fn(batch, 0, tokens[:, None], tokens)


def turned(x: Tensor, angles: Tensor) -> Tensor:
    """Real and imaginary parts of numbers of length softplus(x) at these angles, in float32."""
    lengths = F.softplus(x.float())
    return torch.cat((lengths * angles.cos(), lengths * angles.sin()), dim=-1).to(x.dtype)


def rotated(x: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
    """The first channels rotated, each odd one with the even one before it."""
    turning, rest = x.tensor_split((sin.shape[-1],), dim=-1)
    crossed = torch.stack((-turning[..., 1::2], turning[..., ::2]), dim=-1).flatten(-2)
    return torch.cat((turning * cos + crossed * sin, rest), dim=-1)
