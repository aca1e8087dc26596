"""Tiny models of packages that hookattn knows little of: how each is called, and how its own source lays out what it forms."""

from __future__ import annotations

import importlib
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from support.models import randomise
from support.modes import Functions

Arrange = Callable[[list[Tensor]], Tensor]


class Case(NamedTuple):
    """A tiny model and how it is called.

    Attributes:
        build: makes the model.
        call: runs it; of several forwards the last is the one that is read.
        maps: how many maps each class of attention forms.
        axes: by class, how what it forms in one call becomes (images * windows, heads, queries, keys), if it is not that.
        refused: by class, why its maps are not given out.
    """

    build: Callable[[], nn.Module]
    call: Callable[[Any], Any]
    maps: Mapping[str, int]
    axes: Mapping[str, Arrange] = {}
    refused: Mapping[str, str] = {}


CASES: dict[str, Case] = {}


def case(name: str, build: Callable[[], nn.Module], call: Callable[[Any], Any], maps: Mapping[str, int], **more: Any) -> None:
    CASES[name] = Case(build, call, maps, **more)


def made(name: str) -> tuple[nn.Module, Case]:
    pytest.importorskip(name.split()[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of the packages
        return randomise(CASES[name].build(), 0.3).eval(), CASES[name]


# How a class lays out what it forms


def split(heads: int) -> Arrange:
    """Images and heads merged, images first."""
    return lambda formed: rearrange(torch.cat(formed), "(b h) q k -> b h q k", h=heads)


def one_query(formed: list[Tensor]) -> Tensor:
    """Heads of a group in the place of queries, where there is one query."""
    return formed[0] if formed[0].shape[2] == 1 else rearrange(formed[0], "b g h k -> b (g h) 1 k")


def merged(formed: list[Tensor]) -> Tensor:
    """Images and windows apart."""
    return formed[0].flatten(0, 1)


def padded(formed: list[Tensor]) -> Tensor:
    """One window after the other, smaller ones with nothing at the end."""
    most = max(each.shape[-1] for each in formed)
    return torch.cat([F.pad(each, (0, most - each.shape[-1], 0, most - each.shape[-2])) for each in formed])


def grouped(formed: list[Tensor]) -> Tensor:
    """Heads that share keys stand where queries would."""
    return rearrange(formed[0], "b g h k -> b (g h) 1 k")


def banded(formed: list[Tensor]) -> Tensor:
    """Of each token the two before it to the two behind it, as blocks of two queries and the six keys around them."""
    band = rearrange(formed[0], "b (w q) h k -> (b w) h q k", q=2)
    return torch.stack([F.pad(band[:, :, 0], (0, 1)), F.pad(band[:, :, 1], (1, 0))], 2)


# What a layer forms


@contextmanager
def formed_by_layer(model: nn.Module, layers: list[str]) -> Iterator[dict[str, list[Tensor]]]:
    """Every softmax and SDPA map of the last forward of a model, by the layer that formed it; `name#1` is its second call."""
    formed, calls, running, modules = dict[str, list[Tensor]](), dict[str, int](), list[str](), dict(model.named_modules())

    def begin() -> None:
        formed.clear()
        calls.clear()

    def enter(name: str) -> None:
        calls[name] = calls.get(name, -1) + 1
        running.append(f"{name}#{calls[name]}" if calls[name] else name)

    def see(func: Any, out: Any, args: Any, kwargs: Any) -> None:
        made = None
        if func is F.scaled_dot_product_attention:
            made = _attention(*args, **kwargs)
        elif func in (torch.softmax, Tensor.softmax, F.softmax):
            made = out.clone()
        elif func is F.multi_head_attention_forward:
            made = func(*args, **{**kwargs, "need_weights": True, "average_attn_weights": False})[1]
        if made is not None and running:
            formed.setdefault(running[-1], []).append(made.detach())

    with ExitStack() as stack:
        for hook in [model.register_forward_pre_hook(lambda *_: begin())]:
            stack.callback(hook.remove)
        for name in layers:
            stack.callback(modules[name].register_forward_pre_hook(lambda *_, name=name: enter(name)).remove)
            stack.callback(modules[name].register_forward_hook(lambda *_: [running.pop(), None][1]).remove)
        with Functions(see), torch.no_grad():
            yield formed


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        scores = scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool).tril(), -math.inf)
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -math.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    return scores.softmax(-1).nan_to_num(0)  # of a token that sees none: the kernel puts out zeros


# transformers: class, configuration, call

KINDS = ("eager", "sdpa")


def numbers(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def image(*size: int) -> Tensor:
    return numbers(2, 3, *size)


def words(count: int, batch: int = 2) -> Tensor:
    return torch.arange(3, 3 + batch * count).reshape(batch, count)


def transformers(
    model: str, config: Any, call: Callable[[Any], Any], maps: Mapping[str, int], *, kinds: tuple[str, ...] = KINDS, **more: Any
) -> None:
    """A model of transformers, with what its configuration holds; models that are not exported are told by their file."""
    name = f"{model.rpartition('.')[2]}{more.pop('what', '')}"
    for kind in kinds:
        case(f"transformers {name}, {kind}", _transformers(model, config, kind), call, maps, **more)


def _transformers(model: str, config: Any, kind: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        package = importlib.import_module("transformers")
        package.utils.logging.set_verbosity_error()
        file, _, cls = model.rpartition(".")
        if file and not hasattr(importlib.import_module(f"transformers.models.{file}.modeling_{file}"), cls):
            pytest.skip(f"this version of transformers has no {cls}")
        kind_of = getattr(importlib.import_module(f"transformers.models.{file}.modeling_{file}"), cls) if file else None
        kind_of = kind_of or getattr(package, cls, None) or pytest.skip(f"this version of transformers has no {cls}")
        given = config() if callable(config) else config
        return kind_of._from_config(kind_of.config_class(**given), attn_implementation=kind)  # type: ignore[no-any-return]

    return build


VIT = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 16}
PATCH8 = {**VIT, "image_size": 32, "patch_size": 8}
DETR = {"d_model": 24, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "num_queries": 5}
DETR |= {"encoder_attention_heads": 3, "decoder_attention_heads": 3}


def resnet(**more: Any) -> Callable[[], dict[str, Any]]:
    """What a detector is made with on top of a tiny backbone."""

    def config() -> dict[str, Any]:
        sizes = {"embedding_size": 8, "hidden_sizes": [8, 12], "depths": [1, 1], "layer_type": "basic"}
        stages = ["stage1", "stage2"] if "num_feature_levels" in more else ["stage2"]
        backbone = importlib.import_module("transformers").ResNetConfig(**sizes, out_features=stages)
        return {"backbone_config": backbone, "use_timm_backbone": False, "use_pretrained_backbone": False, **more}

    return config


def swin_backbone(**more: Any) -> Callable[[], dict[str, Any]]:
    def config() -> dict[str, Any]:
        package = importlib.import_module("transformers")
        sizes = {"image_size": 64, "patch_size": 4, "embed_dim": 16, "depths": [1] * 4, "num_heads": [1, 2, 2, 2]}
        backbone = package.SwinConfig(**sizes, window_size=4, out_features=[f"stage{i}" for i in (1, 2, 3, 4)])
        decoder = {"decoder_config": package.DetrConfig(**DETR)} if "fpn_feature_size" in more else {}
        return {"backbone_config": backbone, "use_pretrained_backbone": False, **decoder, **more}

    return config


SAM_VISION = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "mlp_dim": 16, "patch_size": 8}
SAM_VISION |= {"image_size": 56, "window_size": 3, "output_channels": 16, "global_attn_indexes": [1], "num_pos_feats": 8}
SAM_PROMPT = {"hidden_size": 16, "image_size": 56, "patch_size": 8, "mask_input_channels": 4}
SAM_DECODER = {"hidden_size": 16, "mlp_dim": 24, "num_attention_heads": 2, "iou_head_hidden_dim": 16, "num_hidden_layers": 2}
for kind, cls, axes in (
    ("eager", "SamVisionAttention", split(3)),
    ("sdpa", "SamVisionSdpaAttention", lambda formed: formed[0]),
):
    transformers(
        "SamModel",
        {"vision_config": SAM_VISION, "prompt_encoder_config": SAM_PROMPT, "mask_decoder_config": SAM_DECODER},
        lambda m: m(pixel_values=image(56, 56), input_points=numbers(2, 3, 1, 2).abs() * 20),
        {cls: 2, "SamAttention": 7},
        kinds=(kind,),
        axes={cls: axes},
    )
PIXELS = (torch.arange(96).expand(2, 64, 96) < torch.tensor([96, 50]).view(2, 1, 1)).long()
for model, kinds in (("DetrModel", ("eager",)), ("TableTransformerModel", ("eager",))):
    own = {"DetrSelfAttention": 2, "DetrCrossAttention": 1} if model == "DetrModel" else {"TableTransformerAttention": 3}
    axes = {"TableTransformerAttention": split(3)}
    transformers(model, resnet(**DETR), lambda m: m(image(64, 96), pixel_mask=PIXELS), own, kinds=kinds, axes=axes)
transformers(
    "DeformableDetrModel",
    resnet(**{**DETR, "d_model": 32, "encoder_attention_heads": 4, "decoder_attention_heads": 4}, num_feature_levels=2),
    lambda m: m(image(64, 96)),
    {"DeformableDetrSelfAttention": 1},
    kinds=("eager",),
    refused={"MultiScaleDeformableAttention": "MultiScaleDeformableAttention: "},
)
transformers(
    "DabDetrModel",
    resnet(**{**{k: v for k, v in DETR.items() if k != "d_model"}, "hidden_size": 24}),
    lambda m: m(image(64, 96)),
    {"DetrAttention": 1, "DabDetrAttention": 2},
    kinds=("eager",),
)
MASK2 = {"feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32, "encoder_feedforward_dim": 16, "encoder_layers": 1}
MASK2 |= {"num_attention_heads": 4, "dim_feedforward": 16, "decoder_layers": 2, "num_queries": 5}
transformers(
    "Mask2FormerModel",
    swin_backbone(**MASK2),
    lambda m: m(image(64, 96)),
    {"SwinAttention": 4, "MultiheadAttention": 1, "Mask2FormerAttention": 1},
    kinds=("eager",),
    axes={"Mask2FormerAttention": split(4)},
    refused={"Mask2FormerPixelDecoderEncoderMultiscaleDeformableAttention": "no tokens of the arguments"},
)
ONE = {"hidden_dim": 32, "conv_dim": 32, "mask_dim": 32, "num_attention_heads": 4, "dim_feedforward": 16, "num_queries": 6}
ONE |= {"encoder_feedforward_dim": 16, "encoder_layers": 1, "decoder_layers": 3, "query_dec_layers": 1, "task_seq_len": 7}
ONE |= {"text_encoder_width": 16, "text_encoder_num_layers": 1, "text_encoder_vocab_size": 30, "text_encoder_context_length": 7}
transformers(
    "OneFormerModel",
    swin_backbone(**ONE, text_encoder_n_ctx=2),
    lambda m: m(image(64, 96), task_inputs=words(7)),
    {"SwinAttention": 4, "MultiheadAttention": 4, "OneFormerAttention": 2},
    kinds=("eager",),
    axes={"OneFormerAttention": split(4)},
    refused={"OneFormerPixelDecoderEncoderMultiscaleDeformableAttention": "no tokens of the arguments"},
)
transformers(
    "MaskFormerModel",
    swin_backbone(fpn_feature_size=32, mask_feature_size=32),
    lambda m: m(image(64, 96)),
    {"MaskFormerSwinSelfAttention": 4, "MaskFormerDetrSelfAttention": 1, "MaskFormerDetrCrossAttention": 1},
    kinds=("eager",),
)


def d_fine() -> dict[str, Any]:
    sizes = {"embedding_size": 4, "hidden_sizes": [8, 8, 16, 16], "depths": [1] * 4, "stem_channels": [3, 4, 4]}
    stages = {"in": [4, 8, 8, 16], "mid": [4, 4, 4, 8], "out": [8, 8, 16, 16]}
    sizes |= {f"stage_{which}_channels": channels for which, channels in stages.items()}
    sizes |= {"stage_num_blocks": [1] * 4, "stage_numb_of_layers": [1] * 4, "stage_downsample": [False, True, True, True]}
    sizes |= {"stage_light_block": [False] * 4, "stage_kernel_size": [3] * 4, "out_features": ["stage2", "stage3", "stage4"]}
    backbone = importlib.import_module("transformers").HGNetV2Config(**sizes)
    encoder = {
        "encoder_hidden_dim": 32,
        "encoder_in_channels": [8, 16, 16],
        "encoder_ffn_dim": 16,
        "encoder_attention_heads": 4,
    }
    decoder = {"decoder_in_channels": [32] * 3, "d_model": 32, "num_queries": 5, "decoder_ffn_dim": 16, "decoder_layers": 2}
    more = {"decoder_n_points": [2, 2, 2], "decoder_attention_heads": 4, "num_denoising": 0, "max_num_bins": 8}
    return {"backbone_config": backbone, **encoder, **decoder, **more}


transformers(
    "DFineModel",
    d_fine,
    lambda m: m(image(64, 96)),
    {"DFineSelfAttention": 3},
    kinds=("eager",),
    refused={"DFineMultiscaleDeformableAttention": "no tokens of the arguments"},
)

# images, image by image and window by window

GPT = {
    "image_size": [32, 16],
    "patch_size": 8,
    "mlp_dim": 16,
    "pretrain_image_size": 16,
    "merge_index": 0,
    "num_hidden_layers": 3,
}
transformers(
    "SegGptModel",
    {
        "hidden_size": 24,
        "num_attention_heads": 3,
        "intermediate_hidden_state_indices": [0, 1, 2],
        "decoder_hidden_size": 8,
        **GPT,
    },
    lambda m: m(image(16, 16), image(16, 16) * 0.5, image(16, 16) * 0.3),
    {"SegGptAttention": 3},
    kinds=("eager",),
    axes={"SegGptAttention": split(3)},
)
GRIDS = {"unequal": [[1, 2, 4], [1, 4, 6], [1, 4, 4]], "equal": [[1, 4, 6], [1, 4, 6]], "of two frames": [[2, 4, 4]]}
QWEN = {"depth": 2, "num_heads": 3, "patch_size": 4, "intermediate_size": 16}
for what, grid in GRIDS.items():
    for model, config, cls in (
        ("qwen2_vl.Qwen2VisionTransformerPretrainedModel", {"embed_dim": 24, "hidden_size": 16}, "VisionAttention"),
        (
            "qwen2_5_vl.Qwen2_5_VisionTransformerPretrainedModel",
            {"hidden_size": 24, "out_hidden_size": 16, "window_size": 16, "fullatt_block_indexes": [1]},
            "Qwen2_5_VLVisionAttention",
        ),
        (
            "qwen3_vl.Qwen3VLVisionModel",
            {"hidden_size": 24, "out_hidden_size": 16, "deepstack_visual_indexes": [0], "num_position_embeddings": 16},
            "Qwen3VLVisionAttention",
        ),
    ):
        sizes = torch.tensor(grid)
        transformers(
            model,
            {**QWEN, **config},
            lambda m, sizes=sizes: m(numbers(int(sizes.prod(1).sum()), 96), grid_thw=sizes),
            {cls: 2},
            axes={cls: padded},
            what=f", {what}",
        )
STAGES = {"embed_dim": [16, 24], "num_heads": [2, 3], "num_groups": [2, 3], "depths": [1, 1], "window_size": 4}
STAGES |= {"patch_size": [7, 3], "patch_stride": [4, 2], "patch_padding": [3, 1], "patch_prenorm": [False, True]}
transformers(
    "florence2.Florence2VisionBackbone",
    {**STAGES, "projection_dim": 16},
    lambda m: m(image(32, 48)),
    {"Florence2VisionWindowAttention": 2},
    refused={"Florence2VisionChannelAttention": "feeds many places of the output: channels"},
)
for how in ("joint_space_time", "divided_space_time", "space_only"):
    config = {**PATCH8, "num_hidden_layers": 1, "num_frames": 3, "attention_type": how}
    count = {"TimesformerSelfAttention": 2 if how == "divided_space_time" else 1}
    transformers("TimesformerModel", config, lambda m: m(numbers(2, 3, 3, 32, 32)), count, kinds=("eager",), what=f", {how}")
MAE = {
    "decoder_hidden_size": 16,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 16,
}
transformers("ViTMAEForPreTraining", {**PATCH8, **MAE}, lambda m: m(image(32, 32)), {"ViTMAEAttention": 3})
SWIN = {"image_size": 64, "patch_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 5}
transformers("SwinModel", SWIN, lambda m: m(image(56, 72)), {"SwinAttention": 4}, what=", odd")
transformers("Swinv2Model", SWIN, lambda m: m(image(56, 72)), {"Swinv2SelfAttention": 4}, kinds=("eager",), what=", odd")
TILES = {"num_global_layers": 1, "attention_heads": 3, "image_size": 16, "patch_size": 8, "max_num_tiles": 2}
TILES |= {"supported_aspect_ratios": [[1, 1], [1, 2]], "intermediate_layers_indices": [0, 1], "vision_output_dim": 72}
transformers(
    "mllama.MllamaVisionModel",
    {"hidden_size": 24, "num_hidden_layers": 2, "intermediate_size": 16, **TILES},
    lambda m: m(numbers(2, 1, 2, 3, 16, 16), torch.tensor([[2], [1]]), torch.tensor([[[1, 1]], [[1, 0]]])),
    {"MllamaVisionAttention": 3},
)
FLEX = (torch.arange(12) < torch.tensor([[12], [8]])).long()
transformers(
    "Siglip2VisionModel",
    {**VIT, "patch_size": 4, "num_patches": 16},
    lambda m: m(pixel_values=numbers(2, 12, 48), pixel_attention_mask=FLEX, spatial_shapes=torch.tensor([[3, 4], [2, 4]])),
    {"Siglip2Attention": 2, "MultiheadAttention": 1},
)
transformers(
    "PixtralVisionModel",
    PATCH8,
    lambda m: m(image(32, 32), image_sizes=torch.tensor([[32, 32], [16, 24]])),
    {"PixtralAttention": 2},
)
SEEN = torch.arange(4).view(1, 4, 1).expand(2, 4, 4) < torch.tensor([4, 3]).view(2, 1, 1)
transformers(
    "idefics3.Idefics3VisionTransformer",
    PATCH8,
    lambda m: m(image(32, 32), patch_attention_mask=SEEN),
    {"Idefics3VisionAttention": 2},
)

# queries of their own

for latents in (1, 3):
    more = {"resampler_n_latents": latents, "resampler_depth": 2, "resampler_n_heads": 6, "resampler_head_dim": 4}
    for kind in KINDS:
        transformers(
            "idefics2.Idefics2PerceiverResampler",
            {"hidden_size": 24, "num_key_value_heads": 2, **more},
            lambda m: m(context=numbers(2, 7, 24), attention_mask=(torch.arange(7) < torch.tensor([[7], [5]])).long()),
            {"Idefics2PerceiverAttention": 2},
            kinds=(kind,),
            axes={"Idefics2PerceiverAttention": grouped} if latents == 1 and kind == "sdpa" else {},
            what=f", {latents} latents",
        )
TEXT = {**VIT, "vocab_size": 50, "max_position_embeddings": 40}
transformers(
    "instructblip.InstructBlipQFormerModel",
    {**TEXT, "cross_attention_frequency": 2, "encoder_hidden_size": 20},
    lambda m: m(words(5), query_embeds=numbers(1, 4, 24).expand(2, 4, 24), encoder_hidden_states=numbers(2, 7, 20)),
    {"InstructBlipQFormerMultiHeadAttention": 3},
)
for latents in (1, 5):
    heads = {"num_self_attention_heads": 3, "num_cross_attention_heads": 2, "num_self_attends_per_block": 2}
    transformers(
        "PerceiverModel",
        {"num_latents": latents, "d_latents": 24, "d_model": 20, "num_blocks": 1, "qk_channels": 12, "v_channels": 24, **heads},
        lambda m: m(numbers(2, 7, 20), attention_mask=(torch.arange(7) < torch.tensor([[7], [5]])).float()),
        {"PerceiverSelfAttention": 3},
        kinds=("eager",),
        what=f", {latents} latents",
    )

# text, all at once and step by step

CAPTION = {**TEXT, "encoder_hidden_size": 24, "bos_token_id": 0, "sep_token_id": 2, "eos_token_id": 2, "pad_token_id": 1}
transformers(
    "BlipForConditionalGeneration",
    {"text_config": CAPTION, "vision_config": PATCH8, "projection_dim": 8, "image_text_hidden_size": 8},
    lambda m: m(pixel_values=image(32, 32), input_ids=words(5)),
    {"BlipAttention": 2, "BlipTextSelfAttention": 4},
    kinds=("eager",),
)


def at_once(model: Any) -> Any:
    return model(words(5), attention_mask=(torch.arange(5) >= torch.tensor([[0], [2]])).long())


def next_words(count: int) -> Callable[[Any], Any]:
    def call(model: Any) -> Any:
        return model(words(count), past_key_values=model(words(5)).past_key_values)

    return call


HEADS = {**TEXT, "num_attention_heads": 6, "num_key_value_heads": 2}
GPT2 = {"vocab_size": 50, "n_embd": 24, "n_head": 3, "n_layer": 2, "n_positions": 32, "bos_token_id": 0, "eos_token_id": 0}
SLIDING = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
for model, config, cls in (
    ("GPT2Model", GPT2, "GPT2Attention"),
    ("LlamaModel", HEADS, "LlamaAttention"),
    ("Qwen2Model", {**HEADS, **SLIDING}, "Qwen2Attention"),
):
    transformers(model, config, at_once, {cls: 2})
    transformers(model, config, next_words(2), {cls: 2}, what=", two more words")
    transformers(model, config, next_words(1), {cls: 2}, what=", one more word", axes={cls: one_query})
READER = {"vocab_size": 50, "d_model": 24, "decoder_layers": 2, "decoder_attention_heads": 3, "decoder_ffn_dim": 16}
READER |= {"max_position_embeddings": 32, "cross_attention_hidden_size": 20}


def read(model: Any, count: int = 5, **more: Any) -> Any:
    return model(words(count), encoder_hidden_states=numbers(2, 7, 20), **more)


TROCR = {"TrOCRAttention": split(3)}
transformers("TrOCRForCausalLM", READER, read, {"TrOCRAttention": 4}, kinds=("eager",), axes=TROCR)
transformers(
    "TrOCRForCausalLM",
    READER,
    lambda m: read(m, 1, past_key_values=read(m).past_key_values),
    {"TrOCRAttention": 4},
    kinds=("eager",),
    axes=TROCR,
    what=", one more word",
)
T5 = {"vocab_size": 50, "d_model": 24, "d_kv": 5, "d_ff": 16, "num_layers": 2, "num_heads": 3, "decoder_start_token_id": 0}


def translate(model: Any, count: int = 5, **more: Any) -> Any:
    return model(words(7), decoder_input_ids=words(count), **more)


def translate_more(model: Any) -> Any:
    before = translate(model)
    seen = (before.encoder_last_hidden_state,)
    return model(encoder_outputs=seen, decoder_input_ids=words(1), past_key_values=before.past_key_values)


transformers("T5Model", T5, translate, {"T5Attention": 6})
transformers("T5Model", T5, translate_more, {"T5Attention": 4}, what=", one more word", kinds=("sdpa",))
BART = {"vocab_size": 50, "max_position_embeddings": 32, **{k: v for k, v in DETR.items() if k != "num_queries"}}
transformers("BartModel", BART, translate, {"BartAttention": 3})
transformers("BartModel", BART, translate_more, {"BartAttention": 2}, what=", one more word")

# what is no single map of whole images

transformers(
    "LongformerModel",
    {**TEXT, "num_hidden_layers": 1, "attention_window": [4]},
    lambda m: m(words(8)),
    {"LongformerSelfAttention": 1},
    kinds=("eager",),
    axes={"LongformerSelfAttention": banded},
)
transformers(
    "BigBirdModel",
    {**TEXT, "num_hidden_layers": 1, "max_position_embeddings": 64, "block_size": 4, "num_random_blocks": 1},
    lambda m: m(words(48) % 50),
    {},
    kinds=("eager",),
    refused={"BigBirdBlockSparseAttention": "BigBirdBlockSparseAttention: "},
)
transformers(
    "NystromformerModel",
    {**TEXT, "num_hidden_layers": 1, "num_landmarks": 2, "segment_means_seq_len": 8, "conv_kernel_size": 3},
    lambda m: m(words(8)),
    {},
    kinds=("eager",),
    refused={"NystromformerSelfAttention": "no tokens of the arguments"},
)
SINKS = {"head_dim": 4, "sliding_window": 3, "num_local_experts": 2, "num_experts_per_tok": 1, "pad_token_id": 0}
transformers(
    "GptOssModel",
    {**HEADS, **SINKS},
    lambda m: m(words(5)),
    {},
    kinds=("eager",),
    refused={"GptOssAttention": "its rows do not sum to 1"},
)


def two_ways() -> nn.Module:
    modeling = importlib.import_module("transformers.models.grounding_dino.modeling_grounding_dino")
    config = importlib.import_module("transformers").GroundingDinoConfig
    return modeling.GroundingDinoFusionLayer(  # type: ignore[no-any-return]
        config(d_model=24, encoder_attention_heads=6, encoder_ffn_dim=48, encoder_layers=1)
    )


case(
    "transformers GroundingDinoFusionLayer",
    two_ways,
    lambda m: m(vision_features=numbers(2, 9, 24), text_features=numbers(2, 5, 24, seed=1)),
    {},
    refused={"GroundingDinoBiMultiHeadAttention": "GroundingDinoBiMultiHeadAttention: "},
)
transformers(
    "LiltModel",
    {**TEXT, "num_hidden_layers": 1, "max_2d_position_embeddings": 32, "channel_shrink_ratio": 2},
    lambda m: m(words(8), bbox=words(8)[..., None].expand(2, 8, 4)),
    {},
    kinds=("eager",),
    refused={"LiltSelfAttention": "LiltSelfAttention: "},
)
MERGED = {"embed_dim": [8, 16], "num_heads": [1, 2], "depth": [1, 2], "patch_sizes": [7, 3], "patch_stride": [4, 2]}
MERGED |= {"patch_padding": [2, 1], "mlp_ratio": [2.0, 2.0], "attention_drop_rate": [0.0] * 2, "drop_rate": [0.0] * 2}
MERGED |= {"drop_path_rate": [0.0] * 2, "qkv_bias": [True] * 2, "cls_token": [False, True], "kernel_qkv": [3] * 2}
MERGED |= {"padding_kv": [1] * 2, "stride_kv": [2] * 2, "padding_q": [1] * 2, "stride_q": [1] * 2}
transformers(
    "CvtModel",
    {**MERGED, "qkv_projection_method": ["dw_bn"] * 2},
    lambda m: m(image(32, 48)),
    {"CvtSelfAttention": 3},
    kinds=("eager",),
)

# diffusers

UNET = {"sample_size": 8, "in_channels": 4, "out_channels": 4, "block_out_channels": (8, 16), "layers_per_block": 1}
UNET |= {"cross_attention_dim": 12, "norm_num_groups": 4, "attention_head_dim": 2}
UNET |= {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}
LATENT = {"num_attention_heads": 3, "attention_head_dim": 8, "in_channels": 4, "sample_size": 8}


def diffusers(cls: str, processor: str = "", *values: Any, **config: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        model = getattr(importlib.import_module("diffusers"), cls)(**config)
        if processor:
            how = getattr(importlib.import_module("diffusers.models.attention_processor"), processor)
            for module in model.modules():
                if type(module).__name__ == "Attention":
                    module.set_processor(how(*values))
        return model  # type: ignore[no-any-return]

    return build


def denoise(words: int, **more: Any) -> Callable[[Any], Any]:
    return lambda m: m(numbers(2, 4, 8, 6), encoder_hidden_states=numbers(2, words, 12, seed=1), **more)


for processor in ("AttnProcessor", "AttnProcessor2_0", "SlicedAttnProcessor"):
    values = (1,) if processor == "SlicedAttnProcessor" else ()
    axes = {} if processor == "AttnProcessor2_0" else {"Attention": split(2)}
    for count in (1, 7):
        build = diffusers("UNet2DConditionModel", processor, *values, **UNET)
        case(f"diffusers UNet, {processor}, {count}", build, denoise(count, timestep=3), {"Attention": 8}, axes=axes)
    if not values:
        build = diffusers("Transformer2DModel", processor, **LATENT, num_layers=2, norm_num_groups=2, cross_attention_dim=12)
        axes = axes and {"Attention": split(3)}
        case(f"diffusers Transformer2DModel, {processor}", build, denoise(7), {"Attention": 4}, axes=axes)
SD3 = {**LATENT, "patch_size": 2, "num_layers": 2, "joint_attention_dim": 12, "caption_projection_dim": 24, "out_channels": 4}
SD3 |= {"pooled_projection_dim": 10, "pos_embed_max_size": 8, "dual_attention_layers": (0,), "qk_norm": "rms_norm"}
POOLED = {"pooled_projections": numbers(2, 10), "timestep": torch.tensor([1.0, 2.0])}
case("diffusers SD3", diffusers("SD3Transformer2DModel", **SD3), denoise(7, **POOLED), {"Attention": 3})
FLUX = {"patch_size": 1, "in_channels": 4, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16}
FLUX |= {"num_attention_heads": 3, "joint_attention_dim": 12, "pooled_projection_dim": 10, "axes_dims_rope": (4, 4, 8)}
PLACES = {"img_ids": torch.cartesian_prod(*(torch.arange(float(n)) for n in (1, 4, 3))), "txt_ids": torch.zeros(7, 3)}
case(
    "diffusers Flux",
    diffusers("FluxTransformer2DModel", **FLUX),
    lambda m: m(numbers(2, 12, 4), encoder_hidden_states=numbers(2, 7, 12, seed=1), **POOLED, **PLACES),
    {"FluxAttention": 1},  # of the block that gets text and image as one
    refused={"FluxAttention": "its keys stand in another order"},
)
SANA = {**LATENT, "out_channels": 4, "num_layers": 1, "num_cross_attention_heads": 2, "cross_attention_head_dim": 12}
case(
    "diffusers Sana",
    diffusers("SanaTransformer2DModel", **SANA, cross_attention_dim=24, caption_channels=12),
    denoise(7, timestep=torch.tensor([1, 2])),
    {"Attention": 1},
    refused={"Attention": "channels, or a context for all"},
)

# torchvision


def torchvision(place: str, cls: str, *values: Any, **named: Any) -> Callable[[], nn.Module]:
    return lambda: getattr(importlib.import_module(f"torchvision.models{place}"), cls)(*values, **named)


def swin_v2() -> nn.Module:
    swin = importlib.import_module("torchvision.models.swin_transformer")
    kinds = {"block": swin.SwinTransformerBlockV2, "downsample_layer": swin.PatchMergingV2}
    return swin.SwinTransformer([4, 4], 16, [2, 2], [2, 4], [5, 5], **kinds)  # type: ignore[no-any-return]


def mvit() -> nn.Module:
    package = importlib.import_module("torchvision.models.video.mvit")
    steps = [((1, 12, 12), [1, 1, 1], [1, 2, 2]), ((2, 12, 24), [1, 2, 2], [1, 1, 1]), ((2, 24, 24), [], [1, 2, 2])]
    blocks = [package.MSBlockConfig(*sizes, [3, 3, 3] if q else [], [3, 3, 3], q, kv) for sizes, q, kv in steps]
    more = {"residual_pool": True, "residual_with_cls_embed": False, "rel_pos_embed": True, "proj_after_attn": True}
    return package.MViT((32, 32), 4, blocks, **more)  # type: ignore[no-any-return]


VIDEO = numbers(2, 3, 5, 32, 40)
swin3d = torchvision(".video.swin_transformer", "SwinTransformer3d", [2, 4, 4], 16, [2, 2], [2, 4], [2, 3, 3])
case("torchvision swin3d", swin3d, lambda m: m(VIDEO), {"ShiftedWindowAttention3d": 4})
case("torchvision mvit v2", mvit, lambda m: m(numbers(2, 3, 4, 32, 32)), {"MultiscaleAttention": 3})
case("torchvision swin v2, odd", swin_v2, lambda m: m(image(64, 96)), {"ShiftedWindowAttentionV2": 4})
case(
    "torchvision maxvit",
    torchvision("", "MaxVit", (64, 64), 8, 4, [16, 16], [1, 1], 8, 0.1),
    lambda m: m(image(64, 64)),
    {"RelativePositionalMultiHeadAttention": 4},
    axes={"RelativePositionalMultiHeadAttention": merged},
)
vit = torchvision("", "VisionTransformer", 32, 8, 2, 3, 24, 16)
case("torchvision vit", vit, lambda m: m(image(32, 32)), {"MultiheadAttention": 2})

# segment-anything


def segment_anything() -> nn.Module:
    parts = importlib.import_module("segment_anything.modeling")
    sizes = {"img_size": 56, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "mlp_ratio": 2, "out_chans": 16}
    encoder = parts.ImageEncoderViT(**sizes, use_rel_pos=True, window_size=3, global_attn_indexes=(1,))
    both = parts.TwoWayTransformer(depth=2, embedding_dim=16, mlp_dim=24, num_heads=2)
    prompts = parts.PromptEncoder(16, (7, 7), (56, 56), 4)
    return parts.Sam(encoder, prompts, parts.MaskDecoder(transformer_dim=16, transformer=both))  # type: ignore[no-any-return]


POINTS = {"original_size": (56, 56), "point_coords": torch.rand(3, 1, 2) * 50, "point_labels": torch.ones(3, 1)}
case(
    "segment_anything Sam",
    segment_anything,
    lambda m: m([{"image": each, **POINTS} for each in image(56, 56)], multimask_output=True),
    {"Attention": 16},
    axes={"Attention": lambda formed: split(3)(formed) if formed[0].dim() == 3 else formed[0]},
)
