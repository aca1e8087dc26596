"""Classes that take all tokens of the image in a row, with or without prefix tokens, and queries that are none of them."""

from __future__ import annotations

from typing import Any

from ..errors import TokenError
from ..tokens import Tokens, whole
from .registry import Shape, layout, partition, received
from .setting import Setting
from .sizes import pair, size_after


@layout(
    "timm.layers.attention.Attention",
    "timm.layers.attention.AttentionRope",
    "timm.layers.diff_attention.DiffAttention",
    "timm.models.vision_transformer.Attention",
    "timm.models.vision_transformer.ParallelScalingBlock",
    "timm.models.vision_transformer.DiffParallelScalingBlock",
    "timm.models.vision_transformer_relpos.RelPosAttention",
    "timm.models.beit.Attention",
    "timm.models.convit.MHSA",
    "timm.models.eva.EvaAttention",
    "timm.models.gemma4_vit.Gemma4Attention",
)
def with_prefix(setting: Setting, shape: Shape) -> tuple[Tokens, Tokens]:
    """All prefix tokens of the model and all patches, or what the block around cuts."""
    tokens = received(setting, lambda: setting.tokens(shape[3], prefix=True))
    return tokens, tokens


@layout(
    "timm.models.cait.TalkingHeadAttn",
    "timm.models.convit.GPSA",
    "timm.models.efficientformer.Attention",
    "timm.models.metaformer.Attention",
)
def without_prefix(setting: Setting, shape: Shape) -> tuple[Tokens, Tokens]:
    """All patches: a class token comes later, or never."""
    tokens = received(setting, lambda: setting.tokens(shape[3], prefix=False))
    return tokens, tokens


@layout("timm.models.cait.ClassAttn", "timm.models.volo.ClassAttention", "timm.models.crossvit.CrossAttention")
def class_attention(setting: Setting, shape: Shape) -> tuple[Tokens, Tokens]:
    return Tokens(("cls",), (0, 0)), received(setting, lambda: setting.tokens(shape[3], prefix=True))


@layout("timm.layers.attention_pool.AttentionPoolLatent")
def attention_pool_latent(setting: Setting, shape: Shape) -> tuple[Tokens, Tokens]:
    return Tokens(tuple(f"latent{i}" for i in range(shape[2])), (0, 0)), pooled_tokens(setting, shape)


@layout("timm.layers.attention_pool.AttentionPoolPrr")
def attention_pool_prr(setting: Setting, shape: Shape) -> tuple[Tokens, Tokens]:
    tokens = pooled_tokens(setting, shape)
    return tokens, tokens


def pooled_tokens(setting: Setting, shape: Shape) -> Tokens:
    """What a model pools: all of its tokens unless it says that its prefix tokens are left out."""
    prefix = getattr(setting.trunk, "pool_include_prefix", True)
    return received(setting, lambda: setting.tokens(shape[3], prefix=bool(prefix)))


@partition("timm.models.pit.Transformer")
def pit_transformer(self: Any, setting: Setting) -> Tokens:
    """A stage may pool the patches first."""
    patches, tokens = setting.block_argument(self, "x")
    return whole(size_after(patches, None if self.pool is None else self.pool.conv), ("cls", "dist")[: tokens[1]])


@partition("timm.models.metaformer.MetaFormerStage")
def metaformer_stage(self: Any, setting: Setting) -> Tokens:
    return whole(size_after(setting.block_argument(self, "x"), self.downsample))


@partition("timm.models.csatv2.TransformerBlock")
def csatv2_transformer_block(self: Any, setting: Setting) -> Tokens:
    return whole(size_after(setting.block_argument(self, "x"), self.pool2))


@partition("timm.models.crossvit.MultiScaleBlock")
def crossvit_block(self: Any, setting: Setting) -> Tokens:
    """Two branches with patches of two sizes; a class token that changes branches looks at the patches of the other.

    The image is resized for each branch, which leaves a grid where it is on the image; it may be cropped instead, which does
    not.
    """
    path, branches = list(setting.path()), len(self.projs)
    fused = next((i for i, fusion in enumerate(self.fusion) if fusion in path), None)
    branch = (fused + 1) % branches if fused is not None else next(i for i, own in enumerate(self.blocks) if own in path)
    model = setting.holder("img_size_scaled")
    size = pair(model.patch_embed[branch].img_size)
    seen = setting.image_size or size
    if model.crop_scale and seen != size and size[0] <= seen[0] and size[1] <= seen[1]:
        raise TokenError(
            f"{setting.name!r} sees {size[0]} x {size[1]} pixels that were cropped out of the image (crop_scale of the "
            f"{type(model).__name__}); slice the map itself, m[...]."
        )
    return whole(size_after(size, model.patch_embed[branch].proj), ("cls",))
