"""Models outside timm: all maps are found, are those the model formed, and lie where the image says."""

from __future__ import annotations

import importlib
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from support.inside import find_recipe, registered
from support.models import randomise
from support.oracle import formed
from torch import Tensor, nn

from hookattn import AttentionMap, AttentionRecorder, TokenError, UnreadableError
from hookattn.testing import check_recipe


class Case(NamedTuple):
    """A tiny model and what it is called with.

    Attributes:
        build: makes the model.
        inputs: positional arguments.
        named: arguments by name.
        maps: how many maps there are.
        grid: of the keys of the first map; None where it is known that they are not known to be a grid.
        prefix: names of the tokens before them.
        axes: how the model lays out a map, in the letters of `hookattn.recipes.file_form`, if not by plain reshaping.
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


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b))


@contextmanager
def without_flex(name: str) -> Iterator[None]:
    """vit-pytorch's own softmax in place of flex attention, in which no map can be seen."""
    with pytest.MonkeyPatch.context() as patch:
        if "vit_nd" in name:
            patch.setattr("vit_pytorch.vit_nd_masking.flex_attention_supported", lambda _: False)
        yield


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore")
def test_every_map_of_the_model_is_found_and_is_the_one_that_was_formed(name: str) -> None:
    model, case = made(name)
    with torch.no_grad():
        torch.manual_seed(0)
        before = tensors(model(*case.inputs, **case.named))
    torch.manual_seed(0)
    with AttentionRecorder(model) as rec, torch.no_grad():
        recorded = tensors(model(*case.inputs, **case.named))
    assert same(before, recorded)
    torch.manual_seed(0)
    with formed() as expected, without_flex(name):
        model(*case.inputs, **case.named)
    assert len(rec.maps) == case.maps == len(expected)
    for m, own in zip(rec.maps.values(), expected):
        if case.axes is not None:
            own = own.movedim(case.axes.split().index("w"), 1).flatten(0, 1)
        torch.testing.assert_close(m[...], own.reshape(m.shape).float(), rtol=0, atol=1e-5)
    if "vit_nd" not in name:
        assert rec.verify() < 1e-3
        return
    with pytest.raises(UnreadableError, match="nothing in its forward to put a map into"):  # a kernel of its own
        rec.verify()


EAGER = [name for name in CASES if name.endswith(", sdpa")]


@pytest.mark.parametrize("name", EAGER)
@pytest.mark.filterwarnings("ignore")
def test_maps_under_sdpa_are_those_that_transformers_gives_without_it(name: str) -> None:
    model, case = made(name)
    config = type(model.config)(**{**model.config.to_dict(), "attn_implementation": "eager"})
    eager = type(model)._from_config(config, attn_implementation="eager").eval()
    eager.load_state_dict(model.state_dict())
    torch.manual_seed(0)
    with AttentionRecorder(model.double()) as rec, torch.no_grad():
        model(**{**case.named, "pixel_values": case.named["pixel_values"].double()})
    torch.manual_seed(0)
    with torch.no_grad():
        out = eager.double()(**{**case.named, "pixel_values": case.named["pixel_values"].double(), "output_attentions": True})
    given = [own for own in out.attentions if own is not None]
    maps = rec.maps[1::2] if name.startswith("transformers SwinModel") else rec.maps[:]  # Swin gives the last of each stage
    assert len(maps) >= len(given) >= 2
    for m, own in zip(maps, given):
        torch.testing.assert_close(m[...], own.reshape(m.shape), rtol=0, atol=1e-6)  # their softmax is in float32


# Where tokens lie


def moved_alone(before: Tensor, after: Tensor) -> Tensor:
    """(pieces, keys) by how much each key's share moved on its own in most rows, and not because a row was normalised anew."""
    moved = (after.log() - before.log()).nan_to_num(0.0, 0.0, 0.0)
    alone = (moved - moved.median(-1, keepdim=True).values).abs().masked_fill(before == 0, math.nan)
    return alone.flatten(1, 2).nanmedian(1).values.nan_to_num()


def first_map(model: nn.Module, case: Case, x: Tensor) -> AttentionMap:
    inputs = tuple(x if a is case.inputs[0] else a[:1] for a in case.inputs)
    named = {key: x if key == "pixel_values" else a[:1] if isinstance(a, Tensor) else a for key, a in case.named.items()}
    with AttentionRecorder(model) as rec, torch.no_grad():
        model(*inputs, **named)
    m: AttentionMap = rec.maps[0]
    return m


TWICE = {name for name in CASES if name.replace(", eager", ", sdpa") in set(CASES) - {name}}
UNSEEN = {"vit_pytorch crossformer": "runs in float32 alone", "vit_pytorch levit": "shares of zero"}


@pytest.mark.parametrize("name", [n for n, case in CASES.items() if case.grid is not None and n not in {*UNSEEN, *TWICE}])
@pytest.mark.filterwarnings("ignore")
def test_what_moves_with_a_point_of_the_image_is_the_token_that_lies_there(name: str) -> None:
    model, case = made(name)
    model.double()
    x = (case.inputs[0] if case.inputs else case.named["pixel_values"])[:1].double()
    m = first_map(model, case, x)
    before = m[...]
    tokens = m.tokens
    assert (tokens.prefix, tokens.grid_size) == (case.prefix, case.grid)
    (rows, columns), (height, width) = tokens.grid_size, x.shape[-2:]
    for row, column in [
        (0, 0),
        (rows - 1, columns - 1),
        (rows // 2, columns // 3),
        (1, columns // 2),
        (rows // 3, columns - 2),
    ]:
        y, left = int((row + 0.5) * height / rows), int((column + 0.5) * width / columns)
        touched = x.clone()
        touched[:, :, y - 1 : y + 1, left - 1 : left + 1] += 1
        piece, key = divmod(int(moved_alone(before, first_map(model, case, touched)[...]).argmax()), before.shape[-1])
        near = [
            tokens.select((r, c))[0]
            for r in range(max(0, row - case.slack), min(rows, row + case.slack + 1))
            for c in range(max(0, column - case.slack), min(columns, column + case.slack + 1))
        ]
        assert torch.stack(near).any(0)[piece, key], ((row, column), (piece, key))


PREFIX = {"cls": ("cls_token", "class_token", "class_embedding"), "dist": ("distillation_token",)}
PREFIX["reg"] = ("register_tokens", "reg_token")


@pytest.mark.parametrize("name", [n for n, case in CASES.items() if case.prefix and "jumbo" not in n and n not in TWICE])
@pytest.mark.filterwarnings("ignore")
def test_a_prefix_token_moves_with_the_parameter_it_is_named_for(name: str) -> None:
    model, case = made(name)
    model.double()
    x = (case.inputs[0] if case.inputs else case.named["pixel_values"])[:1].double()
    before = first_map(model, case, x)[...]
    for kind, parameters in PREFIX.items():
        wanted = [i for i, prefix in enumerate(case.prefix) if prefix.startswith(kind)]
        token = next((p for n, p in model.named_parameters() if n.split(".")[-1] in parameters), None)
        if not wanted:
            continue
        assert token is not None
        with torch.no_grad():
            token.add_(torch.randn_like(token))
        moved = moved_alone(before, first_map(model, case, x)[...])[0]
        with torch.no_grad():
            before = first_map(model, case, x)[...]
        assert moved.topk(len(wanted)).indices.sort().values.tolist() == wanted


def test_the_second_block_of_a_swin_is_shifted_and_put_back() -> None:
    """With the first block silenced, a point of the image moves one token of the second."""
    for name in ("torchvision swin", "torchvision swin, padded", "torchvision swin v2"):
        model, case = made(name)
        first = model.features[1][0]  # type: ignore[index]
        with torch.no_grad():
            for parameter in first.attn.proj.parameters():
                parameter.zero_()
        model.double()
        x = case.inputs[0][:1].double()

        def shifted(x: Tensor, model: nn.Module = model) -> AttentionMap:
            with AttentionRecorder(model) as rec, torch.no_grad():
                model(x)
            m: AttentionMap = rec.maps[1]
            return m

        before, tokens = shifted(x)[...], shifted(x).tokens
        for row, column in [(0, 0), (15, 23), (7, 8), (2, 21), (14, 1)]:
            touched = x.clone()
            touched[:, :, row * 4 + 1 : row * 4 + 3, column * 4 + 1 : column * 4 + 3] += 1
            moved = moved_alone(before, shifted(touched)[...])
            assert (moved > 1e-9).nonzero().tolist() == tokens.select((row, column))[0].nonzero().tolist()


@pytest.mark.filterwarnings("ignore")
def test_a_swin_that_small_images_have_changed_for_good_still_tells_where_earlier_tokens_lie() -> None:
    pytest.importorskip("transformers")
    model = transformers_model("SwinModel", {**SWIN, "depths": [2], "num_heads": [2], "window_size": 4}, "sdpa")().eval()

    def second(size: int) -> AttentionMap:
        with AttentionRecorder(model) as rec, torch.no_grad():
            model(image(size, size))
        m: AttentionMap = rec.maps[1]
        return m

    large = second(64)
    assert large.tokens.places is not None
    places = large.tokens.places.tolist()
    assert places[0][0][0] == 2 * 16 + 2
    assert second(16).tokens.windows == 1
    assert large.tokens.places is not None
    assert large.tokens.places.tolist() == places
    later = second(64).tokens.places
    assert later is not None
    assert later[0, 0, 0] == 0


@pytest.mark.parametrize("name", [name for name in CASES if CASES[name].grid is None])
@pytest.mark.filterwarnings("ignore")
def test_tokens_that_are_no_grid_of_the_image_are_refused(name: str) -> None:
    model, case = made(name)
    with AttentionRecorder(model) as rec, torch.no_grad():
        model(*case.inputs, **case.named)
    with pytest.raises(TokenError):
        rec.maps[0].image("mean")


def test_patches_that_were_dropped_are_not_taken_for_a_coarser_grid() -> None:
    pytest.importorskip("vit_pytorch")
    for module, cls in (("vit_with_patch_dropout", "ViT"), ("simple_vit_with_patch_dropout", "SimpleViT")):
        package = importlib.import_module(f"vit_pytorch.{module}")
        model = getattr(package, cls)(image_size=64, **SMALL, patch_dropout=0.75).train()
        with AttentionRecorder(model) as rec, torch.no_grad():
            model(SQUARE)
        assert rec.maps[0].shape[-1] in (4, 5)
        with pytest.raises(TokenError, match="chosen at random"):
            rec.maps[0].image("mean")


@pytest.mark.parametrize("name", ["transformers CLIPModel", "open_clip CLIP"])
@pytest.mark.filterwarnings("ignore")
def test_words_are_no_patches_however_many_there_are(name: str) -> None:
    model, case = made(name)
    words = torch.arange(32).reshape(2, 16)  # as many as there are patches
    with AttentionRecorder(model) as rec, torch.no_grad():
        if case.named:
            model(**{**case.named, "input_ids": words})
        else:
            model(case.inputs[0], words)
    towers = {name.split(".")[0]: m for name, m in rec.maps.items()}
    assert len(towers) == 2
    for name, m in towers.items():
        if name.startswith("vis"):
            assert m.tokens.grid_size == (4, 4)
            continue
        assert m.shape[-1] == 16
        with pytest.raises(TokenError, match="may be words"):
            m.image("mean")


# Ways to call


@pytest.mark.parametrize("name", ["transformers Dinov2WithRegistersModel, sdpa", "transformers CLIPModel", "open_clip CLIP"])
@pytest.mark.filterwarnings("ignore")
def test_maps_kept_while_the_model_runs_are_the_same(name: str) -> None:
    model, case = made(name)
    with AttentionRecorder(model) as late, torch.no_grad():
        model(*case.inputs, **case.named)
    with AttentionRecorder(model, keep="maps") as kept, torch.no_grad():
        model(*case.inputs, **case.named)
    assert list(late.maps) == list(kept.maps)
    for a, b in zip(late.maps.values(), kept.maps.values()):
        assert torch.equal(a[...], b[...])


@pytest.mark.parametrize(
    "name", ["torchvision swin", "transformers DINOv3ViTModel, sdpa", "open_clip visual", "vit_pytorch vit"]
)
@pytest.mark.filterwarnings("ignore")
def test_autocast_changes_neither_output_nor_precision(name: str) -> None:
    model, case = made(name)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        before = tensors(model(*case.inputs, **case.named))
        with AttentionRecorder(model) as rec:
            assert same(before, tensors(model(*case.inputs, **case.named)))
    with AttentionRecorder(model) as exact, torch.no_grad():
        model(*case.inputs, **case.named)
    m = rec.maps[0]
    assert m.dtype == torch.float32
    torch.testing.assert_close(m[...].sum(-1), torch.ones(m.shape[:-1]))
    torch.testing.assert_close(m[...], exact.maps[0][...], rtol=0, atol=0.1)
    rec.verify()


@pytest.mark.filterwarnings("ignore")
def test_images_that_come_as_patches_lie_on_grids_of_their_own() -> None:
    transformers = pytest.importorskip("transformers")
    tiny = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_patches": 16}
    model = transformers.Siglip2VisionModel(transformers.Siglip2VisionConfig(**tiny, patch_size=4)).eval()
    patches = torch.randn(2, 12, 48)
    shapes, mask = torch.tensor([[3, 4], [2, 5]]), torch.ones(2, 12, dtype=torch.long)
    mask[1, 10:] = 0
    with AttentionRecorder(model) as rec, torch.no_grad():
        model(pixel_values=patches, pixel_attention_mask=mask, spatial_shapes=shapes)
    m = rec.maps[0]
    assert m.tokens.grid_size == (3, 5)
    picture, rows = m.image((1, 3)), m[...].mean(1)
    torch.testing.assert_close(picture[0, :3, :4], rows[0, 7].reshape(3, 4))
    torch.testing.assert_close(picture[1, :2], rows[1, 8, :10].reshape(2, 5))
    assert float(picture[0, :, 4].sum() + picture[1, 2].sum()) == 0


# Encoders of transformers that have a recipe


@pytest.mark.parametrize("name", [name for name in registered() if name.startswith("transformers.")])
def test_encoders_of_transformers_are_read_by_recipe(name: str) -> None:
    """In float64; their own softmax would be in float32."""
    pytest.importorskip("transformers")
    place, _, cls = name.rpartition(".")
    try:
        module = importlib.import_module(place)
        attention = getattr(module, cls)
    except (ImportError, AttributeError):
        pytest.skip(f"this version of transformers has no {cls}")
    kind = max((name for name in vars(module) if name.endswith("Config") and name != "PreTrainedConfig"), key=len)
    config = getattr(module, kind)(hidden_size=32, num_attention_heads=4)
    config._attn_implementation = "sdpa"
    built, version = attention(config), importlib.import_module("transformers").__version__
    if version.startswith("4.") and not (hasattr(built, "is_causal") and find_recipe(built)):
        pytest.skip(f"{cls} of transformers 4 is run again, or what it holds is read")
    check_recipe(built, torch.randn(2, 9, 32))


def test_what_a_recipe_does_not_describe_is_run_again() -> None:
    """Masks of text towers."""
    model, case = made("transformers CLIPModel")
    name = "text_model.encoder.layers.0.self_attn"
    assert find_recipe(model.get_submodule(name)) is not None
    for options in ({}, {"keep": "maps"}):
        with AttentionRecorder(model, name, **options) as rec, torch.no_grad():
            model(*case.inputs, **case.named)
        m = rec.maps[0]
        assert m.shape == tuple(m[...].shape)
        assert torch.equal(m[...], m[...].tril())
    with pytest.raises(UnreadableError, match="does not describe"):
        check_recipe(model.get_submodule(name), torch.randn(2, 5, 32), attention_mask=torch.zeros(2, 1, 5, 5))
