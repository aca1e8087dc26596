"""Others' ways to get maps, and hookattn on others' models.

TorchLens, transformers and vit-pytorch are measured where they are installed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import timm
from cases import NotHereError, Setup, attentions_of, case, through
from measure import Returned, Run
from oracle import randomise, unfuse
from timm.utils.attention_extract import AttentionExtract
from torch import Tensor, nn

from hookattn import AttentionRecorder


def replace_forwards(model: nn.Module, retain: bool = False) -> nn.Module:
    """https://github.com/huggingface/pytorch-image-models/discussions/1232, with the arguments that blocks hand over today."""

    def my_forward_wrapper(attn_obj: Any) -> Callable[..., Tensor]:
        def my_forward(x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
            B, N, C = x.shape  # noqa: N806
            qkv = attn_obj.qkv(x).reshape(B, N, 3, attn_obj.num_heads, C // attn_obj.num_heads).permute(2, 0, 3, 1, 4)
            q, k, v = qkv.unbind(0)

            attn = (q @ k.transpose(-2, -1)) * attn_obj.scale
            attn = attn.softmax(dim=-1)
            attn = attn_obj.attn_drop(attn)
            if retain:
                attn.retain_grad()
            attn_obj.attn_map = attn

            x = (attn @ v).transpose(1, 2).reshape(B, N, C)
            x = attn_obj.proj(x)
            result: Tensor = attn_obj.proj_drop(x)
            return result

        return my_forward

    for module in attentions_of(model):
        module.forward = my_forward_wrapper(module)
    return model


def recompute(m: Any, x: Tensor) -> Tensor:
    """What many projects copy: q and k from `qkv`, their norms, the scale and a softmax."""
    batch, tokens, _ = x.shape
    q, k, _ = m.qkv(x).reshape(batch, tokens, 3, m.num_heads, -1).permute(2, 0, 3, 1, 4)
    q, k = getattr(m, "q_norm", nn.Identity())(q), getattr(m, "k_norm", nn.Identity())(k)
    return (q * m.scale @ k.transpose(-2, -1)).softmax(-1)


def recomputed(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """`recompute` in a hook on every module that looks like attention, by name of the module."""
    maps: dict[str, Tensor] = {}
    with ExitStack() as stack:
        for name, module in model.named_modules():
            if hasattr(module, "qkv") and hasattr(module, "num_heads"):

                def hook(m: Any, args: tuple[Tensor], name: str = name) -> None:
                    maps[name] = recompute(m, args[0])

                stack.enter_context(module.register_forward_pre_hook(hook))
        model(x)
    return maps


def imported(name: str) -> Any:
    """A module of a package that need not be installed."""
    try:
        return __import__(name, fromlist=["_"])
    except ImportError as error:
        raise NotHereError(f"{name.partition('.')[0]} is not installed") from error


@case("forward replacement of discussion 1232, retain_grad", base="backward", reads="gradients", grad=True, peer=True)
def replaced_gradients(s: Setup) -> Iterator[Run]:
    model = s.twin("replaced, retain_grad", lambda m: replace_forwards(m, retain=True))
    attentions = attentions_of(model)
    yield lambda x: (through(model, x), [a.attn_map.grad for a in attentions])
    for module in attentions:
        module.attn_map = None


@case("forward replacement of discussion 1232", reads="maps", peer=True)
def replaced_forward(s: Setup) -> Iterator[Run]:
    model = s.twin("replaced", replace_forwards)
    attentions = attentions_of(model)
    yield lambda x: (model(x), [a.attn_map for a in attentions])
    for module in attentions:
        module.attn_map = None


@case("naive recompute in a forward hook", reads="maps", peer=True)
def naive(s: Setup) -> Iterator[Run]:
    found: list[Tensor] = s.once("naive, found", list)

    def put_hooks(model: nn.Module) -> nn.Module:
        for module in attentions_of(model):
            module.register_forward_hook(lambda m, args, _: found.append(recompute(m, args[0])))
        return model

    model = s.twin("naive", put_hooks)

    def run(x: Tensor) -> Returned:
        found.clear()
        output = model(x)
        return output, list(found)

    yield run
    found.clear()


@case("timm.utils.AttentionExtract, hook, on the unfused model", reads="maps", peer=True)
def extract_hook(s: Setup) -> Iterator[Run]:
    model = s.twin("extract, hook", lambda m: AttentionExtract(unfuse(m), method="hook"))
    yield lambda x: (None, list(model(x).values()))


@case("timm.utils.AttentionExtract, fx, on the unfused model (no logits)", reads="maps", peer=True)
def extract_fx(s: Setup) -> Iterator[Run]:
    model = s.twin("extract, fx", lambda m: AttentionExtract(unfuse(m), method="fx"))
    yield lambda x: (None, list(model(x).values()))


@case("TorchLens, softmaxes of the unfused model", reads="maps", peer=True)
def torchlens(s: Setup) -> Iterator[Run]:
    if s.compiled:
        raise NotHereError("runs eager models")
    tl = imported("torchlens")
    wrappers = imported("torchlens.backends.torch.wrappers")
    model, softmax = s.twin("torchlens", unfuse), tl.func("softmax")
    wrappers.wrap_torch()  # it wraps the functions of torch, for all
    try:
        yield lambda x: (None, [r.ram_payload for r in tl.fastlog.record(model, x, save=softmax).records])
    finally:
        tl.release_model(model)
        wrappers.unwrap_torch()


def sizes_of(s: Setup) -> tuple[int, int, int, int]:
    """Width, depth, heads and patch size of a plain ViT."""
    model = s.models["timm"]
    if not isinstance(model, timm.models.VisionTransformer):
        raise NotHereError("has no model of this kind")
    return model.embed_dim, len(model.blocks), model.blocks[0].attn.num_heads, model.patch_embed.patch_size[0]


def ready_vit_pytorch(s: Setup) -> Any:
    """vit-pytorch's ViT of the same sizes."""

    def build() -> Any:
        dim, depth, heads, patch = sizes_of(s)
        vit, size = imported("vit_pytorch").ViT, s.inputs[0].shape[-1]
        sizes = {"image_size": size, "patch_size": patch, "dim": dim, "depth": depth, "heads": heads, "mlp_dim": 4 * dim}
        return randomise(vit(**sizes, dim_head=dim // heads, num_classes=1000)).to(s.inputs[0])

    return s.ready("vit_pytorch", build)


@case("vit-pytorch's ViT alone (unfused)", base="vit_pytorch", family="vit_pytorch", peer=True)
def vit_pytorch(s: Setup) -> Iterator[Run]:
    model = ready_vit_pytorch(s)
    yield lambda x: (model(x), [])


@case("vit-pytorch's Recorder on it", base="vit_pytorch", reads="maps", family="vit_pytorch", peer=True)
def vit_pytorch_recorder(s: Setup) -> Iterator[Run]:
    ready_vit_pytorch(s)
    recorder = s.twin("vit_pytorch, Recorder", imported("vit_pytorch.recorder").Recorder, of="vit_pytorch")

    def run(x: Tensor) -> Returned:
        output, maps = recorder(x)
        return output, list(maps.unbind(1))

    yield run
    recorder.clear()


@case('hookattn on vit-pytorch\'s ViT, all maps, keep="maps"', base="vit_pytorch", reads="maps", family="vit_pytorch")
def vit_pytorch_hookattn(s: Setup) -> Iterator[Run]:
    model = ready_vit_pytorch(s)
    with AttentionRecorder(model, keep="maps") as rec:
        yield lambda x: (model(x), [m[...] for m in rec.maps.values()])


def ready_transformers(s: Setup) -> Any:
    """transformers' ViT of the same sizes."""

    def build() -> Any:
        dim, depth, heads, patch = sizes_of(s)
        tf = imported("transformers")
        sizes = {"hidden_size": dim, "num_hidden_layers": depth, "num_attention_heads": heads, "intermediate_size": 4 * dim}
        config = tf.ViTConfig(**sizes, image_size=s.inputs[0].shape[-1], patch_size=patch, attn_implementation="sdpa")
        return randomise(tf.ViTModel(config, add_pooling_layer=False)).to(s.inputs[0])

    return s.ready("transformers", build)


@case("transformers' ViT alone, sdpa", base="transformers", family="transformers", peer=True)
def transformers(s: Setup) -> Iterator[Run]:
    model = ready_transformers(s)
    yield lambda x: (model(x).last_hidden_state, [])


@case("transformers eager, output_attentions=True", base="transformers", reads="maps", family="transformers", peer=True)
def transformers_eager(s: Setup) -> Iterator[Run]:
    ready_transformers(s)
    model = s.twin("transformers, eager", unfuse, of="transformers")

    def run(x: Tensor) -> Returned:
        out = model(x, output_attentions=True)
        return out.last_hidden_state, list(out.attentions or ())

    yield run


@case("hookattn on transformers' ViT, row of the first token", base="transformers", reads="rows", family="transformers")
def transformers_rows(s: Setup) -> Iterator[Run]:
    model = ready_transformers(s)
    with AttentionRecorder(model) as rec:
        yield lambda x: (model(x).last_hidden_state, [m[:, :, 0] for m in rec.maps.values()])


@case('hookattn on transformers\' ViT, all maps, keep="maps"', base="transformers", reads="maps", family="transformers")
def transformers_hookattn(s: Setup) -> Iterator[Run]:
    model = ready_transformers(s)
    with AttentionRecorder(model, keep="maps") as rec:
        yield lambda x: (model(x).last_hidden_state, [m[...] for m in rec.maps.values()])
