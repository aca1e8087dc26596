"""Tiny models outside timm, what they are called with, how many maps they form and where these lie."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from support.models import randomise


class Case(NamedTuple):
    """A tiny model and what it is called with.

    Attributes:
        build: makes the model.
        inputs: positional arguments.
        named: arguments by name.
        maps: how many maps there are.
        grid: of the keys of the first map; None where it is known that they are not known to be a grid.
        prefix: names of the tokens before them.
        axes: how the model lays out a map, in the letters of `hookattn.recipes.register_axes`, if not by plain reshaping.
        slack: by how many patches a stem of overlapping convolutions may blur a point.
    """

    build: Callable[[], nn.Module]
    inputs: tuple[Any, ...]
    named: dict[str, Any]
    maps: int
    grid: tuple[int, int] | None
    prefix: tuple[str, ...] = ()
    axes: str | None = None
    slack: int = 0


CASES: dict[str, Case] = {}


def image(*size: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(0))


def names(kind: str, count: int) -> tuple[str, ...]:
    return tuple(f"{kind}{i}" for i in range(count))


# torchvision


def torchvision(name: str, build: Callable[[], nn.Module], x: Tensor, maps: int, grid: Any, *prefix: str, **more: Any) -> None:
    CASES[f"torchvision {name}"] = Case(build, (x,), {}, maps, grid, prefix, **more)


def torchvision_vit() -> nn.Module:
    return importlib.import_module("torchvision.models").VisionTransformer(64, 16, 2, 4, 32, 48)  # type: ignore[no-any-return]


def torchvision_swin(window: int, version: int = 1) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        swin = importlib.import_module("torchvision.models.swin_transformer")
        v2 = {"block": swin.SwinTransformerBlockV2, "downsample_layer": swin.PatchMergingV2} if version == 2 else {}
        return swin.SwinTransformer([4, 4], 16, [2, 2], [2, 4], [window, window], **v2)  # type: ignore[no-any-return]

    return build


def torchvision_maxvit() -> nn.Module:
    maxvit = importlib.import_module("torchvision.models").MaxVit
    return maxvit((64, 64), 8, 4, [16, 16], [1, 1], 8, 0.1)  # type: ignore[no-any-return]


torchvision("vit", torchvision_vit, image(64, 64), 2, (4, 4), "cls")
torchvision("swin", torchvision_swin(4), image(64, 96), 4, (16, 24))
torchvision("swin, padded", torchvision_swin(5), image(64, 96), 4, (16, 24))
torchvision("swin v2", torchvision_swin(4, 2), image(64, 96), 4, (16, 24))
torchvision("maxvit", torchvision_maxvit, image(64, 64), 4, (16, 16), slack=2)

# transformers: model, configuration, what it is made with

VIT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
PATCH16 = {**VIT, "image_size": 64, "patch_size": 16}
PATCH14 = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 56, "patch_size": 14}
SWIN = {"image_size": 64, "patch_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4]}
WORDS = {**VIT, "vocab_size": 99, "max_position_embeddings": 16, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
SAM = {"mlp_dim": 48, "patch_size": 8, "image_size": 64, "window_size": 3, "output_channels": 16, "global_attn_indexes": [1]}
STAGES = {"depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 2, 2], "hidden_sizes": [16, 16, 32, 32]}


def transformers(model: str, config: dict[str, Any], x: Tensor, maps: int, grid: Any, *prefix: str, **more: Any) -> None:
    kinds = more.pop("kinds", ("sdpa", "eager"))
    name, named = more.pop("name", model), {"pixel_values": x, **more.pop("named", {})}
    for kind in kinds:
        build = transformers_model(model, config, kind)
        CASES[f"transformers {name}, {kind}"] = Case(build, (), named, maps, grid, prefix, **more)


def transformers_model(model: str, config: dict[str, Any], kind: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        package = importlib.import_module("transformers")
        package.utils.logging.set_verbosity_error()
        cls = getattr(package, model)
        return cls._from_config(cls.config_class(**config), attn_implementation=kind)  # type: ignore[no-any-return]

    return build


DINOV2 = {**PATCH14, "mlp_ratio": 2}
HIERA = {"embed_dim": 16, "image_size": [64, 64], "depths": [1, 2, 1, 1], "num_heads": [1, 2, 2, 2]}
REG4 = ("cls", *names("reg", 4))
transformers("ViTModel", PATCH16, image(64, 96), 2, (4, 6), "cls", named={"interpolate_pos_encoding": True})
transformers("DeiTModel", PATCH16, image(64, 64), 2, (4, 4), "cls", "dist")
transformers("Dinov2Model", DINOV2, image(56, 84), 2, (4, 6), "cls")
transformers("Dinov2WithRegistersModel", {**DINOV2, "num_register_tokens": 4}, image(56, 84), 2, (4, 6), *REG4)
transformers("DINOv3ViTModel", {**PATCH16, "num_register_tokens": 4}, image(64, 96), 2, (4, 6), *REG4)
transformers("CLIPVisionModel", PATCH16, image(64, 64), 2, (4, 4), "cls")
transformers("SiglipVisionModel", PATCH16, image(64, 64), 3, (4, 4))
transformers("BeitModel", {**PATCH16, "use_relative_position_bias": True}, image(64, 64), 2, (4, 4), "cls")
transformers("SwinModel", {**SWIN, "window_size": 4}, image(64, 96), 4, (16, 24))
transformers("SwinModel", {**SWIN, "window_size": 5}, image(64, 96), 4, (16, 24), name="SwinModel, padded")
transformers("Swinv2Model", {**SWIN, "window_size": 4}, image(64, 96), 4, (16, 24), kinds=("eager",))
transformers("HieraModel", HIERA, image(64, 64), 5, (16, 16), kinds=("eager",), axes="b h w q k", slack=1)
transformers("PvtV2Model", {**STAGES, "image_size": 64}, image(64, 64), 4, (2, 2), kinds=("eager",), slack=1)
transformers("SegformerModel", STAGES, image(64, 128), 4, (2, 4), slack=1)
transformers(
    "SamVisionModel", {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, **SAM}, image(64, 64), 2, (8, 8)
)
transformers("YolosModel", {**PATCH16, "image_size": [64, 64], "num_detection_tokens": 5}, image(64, 64), 2, (4, 4), "cls")
transformers("ViTMAEModel", {**PATCH16, "patch_size": 8}, image(64, 64), 2, None)


def timm_wrapper() -> nn.Module:
    package = importlib.import_module("transformers")
    arguments = {"img_size": 56, "depth": 2, "embed_dim": 48, "num_heads": 3}
    config = package.TimmWrapperConfig(architecture="vit_small_patch14_reg4_dinov2", model_args=arguments)
    return package.TimmWrapperModel(config)  # type: ignore[no-any-return]


CASES["transformers TimmWrapperModel"] = Case(timm_wrapper, (), {"pixel_values": image(56, 56)}, 2, (4, 4), REG4)
CASES["transformers CLIPModel"] = Case(
    transformers_model("CLIPModel", {"text_config": WORDS, "vision_config": PATCH16, "projection_dim": 16}, "sdpa"),
    (),
    {"input_ids": torch.arange(24).reshape(2, 12), "pixel_values": image(64, 64)},
    4,
    (4, 4),
    ("cls",),
)

# open_clip

VISION = {"layers": 2, "width": 32, "head_width": 8, "patch_size": 16, "image_size": 64}
TEXT = {"context_length": 16, "vocab_size": 99, "width": 32, "heads": 4, "layers": 2}


def open_clip(**options: Any) -> Callable[[], nn.Module]:
    return lambda: importlib.import_module("open_clip.model").CLIP(16, {**VISION, **options}, TEXT)


def open_clip_visual(**options: Any) -> Callable[[], nn.Module]:
    return lambda: open_clip(**options)().visual  # type: ignore[return-value]


POOLER = {"attentional_pool": True, "attn_pooler_heads": 4, "attn_pooler_queries": 6}
CASES["open_clip visual"] = Case(open_clip_visual(), (image(64, 64),), {}, 2, (4, 4), ("cls",))
CASES["open_clip visual, own blocks"] = Case(
    open_clip_visual(block_type="custom", qk_norm=True), (image(64, 64),), {}, 2, (4, 4), ("cls",)
)
CASES["open_clip visual, pooler"] = Case(open_clip_visual(**POOLER), (image(64, 64),), {}, 3, (4, 4), ("cls",))
CASES["open_clip CLIP"] = Case(open_clip(), (image(64, 64), torch.arange(32).reshape(2, 16)), {}, 4, (4, 4), ("cls",))

# vit-pytorch

SMALL = {"num_classes": 5, "dim": 32, "depth": 2, "heads": 3, "mlp_dim": 48, "dim_head": 8, "patch_size": 16}
ND = {**SMALL, "ndim": 2, "input_shape": (64, 96)}


def vit_pytorch(module: str, cls: str, x: Tensor, maps: int, grid: Any, *prefix: str, **more: Any) -> None:
    test = {key: more.pop(key) for key in ("slack", "axes") if key in more}
    size = tuple(x.shape[-2:])
    given = more.pop("given", {**SMALL, "image_size": size if size[0] != size[1] else size[0]})
    what = module + ", ".join(["", *(f"{key}={value}" for key, value in more.items())])

    def build() -> nn.Module:
        return getattr(importlib.import_module(f"vit_pytorch.{module}"), cls)(**{**given, **more})  # type: ignore[no-any-return]

    CASES[f"vit_pytorch {what}"] = Case(build, (x,), {}, maps, grid, prefix, **test)


WIDE, SQUARE, HALF = image(64, 96), image(64, 64), image(64, 128)
vit_pytorch("vit", "ViT", WIDE, 2, (4, 6), "cls")
vit_pytorch("vit", "ViT", WIDE, 2, (4, 6), pool="mean")
vit_pytorch("simple_vit", "SimpleViT", WIDE, 2, (4, 6))
vit_pytorch("simple_flash_attn_vit", "SimpleViT", WIDE, 2, (4, 6))
vit_pytorch("simple_uvit", "SimpleUViT", WIDE, 2, (4, 6))
vit_pytorch("simple_vit_with_register_tokens", "SimpleViT", WIDE, 2, (4, 6))
vit_pytorch("simple_vit_with_hyper_connections", "SimpleViT", WIDE, 2, (4, 6), num_residual_streams=2)
vit_pytorch("simple_vit_with_sparse_gating", "SimpleViTWithSparseGating", WIDE, 2, (4, 6), *names("reg", 4))
vit_pytorch("simple_vit_with_specialized_cls", "SimpleViT", WIDE, 2, (4, 6), "cls")
vit_pytorch("vat", "ViT", WIDE, 2, (4, 6), "reg0", "reg1", "cls", num_register_tokens=2)
vit_pytorch("jumbo_vit", "JumboViT", WIDE, 2, (4, 6), "cls0", "cls1", jumbo_cls_k=2)
vit_pytorch("vit_5", "ViT", SQUARE, 2, (4, 4), *REG4)
for kind in ("patch_dropout", "qk_norm", "value_residual", "relative_proj_pos_bias"):
    vit_pytorch(f"simple_vit_with_{kind}", "SimpleViT", WIDE, 2, (4, 6))
vit_pytorch("simple_vit_orthog_residual_update", "SimpleViT", WIDE, 2, (4, 6))
vit_pytorch("simple_vit_attn_residual", "SimpleViTAttnResidual", WIDE, 6, (4, 6))
vit_pytorch("simple_vit_with_fft", "SimpleViT", WIDE, 2, None, freq_patch_size=8)
for module in ("learnable_memory_vit", "parallel_vit", "vit_with_decorr", "vit_with_keel_post_ln", "vit_with_patch_dropout"):
    vit_pytorch(module, "ViT", WIDE, 4 if module == "parallel_vit" else 2, (4, 6), "cls")
vit_pytorch("vit_for_small_dataset", "ViT", WIDE, 2, (4, 6), "cls", slack=1)
vit_pytorch("vit_with_patch_merger", "ViT", WIDE, 3, (4, 6), patch_merge_layer=1, patch_merge_num_tokens=4)
vit_pytorch("vit_detpool", "ViTDetPool", WIDE, 2, (4, 6), "cls")
vit_pytorch("ats_vit", "ViT", WIDE, 2, (4, 6), "cls", max_tokens_per_depth=(8, 4))
vit_pytorch("normalized_vit", "nViT", WIDE, 2, (4, 6))
vit_pytorch("mp3", "ViT", WIDE, 2, (4, 6))
vit_pytorch("deepvit", "DeepViT", SQUARE, 2, (4, 4), "cls")
vit_pytorch("cait", "CaiT", SQUARE, 3, (4, 4), cls_depth=1)
vit_pytorch("xcit", "XCiT", SQUARE, 3, None, cls_depth=1)
vit_pytorch("rvt", "RvT", SQUARE, 2, (4, 4), "cls", slack=1)
vit_pytorch("vit_nd", "ViTND", WIDE, 2, (4, 6), "cls", given=ND, causal_dims=0)
vit_pytorch("vit_nd_rotary", "ViTND", WIDE, 2, (4, 6), given=ND, causal_dims=0)
vit_pytorch("vit_nd_pope", "ViTND", WIDE, 2, (4, 6), given=ND, causal_dims=0)
LEVIT = {
    "image_size": 64,
    "num_classes": 5,
    "dim": (16, 24),
    "depth": 1,
    "heads": (2, 3),
    "mlp_mult": 2,
    "stages": 2,
    "dim_key": 8,
}
vit_pytorch("levit", "LeViT", SQUARE, 3, (4, 4), given=LEVIT, slack=2)
LOOP = {**SMALL, "image_size": 64, "pre_loop_depth": 1, "num_looped_blocks": 1, "post_loop_depth": 1, "loop_depth": 3}
vit_pytorch("looped_vit", "LoopedViT", SQUARE, 5, (4, 4), "cls", given={k: v for k, v in LOOP.items() if k != "depth"})
LARGE = {"lg_patch_size": 16, "lg_enc_depth": 1, "lg_enc_heads": 2, "cross_attn_depth": 1, "depth": 1, "sm_patch_size": 8}
CROSS = {"image_size": 64, "num_classes": 5, "sm_dim": 24, "lg_dim": 32, **LARGE}
vit_pytorch("cross_vit", "CrossViT", SQUARE, 4, (8, 8), "cls", given=CROSS)
CVT = {"num_classes": 5, **{f"s{i}_{what}": n for i in (1, 2, 3) for what, n in (("emb_dim", 16), ("heads", i), ("depth", 1))}}
vit_pytorch("cvt", "CvT", WIDE, 3, (8, 12), given=CVT, slack=1)
CHANNELS = [16, 16, 24, 24, 48, 48, 64, 64, 80, 80, 96]
MOBILE = {"image_size": (64, 128), "dims": [24, 32, 40], "channels": CHANNELS, "num_classes": 5}
vit_pytorch("mobile_vit", "MobileViT", HALF, 9, (8, 16), given=MOBILE, slack=2)
MAX = {"num_classes": 5, "dim": 16, "depth": (1, 1), "dim_head": 8, "window_size": 4}
vit_pytorch("max_vit", "MaxViT", HALF, 4, (16, 32), given=MAX, slack=2)
NEST = {
    "image_size": 64,
    "patch_size": 4,
    "dim": 16,
    "heads": 2,
    "num_hierarchies": 3,
    "block_repeats": (1, 1, 1),
    "num_classes": 5,
}
vit_pytorch("nest", "NesT", SQUARE, 3, (16, 16), given=NEST)
FORMER = {"dim": (32, 32, 64, 64), "depth": (1, 1, 1, 1), "global_window_size": (4, 2, 2, 1), "local_window_size": 2}
vit_pytorch("crossformer", "CrossFormer", HALF, 8, (16, 32), given=FORMER, slack=4)
SIZES = {f"s{i}_{what}": n for i in (1, 2, 3, 4) for what, n in (("emb_dim", 16), ("depth", 1), ("global_k", 5 - i))}
TWINS = {"num_classes": 5, **SIZES, "s1_local_patch_size": 4, "s2_local_patch_size": 4}
TWINS |= {"s1_global_k": 4, "s2_global_k": 4, "s3_local_patch_size": 2, "s4_local_patch_size": 1, "s4_global_k": 1}
vit_pytorch("twins_svt", "TwinsSVT", HALF, 14, (16, 32), given={**TWINS, "s3_global_k": 2})
SCALE = {"num_classes": 5, "dim": 16, "heads": (2, 2), "depth": (1, 1), "reduction_factor": (2, 2), "window_size": (4, None)}
vit_pytorch("scalable_vit", "ScalableViT", HALF, 4, (8, 16), given=SCALE, slack=1)
REGION = {"dim": (16, 16, 32, 32), "depth": (1, 1, 1, 1), "window_size": 2, "num_classes": 5}
vit_pytorch("regionvit", "RegionViT", HALF, 8, (8, 16), given=REGION)


def made(name: str) -> tuple[nn.Module, Case]:
    pytest.importorskip(name.split()[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of the packages
        return randomise(CASES[name].build(), 0.3).eval(), CASES[name]


def tensors(output: Any) -> list[Tensor]:
    leaves = torch.utils._pytree.tree_leaves(dict(output.items()) if hasattr(output, "items") else output)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def alike(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b))


@contextmanager
def without_flex(name: str) -> Iterator[None]:
    """vit-pytorch's own softmax in place of flex attention, in which no map can be seen."""
    with pytest.MonkeyPatch.context() as patch:
        if "vit_nd" in name:
            patch.setattr("vit_pytorch.vit_nd_masking.flex_attention_supported", lambda _: False)
        yield
