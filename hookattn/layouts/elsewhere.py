"""Where queries and keys lie in models outside timm: windows, and tokens that do not come as prefix tokens and a grid."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..classes import names_of
from ..errors import TokenError
from ..tokens import Tokens, cut, whole
from .registry import Shape, channels, layout, partition, queries_of
from .setting import Patches, Setting, grid_size
from .windows import in_mask_units, unrolled

channels("vit_pytorch.xcit.XCAttention")


# Windows


@layout(
    "torchvision.models.swin_transformer.ShiftedWindowAttention",
    "torchvision.models.swin_transformer.ShiftedWindowAttentionV2",
)
def shifted_window_attention(setting: Setting, shape: Shape) -> tuple[Tokens, Tokens]:
    """The grid is padded, then rolled; along an axis that one window covers it is not rolled."""
    self: Any = setting.module
    _, rows, columns, _ = setting.argument("x")
    shift = [0 if window >= n else step for n, window, step in zip((rows, columns), self.window_size, self.shift_size)]
    tokens = padded_and_cut((rows, columns), self.window_size, shift)
    return tokens, tokens


@partition("torchvision.models.maxvit.PartitionAttentionLayer")
def torchvision_maxvit_block(self: Any, setting: Setting) -> Tokens:
    _, _, rows, columns = setting.block_argument(self, "x")
    if self.partition_type == "window":
        return cut((rows, columns), (self.p, self.p))
    return cut((rows, columns), (rows // self.p, columns // self.p), strided=True)


@partition(
    "transformers.models.donut.modeling_donut_swin.DonutSwinLayer",
    "transformers.models.maskformer.modeling_maskformer_swin.MaskFormerSwinLayer",
    "transformers.models.swin.modeling_swin.SwinLayer",
)
def transformers_swin_layer(self: Any, setting: Setting) -> Tokens:
    """A small image shrinks the layer's window for good and ends its shift; what attention was called with tells both."""
    size = setting.block_argument(self, "input_dimensions")
    window = math.isqrt(setting.argument("hidden_states")[1])
    shift = 0 if setting.argument("attention_mask") is None else window // 2
    return padded_and_cut(size, (window, window), (shift, shift))


@partition(
    "transformers.models.swin2sr.modeling_swin2sr.Swin2SRLayer",
    "transformers.models.swinv2.modeling_swinv2.Swinv2Layer",
)
def transformers_swin_v2_layer(self: Any, setting: Setting) -> Tokens:
    size = setting.block_argument(self, "input_dimensions")
    return padded_and_cut(size, (self.window_size,) * 2, (self.shift_size,) * 2)


@partition(
    "transformers.models.deepseek_ocr2.modeling_deepseek_ocr2.DeepseekOcr2SamVisionLayer",
    "transformers.models.got_ocr2.modeling_got_ocr2.GotOcr2VisionLayer",
    "transformers.models.pp_formulanet.modeling_pp_formulanet.PPFormulaNetVisionLayer",
    "transformers.models.sam.modeling_sam.SamVisionLayer",
    "transformers.models.sam_hq.modeling_sam_hq.SamHQVisionLayer",
    "transformers.models.slanext.modeling_slanext.SLANeXtVisionLayer",
    "transformers.models.unlimited_ocr.modeling_unlimited_ocr.UnlimitedOcrSamVisionLayer",
)
def transformers_sam_layer(self: Any, setting: Setting) -> Tokens:
    _, rows, columns, _ = setting.block_argument(self, "hidden_states")
    return in_windows((rows, columns), self.window_size)


@partition("transformers.models.vitdet.modeling_vitdet.VitDetLayer")
def transformers_vitdet_layer(self: Any, setting: Setting) -> Tokens:
    _, _, rows, columns = setting.block_argument(self, "hidden_states")
    return in_windows((rows, columns), self.window_size)


@layout("transformers.models.hiera.modeling_hiera.HieraMaskUnitAttention")
def transformers_hiera_attention(setting: Setting, shape: Shape) -> tuple[Tokens, Tokens]:
    """Tokens come unrolled; a block that pools its queries gets its keys from the stage before."""
    self: Any = setting.module
    encoder = setting.holder("schedule")
    path = list(setting.path())
    stage = next(i for i, stage in enumerate(encoder.stages) if stage in path)
    queries = unrolled(*encoder.schedule[stage])
    keys = unrolled(*encoder.schedule[stage - 1]) if self.query_stride > 1 else queries
    windows = len(keys) // (self.query_stride * self.window_size) if self.use_mask_unit_attn else 1
    return in_mask_units(queries, windows), in_mask_units(keys, windows)


@layout("vit_pytorch.twins_svt.LocalAttention")
def twins_local_attention(setting: Setting, shape: Shape) -> tuple[Tokens, Tokens]:
    self: Any = setting.module
    tokens = cut(setting.argument("fmap")[-2:], (self.patch_size, self.patch_size))
    return tokens, tokens


@layout("vit_pytorch.scalable_vit.InteractiveWindowedSelfAttention")
def interactive_windowed_self_attention(setting: Setting, shape: Shape) -> tuple[Tokens, Tokens]:
    tokens = in_windows(setting.argument("x")[-2:], setting.module.window_size)
    return tokens, tokens


@layout("vit_pytorch.crossformer.Attention")
def crossformer_attention(setting: Setting, shape: Shape) -> tuple[Tokens, Tokens]:
    """Short attention sees a window, long attention patches at equal distances."""
    self: Any = setting.module
    window = (self.window_size, self.window_size)
    tokens = cut(setting.argument("x")[-2:], window, strided=self.attn_type == "long")
    return tokens, tokens


@layout("vit_pytorch.nest.Attention")
def nest_attention(setting: Setting, shape: Shape) -> tuple[Tokens, Tokens]:
    """As many blocks down as across, told by how many there are of an image."""
    pieces, _, height, width = setting.argument("x")
    if setting.images is None or isinstance(setting.images, Patches) or pieces % setting.images[0]:
        raise TokenError(f"it is not known how many blocks {setting.name!r} cuts an image into; slice the map itself, m[...].")
    across = round((pieces // setting.images[0]) ** 0.5)
    tokens = cut((across * height, across * width), (height, width))
    return tokens, tokens


@layout("vit_pytorch.max_vit.Attention")
def max_vit_attention(setting: Setting, shape: Shape) -> tuple[Tokens, Tokens]:
    """Every other attention of a stage is the one over a grid; the layer before it tells how the image was cut."""
    _, down, across, height, width, _ = setting.argument("x")
    path = list(setting.path())
    layers = next(list(m) for m in path if isinstance(m, nn.Sequential) and any(part in path for part in m))
    at = next(i for i, part in enumerate(layers) if part in path)
    before = [str(getattr(part, "pattern", "")) for part in layers[:at]]
    pattern = next((p for p in reversed(before) if p), "")
    strided = {"b d (x w1) (y w2) -> b x y w1 w2 d": False, "b d (w1 x) (w2 y) -> b x y w1 w2 d": True}.get(pattern)
    if strided is None:
        raise TokenError(
            f"it is not known how {setting.name!r} gets its windows, by {pattern!r}; slice the map itself, m[...]."
        )
    tokens = cut((down * height, across * width), (height, width), strided=strided)
    return tokens, tokens


@partition("vit_pytorch.mobile_vit.MobileViTBlock")
def mobile_vit_block(self: Any, setting: Setting) -> Tokens:
    """A window takes one pixel of each patch."""
    _, _, rows, columns = setting.block_argument(self, "x")
    return cut((rows, columns), (rows // self.ph, columns // self.pw), strided=True)


def in_windows(size: Sequence[int], window: int | None) -> Tokens:
    """A grid in square windows, padded at its lower and right border; no window, or 0, is all of it."""
    return cut(size, (window, window)) if window else whole(size)


def padded_and_cut(size: Sequence[int], window: Sequence[int], shift: Sequence[int]) -> Tokens:
    """A grid that is padded to whole windows, then rolled up and left, then cut."""
    rows, columns = (int(n) for n in size)
    places = torch.arange(rows * columns).reshape(rows, columns)
    places = F.pad(places, (0, -columns % window[1], 0, -rows % window[0]), value=-1)
    places = places.roll((-shift[0], -shift[1]), (0, 1))
    return Tokens((), (rows, columns), rearrange(places, "(h p) (w q) -> 1 (h w) (p q)", p=window[0], q=window[1]))


# Tokens that come in another order


@layout(
    "vit_pytorch.simple_uvit.Attention",
    "vit_pytorch.simple_vit_with_hyper_connections.Attention",
    "vit_pytorch.simple_vit_with_register_tokens.Attention",
)
def registers_at_the_end(setting: Setting, shape: Shape) -> tuple[Tokens, Tokens]:
    tokens = followed_by(setting, shape, setting.holder("register_tokens").register_tokens)
    return tokens, tokens


@layout(
    "transformers.models.yolos.modeling_yolos.YolosAttention",
    "transformers.models.yolos.modeling_yolos.YolosSelfAttention",
)
def detections_at_the_end(setting: Setting, shape: Shape) -> tuple[Tokens, Tokens]:
    tokens = followed_by(setting, shape, setting.holder("embeddings").embeddings.detection_tokens, ("cls",))
    return tokens, tokens


@layout("transformers.models.groupvit.modeling_groupvit.GroupViTAttention")
def group_tokens_at_the_end(setting: Setting, shape: Shape) -> tuple[Tokens, Tokens]:
    """The first stage sees patches and groups, or groups look at patches; later stages see groups."""
    stage = setting.holder("group_token")
    if setting.holder("stages").stages[0] is not stage:
        raise TokenError(f"{setting.name!r} sees groups of patches, which have no place of their own; slice m[...].")
    if shape[2] != shape[3]:
        return queries_of(shape, keys := setting.tokens(shape[3], prefix=False)), keys
    tokens = followed_by(setting, shape, stage.group_token)
    return tokens, tokens


@layout("vit_pytorch.vat.Attention", "vit_pytorch.vaat.Attention")
def registers_before_the_class_token(setting: Setting, shape: Shape) -> tuple[Tokens, Tokens]:
    """The same class attends to actions and to what other models make of the image, which lies nowhere."""
    trunk: Any = setting.trunk
    registers = getattr(trunk, "register_tokens", None)
    if not isinstance(registers, Tensor) or not hasattr(trunk, "to_patch_embedding"):
        raise TokenError(f"{setting.name!r} is not inside of what cuts the image, and sees other tokens; slice m[...].")
    names = (*(f"reg{i}" for i in range(registers.shape[-2])), "cls")
    tokens = Tokens(names, setting.tokens(shape[3] - len(names), prefix=False).grid_size)
    return queries_of(shape, tokens), tokens


@layout("vit_pytorch.jumbo_vit.Attention")
def jumbo_class_tokens(setting: Setting, shape: Shape) -> tuple[Tokens, Tokens]:
    """A class token that is as wide as several comes as several."""
    patches = len(setting.holder("pos_embedding").pos_embedding)
    names = tuple(f"cls{i}" for i in range(shape[3] - patches))
    tokens = Tokens(names, setting.tokens(patches, prefix=False).grid_size)
    return tokens, tokens


@layout("vit_pytorch.cross_vit.Attention")
def cross_vit_attention(setting: Setting, shape: Shape) -> tuple[Tokens, Tokens]:
    """Patches of two sizes, each with a class token; the class token of one looks at itself and the patches of the other."""
    patches = grid_size(setting.trunk, setting.image_size, shape[3] - 1)
    if patches is None:
        raise TokenError(f"the {shape[3]} tokens of {setting.name!r} are no grid over its image; slice the map itself, m[...].")
    tokens = whole(patches, ("cls",))
    return queries_of(shape, tokens), tokens


@layout("transformers.models.vit_mae.modeling_vit_mae.ViTMAEAttention")
def masked_autoencoder_attention(setting: Setting, shape: Shape) -> tuple[Tokens, Tokens]:
    """The encoder sees the patches that were kept in a random order, the decoder all of them."""
    if not any(name.endswith(".ViTMAEDecoder") for module in setting.path() for name in names_of(module)):
        raise_shuffled(setting)
    tokens = Tokens(("cls",), setting.tokens(shape[3] - 1, prefix=False).grid_size)
    return tokens, tokens


@layout("vit_pytorch.vit.Attention", "vit_pytorch.mp3.Attention")
def maybe_masked_attention(setting: Setting, shape: Shape) -> tuple[Tokens, Tokens]:
    """Wrapped for pretraining, the encoder sees the patches that were kept in a random order."""
    path = list(setting.path())
    for module in path:
        wraps = [name for name in names_of(module) if name in ("vit_pytorch.mae.MAE", "vit_pytorch.mp3.MP3")]
        if wraps and any(part in path for name in ("encoder", "vit") if (part := getattr(module, name, None)) is not None):
            raise_shuffled(setting)
    tokens = setting.tokens(shape[3])
    return queries_of(shape, tokens), tokens


@layout("vit_pytorch.vit_with_patch_dropout.Attention", "vit_pytorch.simple_vit_with_patch_dropout.Attention")
def attention_after_patch_dropout(setting: Setting, shape: Shape) -> tuple[Tokens, Tokens]:
    trunk: Any = setting.trunk
    sides = getattr(trunk.to_patch_embedding[0], "axes_lengths", {})
    if setting.images is None or isinstance(setting.images, Patches) or not {"p1", "p2"} <= set(sides):
        raise TokenError(f"it is not known whether {setting.name!r} sees all patches; slice the map itself, m[...].")
    size = setting.images[1] // sides["p1"], setting.images[2] // sides["p2"]
    tokens = whole(size, ("cls",) * isinstance(getattr(trunk, "cls_token", None), Tensor))
    if len(tokens) != shape[3]:
        raise_shuffled(setting)
    return tokens, tokens


def followed_by(setting: Setting, shape: Shape, tail: Tensor, prefix: tuple[str, ...] = ()) -> Tokens:
    """Prefix tokens and patches, and after them tokens that lie nowhere on the image."""
    after = tail.shape[-2]
    patches = shape[3] - len(prefix) - after
    places = torch.cat((torch.arange(patches), torch.full((after,), -1)))
    return Tokens(prefix, setting.tokens(patches, prefix=False).grid_size, places[None, None])


def raise_shuffled(setting: Setting) -> None:
    """Say that only some patches are left, and nobody knows which.

    Raises:
        TokenError: always.
    """
    raise TokenError(f"{setting.name!r} sees some of the patches, chosen at random; slice the map itself, m[...].")
