"""How fast a model runs while its attention is read: hookattn and others, against the fused model alone.

usage: python benchmarks/throughput.py [--device cpu|cuda] [--quick] [--models "vit_small*"] [--cases "keep_maps,naive"]
           [--dtypes float32,bfloat16] [--modes eager,compiled] [--batch 8,fill] [--rounds 40] [--threads 2]
           [--pairs] [--append] [--out benchmarks/results/throughput-cpu.json]

All cases run in one process, in turns: A B C A B C ... Each is divided by its base of the same round, so that a machine that
is slower for a while is slower for both; the base stands in the table twice, and what the second makes of itself is the noise.
A case may take long: one that needs several times its base is measured in fewer rounds.

With --pairs the base is measured anew before each case (A B A C A D ...): twice the time, for a machine whose speed wanders.

First, what a case returns is compared with the softmaxes of the same model in float64, on its unfused path: what is wrong,
empty, raises or does not fit into memory is reported as that and is not timed. The error is ||got - right|| over
||right - 1/keys||, so that a flat map has an error of 1, and for statistics over ||right - its mean||, or a hundredth of
||right|| if that is more, since rounding is in proportion to it. Parameters are random, and scores wide enough for maps that
are not flat.

Time is taken by CUDA events on a GPU, and by a clock on a CPU. Memory is the peak above what was held before the call, of what
torch allocates: `max_memory_allocated` on a GPU, the sum over the profiler's memory events on a CPU.

TorchLens, transformers and vit-pytorch are measured where they are installed. Nothing is estimated.
"""

from __future__ import annotations

import argparse
import copy
import fnmatch
import gc
import json
import os
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import timm
import torch
from einops import rearrange
from timm.utils.attention_extract import AttentionExtract
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hookattn import AttentionRecorder
from hookattn.analysis import compute_statistics, entropy, head_mean, mean_attention_distance, received

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "timm", "einops", "hookattn", "transformers", "vit-pytorch", "torchlens")
MODELS: dict[str, tuple[str, dict[str, Any], int]] = {  # what timm calls it, arguments, size of the images
    "vit_small_patch16_224": ("vit_small_patch16_224", {}, 224),
    "vit_base_patch16_224": ("vit_base_patch16_224", {}, 224),
    "vit_large_patch14_dinov2_518": ("vit_large_patch14_dinov2", {}, 518),
    "vit_base_patch16_1024": ("vit_base_patch16_224", {"img_size": 1024}, 1024),
    "swin_tiny_patch4_window7_224": ("swin_tiny_patch4_window7_224", {}, 224),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
FILLED = 0.05  # a batch fills the device when twice as many images gain less than this
IMAGES = 3  # batches that take turns, so that none is in a cache
AT_LEAST = {"cpu": 0.0, "cuda": 0.1}  # seconds of one measurement; a shorter forward is called several times

Returned = tuple[Any, list[Tensor]]
"""Output of the model (None where there is none), and what was read."""
Run = Callable[[Tensor], Returned]


class NotHereError(Exception):
    """A case that there is not: of this model, on this device, or with what is installed."""


@dataclass
class Setup:
    """What a case is given.

    Attributes:
        name: of the model.
        models: what was built once: the model itself under "timm", others' models, twins that share its parameters.
        images: batches, (batch, 3, size, size).
        compiled: whether models go through `torch.compile`.
    """

    name: str
    models: dict[str, Any]
    images: list[Tensor]
    compiled: bool

    @property
    def device(self) -> torch.device:
        return self.images[0].device

    def once(self, key: str, build: Callable[[], Any]) -> Any:
        """What was built under a key; built now if it is asked for the first time."""
        if key not in self.models:
            self.models[key] = build()
        return self.models[key]

    def twin(self, key: str, change: Callable[[Any], Any], of: str = "timm") -> Any:
        """A copy that shares parameters and buffers and is changed in some way; compiled if the setup says so."""
        return self.ready(key, lambda: change(twin(self.models[of])))

    def ready(self, key: str = "timm", build: Callable[[], Any] | None = None) -> Any:
        """A model as it is measured: as it is, or compiled."""
        model = self.once(key, build) if build else self.models[key]
        return self.once(f"{key}, compiled", lambda: torch.compile(model)) if self.compiled else model


@dataclass(frozen=True)
class Case:
    """One row of the table.

    Attributes:
        key, title: its name, and in words.
        base: key of the case it is divided by.
        reads: "rows", "head", "maps", "statistics" or "gradients" of all layers, or "" for nothing.
        family: whose model it runs: the one that `reference_of` gives its right maps of.
        grad: whether it runs with grad.
        peer: whether it is somebody else's way.
        open: a context with what is measured.
    """

    key: str
    title: str
    base: str
    reads: str
    family: str
    grad: bool
    peer: bool
    open: Callable[[Setup], AbstractContextManager[Run]]


CASES: dict[str, Case] = {}


def case(
    title: str, *, base: str = "fused", reads: str = "", family: str = "timm", grad: bool = False, peer: bool = False
) -> Callable[[Callable[[Setup], Iterator[Run]]], Callable[[Setup], Iterator[Run]]]:
    """File a generator that yields what is measured, and clears up afterwards."""

    def add(function: Callable[[Setup], Iterator[Run]]) -> Callable[[Setup], Iterator[Run]]:
        key = function.__name__
        CASES[key] = Case(key, title, base, reads, family, grad, peer, contextmanager(function))
        return function

    return add


@case("the fused model alone")
def fused(s: Setup) -> Iterator[Run]:
    model = s.ready()
    yield lambda x: (model(x), [])


@case("the same again (noise)")
def fused_again(s: Setup) -> Iterator[Run]:
    yield from fused(s)


@case("recorder, nothing read")
def nothing_read(s: Setup) -> Iterator[Run]:
    model = s.ready()
    with AttentionRecorder(model):
        yield lambda x: (model(x), [])


@case("recorder opened and closed around each forward, nothing read")
def opened_each_time(s: Setup) -> Iterator[Run]:
    model = s.ready()

    def run(x: Tensor) -> Returned:
        with AttentionRecorder(model):
            return model(x), []

    yield run


@case("row of the first token, every layer", reads="rows")
def class_rows(s: Setup) -> Iterator[Run]:
    yield from read_after(s, (slice(None), slice(None), 0))


@case("one head, every layer", reads="head")
def one_head(s: Setup) -> Iterator[Run]:
    yield from read_after(s, (slice(None), 0))


@case("all maps, read after the forward", reads="maps")
def all_maps(s: Setup) -> Iterator[Run]:
    yield from read_after(s, ...)


@case('all maps, keep="maps"', reads="maps")
def keep_maps(s: Setup) -> Iterator[Run]:
    yield from read_after(s, ..., keep="maps")


@case('all maps, keep="maps", moved to the CPU', reads="maps")
def keep_maps_cpu(s: Setup) -> Iterator[Run]:
    if s.device.type == "cpu":
        raise NotHereError("only on a GPU")
    yield from read_after(s, ..., keep="maps", device="cpu")


@case("statistics without maps: entropy, attention received, head mean, distance", reads="statistics")
def statistics_without_maps(s: Setup) -> Iterator[Run]:
    model, wanted = s.ready(), (entropy, received, head_mean, mean_attention_distance)
    with AttentionRecorder(model) as rec:
        yield lambda x: (model(x), [found for m in rec.maps.values() for found in compute_statistics(m, *wanted)])


@case("forward and backward of the fused model alone", base="backward", grad=True)
def backward(s: Setup) -> Iterator[Run]:
    model = s.ready()
    yield lambda x: (through(model, x), [])


@case("gradients=True, nothing read", base="backward", grad=True)
def gradients_nothing_read(s: Setup) -> Iterator[Run]:
    model = s.ready()
    with AttentionRecorder(model, gradients=True):
        yield lambda x: (through(model, x), [])


@case("gradients=True, gradients of all maps read", base="backward", reads="gradients", grad=True)
def gradients_read(s: Setup) -> Iterator[Run]:
    model = s.ready()
    with AttentionRecorder(model, gradients=True) as rec:
        yield lambda x: (through(model, x), [m.gradient[...] for m in rec.maps.values()])


@case("forward replacement of discussion 1232, retain_grad", base="backward", reads="gradients", grad=True, peer=True)
def replaced_gradients(s: Setup) -> Iterator[Run]:
    model = s.twin("replaced, retain_grad", lambda m: replaced(m, retain=True))
    attentions = attentions_of(model)
    yield lambda x: (through(model, x), [a.attn_map.grad for a in attentions])
    for module in attentions:
        module.attn_map = None


@case("forward replacement of discussion 1232", reads="maps", peer=True)
def replaced_forward(s: Setup) -> Iterator[Run]:
    model = s.twin("replaced", replaced)
    attentions = attentions_of(model)
    yield lambda x: (model(x), [a.attn_map for a in attentions])
    for module in attentions:
        module.attn_map = None


@case("naive recompute in a forward hook", reads="maps", peer=True)
def naive(s: Setup) -> Iterator[Run]:
    maps: list[Tensor] = []
    model = s.twin("naive", lambda m: recomputing(m, maps))

    def run(x: Tensor) -> Returned:
        s.models["naive"].found.clear()
        output = model(x)
        return output, list(s.models["naive"].found)

    yield run
    s.models["naive"].found.clear()


@case("timm.utils.AttentionExtract, hook, on the unfused model", reads="maps", peer=True)
def extract_hook(s: Setup) -> Iterator[Run]:
    model = s.twin("extract, hook", lambda m: AttentionExtract(unfused(m), method="hook"))
    yield lambda x: (None, list(model(x).values()))


@case("timm.utils.AttentionExtract, fx, on the unfused model (no logits)", reads="maps", peer=True)
def extract_fx(s: Setup) -> Iterator[Run]:
    model = s.twin("extract, fx", lambda m: AttentionExtract(unfused(m), method="fx"))
    yield lambda x: (None, list(model(x).values()))


@case("TorchLens, softmaxes of the unfused model", reads="maps", peer=True)
def torchlens(s: Setup) -> Iterator[Run]:
    if s.compiled:
        raise NotHereError("runs eager models")
    tl = imported("torchlens")
    wrappers = imported("torchlens.backends.torch.wrappers")
    model, softmax = s.twin("torchlens", unfused), tl.func("softmax")
    wrappers.wrap_torch()  # it wraps the functions of torch, for all
    try:
        yield lambda x: (None, [r.ram_payload for r in tl.fastlog.record(model, x, save=softmax).records])
    finally:
        tl.release_model(model)
        wrappers.unwrap_torch()


@case("vit-pytorch's ViT alone (unfused)", base="vit_pytorch", family="vit_pytorch", peer=True)
def vit_pytorch(s: Setup) -> Iterator[Run]:
    model = s.ready("vit_pytorch", lambda: build_vit_pytorch(s))
    yield lambda x: (model(x), [])


@case("vit-pytorch's Recorder on it", base="vit_pytorch", reads="maps", family="vit_pytorch", peer=True)
def vit_pytorch_recorder(s: Setup) -> Iterator[Run]:
    s.once("vit_pytorch", lambda: build_vit_pytorch(s))
    recorder = s.twin("vit_pytorch, Recorder", imported("vit_pytorch.recorder").Recorder, of="vit_pytorch")

    def run(x: Tensor) -> Returned:
        output, maps = recorder(x)
        return output, list(maps.unbind(1))

    yield run
    recorder.clear()


@case('hookattn on vit-pytorch\'s ViT, all maps, keep="maps"', base="vit_pytorch", reads="maps", family="vit_pytorch")
def vit_pytorch_hookattn(s: Setup) -> Iterator[Run]:
    yield from read_after(s, ..., of=lambda: s.ready("vit_pytorch", lambda: build_vit_pytorch(s)), keep="maps")


@case("transformers' ViT alone, sdpa", base="transformers", family="transformers", peer=True)
def transformers(s: Setup) -> Iterator[Run]:
    model = s.ready("transformers", lambda: build_transformers(s))
    yield lambda x: (model(x).last_hidden_state, [])


@case("transformers eager, output_attentions=True", base="transformers", reads="maps", family="transformers", peer=True)
def transformers_eager(s: Setup) -> Iterator[Run]:
    s.once("transformers", lambda: build_transformers(s))
    model = s.twin("transformers, eager", eager, of="transformers")

    def run(x: Tensor) -> Returned:
        out = model(x, output_attentions=True)
        return out.last_hidden_state, list(out.attentions or ())

    yield run


@case(
    "hookattn on transformers' ViT, row of the first token, every layer",
    base="transformers",
    reads="rows",
    family="transformers",
)
def transformers_rows(s: Setup) -> Iterator[Run]:
    model = s.ready("transformers", lambda: build_transformers(s))
    with AttentionRecorder(model) as rec:
        yield lambda x: (model(x).last_hidden_state, [m[:, :, 0] for m in rec.maps.values()])


@case('hookattn on transformers\' ViT, all maps, keep="maps"', base="transformers", reads="maps", family="transformers")
def transformers_hookattn(s: Setup) -> Iterator[Run]:
    model = s.ready("transformers", lambda: build_transformers(s))
    with AttentionRecorder(model, keep="maps") as rec:
        yield lambda x: (model(x).last_hidden_state, [m[...] for m in rec.maps.values()])


def read_after(s: Setup, index: Any, of: Callable[[], Any] | None = None, **options: Any) -> Iterator[Run]:
    """A recorder that is open while forwards run, and an index of each map after each."""
    model = of() if of else s.ready()
    with AttentionRecorder(model, **options) as rec:
        yield lambda x: (model(x), [m[index] for m in rec.maps.values()])


def through(model: Any, x: Tensor) -> Tensor:
    """A forward and a backward to the parameters."""
    model.zero_grad(set_to_none=True)
    output: Tensor = model(x)
    output[:, 0].sum().backward()  # type: ignore[no-untyped-call]
    return output.detach()


def imported(name: str) -> Any:
    """A module of a package that need not be installed."""
    try:
        return __import__(name, fromlist=["_"])
    except ImportError as error:
        raise NotHereError(f"{name.partition('.')[0]} is not installed") from error


def twin(model: nn.Module) -> Any:
    """A copy that shares parameters and buffers."""
    return copy.deepcopy(model, {id(t): t for t in (*model.parameters(), *model.buffers())})


def attentions_of(model: nn.Module) -> list[Any]:
    """timm's attention modules that have a projection to queries, keys and values in one."""
    return [m for m in model.modules() if hasattr(m, "qkv") and hasattr(m, "num_heads")]


def unfused(model: nn.Module) -> nn.Module:
    """The same with every `fused_attn` flag off."""
    for module in model.modules():
        if getattr(module, "fused_attn", False):
            module.fused_attn = False  # type: ignore[assignment]
    return model


def eager(model: Any) -> Any:
    """transformers' models without fused attention."""
    model.set_attn_implementation("eager")
    return model


def replaced(model: nn.Module, retain: bool = False) -> nn.Module:
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


def recomputing(model: Any, found: list[Tensor]) -> Any:
    """What many projects copy: q and k from `qkv`, their norms, the scale and a softmax, in a hook."""

    def hook(m: Any, args: tuple[Tensor], output: Tensor) -> None:
        batch, tokens, _ = args[0].shape
        q, k, _ = m.qkv(args[0]).reshape(batch, tokens, 3, m.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k = getattr(m, "q_norm", nn.Identity())(q), getattr(m, "k_norm", nn.Identity())(k)
        found.append((q * m.scale @ k.transpose(-2, -1)).softmax(-1))

    for module in attentions_of(model):
        module.register_forward_hook(hook)
    model.found = found
    return model


def sizes_of(s: Setup) -> tuple[int, int, int, int]:
    """Width, depth, heads and patch size of a plain ViT."""
    model = s.models["timm"]
    if not isinstance(model, timm.models.VisionTransformer):
        raise NotHereError("has no model of this kind")
    return model.embed_dim, len(model.blocks), model.blocks[0].attn.num_heads, model.patch_embed.patch_size[0]


def build_vit_pytorch(s: Setup) -> Any:
    dim, depth, heads, patch = sizes_of(s)
    vit, size = imported("vit_pytorch").ViT, s.images[0].shape[-1]
    sizes = {"image_size": size, "patch_size": patch, "dim": dim, "depth": depth, "heads": heads, "mlp_dim": 4 * dim}
    return alive(vit(**sizes, dim_head=dim // heads, num_classes=1000)).to(s.images[0])


def build_transformers(s: Setup) -> Any:
    dim, depth, heads, patch = sizes_of(s)
    tf = imported("transformers")
    sizes = {"hidden_size": dim, "num_hidden_layers": depth, "num_attention_heads": heads, "intermediate_size": 4 * dim}
    config = tf.ViTConfig(**sizes, image_size=s.images[0].shape[-1], patch_size=patch, attn_implementation="sdpa")
    return alive(tf.ViTModel(config, add_pooling_layer=False)).to(s.images[0])


def alive(model: nn.Module) -> Any:
    """Parameters with noise on them, in eval mode: scores are wide enough for maps that are neither flat nor one-hot."""
    torch.manual_seed(0)
    for key, tensor in model.named_parameters():
        matrix = key.endswith("weight") and tensor.dim() > 1
        spread = tensor[0].numel() ** -0.5 if matrix else 0.5 if "bias" in key else 0.3
        tensor.data.add_(torch.randn_like(tensor), alpha=spread)
    return model.eval()


class Softmaxes(TorchFunctionMode):
    """Hands over what every softmax puts out."""

    def __init__(self, seen: Callable[[Tensor], None]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") == "softmax":
            self.seen(out)
        return out


def reference_of(model: nn.Module, x: Tensor, wanted: Sequence[str]) -> dict[str, list[Tensor]]:
    """What is right, from the softmaxes of the same model in float64 on its unfused path; no more is held than is wanted."""
    exact = unfused(copy.deepcopy(model)).double()
    exact = eager(exact) if hasattr(exact, "set_attn_implementation") else exact
    if wanted == ["gradients"]:
        softmaxes: list[Tensor] = []

        def kept(m: Tensor) -> None:
            m.retain_grad()
            softmaxes.append(m)

        with Softmaxes(kept), torch.enable_grad():
            through(exact, x.double())
        return {"gradients": [out.grad for out in softmaxes if out.grad is not None]}
    plain = isinstance(model, (timm.models.VisionTransformer, timm.models.SwinTransformer))
    centres = centres_of(model, x.shape[-1]) if plain else iter(())
    of: dict[str, Callable[[Tensor], list[Tensor]]] = {
        "maps": lambda m: [m],
        "rows": lambda m: [m[:, :, 0].clone()],
        "head": lambda m: [m[:, 0].clone()],
        "statistics": lambda m: list(figures_of(m, next(centres))),
    }
    right: dict[str, list[Tensor]] = {reads: [] for reads in wanted}

    def seen(m: Tensor) -> None:
        for reads in wanted:
            right[reads] += of[reads](m)

    with Softmaxes(seen), torch.no_grad():
        exact(x.double())
    return right


def centres_of(model: Any, size: int) -> Iterator[Tensor]:
    """(windows, patches, 2), layer by layer: y and x of the centre of each patch in pixels."""
    if isinstance(model, timm.models.VisionTransformer):
        cuts = [(size // model.patch_embed.patch_size[0], None, 0)] * len(model.blocks)
    else:
        blocks = [block for layer in model.layers for block in layer.blocks]
        cuts = [(b.input_resolution[0], b.window_size[0], b.shift_size[0]) for b in blocks]
    for side, window, shift in cuts:
        middles = (torch.arange(side, dtype=torch.float64) + 0.5) * size / side
        grid = torch.stack(torch.meshgrid(middles, middles, indexing="ij"), dim=-1).roll((-shift, -shift), (0, 1))
        yield rearrange(grid, "(h p) (w q) yx -> (h w) (p q) yx", p=window or side, q=window or side)


def figures_of(attention: Tensor, centres: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Entropy, attention received, head mean and mean attention distance of a whole map, whose patches come last."""
    windows, patches, _ = centres.shape
    to_patches = rearrange(attention[..., -patches:, -patches:], "(b w) h q k -> b w h q k", w=windows)
    apart = torch.cdist(centres, centres)[:, None].to(attention)
    distance = ((to_patches * apart).sum(-1) / to_patches.sum(-1)).mean((1, 3))
    return torch.special.entr(attention).sum(-1), attention.mean(2), attention.mean(1), distance


def judged(reads: str, got: Sequence[Tensor], right: Sequence[Tensor], tolerance: float) -> tuple[str, float | None]:
    """A verdict on what a case has read, and how far it is off."""
    if not reads:
        return "ran", None
    if not got:
        return "empty", None
    if len(got) != len(right) or any(g.shape[1:] != r.shape[1:] for g, r in zip(got, right)):
        return f"wrong: {len(got)} of {tuple(got[0].shape)}, not {len(right)} of {tuple(right[0].shape)}", None
    worst = 0.0
    for g, r in zip(got, right):
        flat = 0.0 if reads == "gradients" else float(r.mean()) if reads == "statistics" else 1 / r.shape[-1]
        size = max((r - flat).norm(), 0.01 * r.norm() if reads == "statistics" else 0.0)
        error = float((g[: len(r)].to(r) - r).norm() / size)
        worst = max(worst, error) if error == error else float("inf")
    return ("right" if worst <= tolerance else f"wrong: off by {worst:.2g}"), worst


@dataclass
class Measured:
    """What was found of one case in one run."""

    case: Case
    verdict: str = ""
    error: float | None = None
    output: str = ""
    peak: int | None = None
    every: int = 1
    seconds: dict[int, float] = field(default_factory=dict)  # by round
    before: dict[int, float] = field(default_factory=dict)  # of the base, right before it, by round

    @property
    def is_timed(self) -> bool:
        return self.verdict in ("ran", "right")

    def report(self, base: Measured, batch: int) -> dict[str, Any]:
        """What goes into the results."""
        c = self.case
        row: dict[str, Any] = {"case": c.key, "title": c.title, "base": c.base, "reads": c.reads, "peer": c.peer}
        row |= {"verdict": self.verdict, "error": self.error, "output": self.output, "peak_bytes": self.peak}
        if self.seconds:
            bases = self.before or base.seconds
            ratios = [bases[i] / t for i, t in self.seconds.items() if i in bases]
            row |= {"seconds": spread(list(self.seconds.values())), "throughput_over_base": spread(ratios) if ratios else None}
            row |= {"images_per_second": round(batch / row["seconds"]["median"], 2)}
            row |= {"times": [round(t, 6) for t in self.seconds.values()]}
        return row


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, median absolute deviation, quartiles."""
    middle = statistics.median(values)
    q1, _, q3 = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [middle] * 3
    mad = statistics.median(abs(v - middle) for v in values)
    found = {"median": middle, "mad": mad, "q1": q1, "q3": q3, "min": min(values)}
    return {"n": len(values), **{k: float(f"{v:.6g}") for k, v in found.items()}}


def timed(run: Run, images: Sequence[Tensor], times: int) -> float:
    """Seconds of one forward; the device's own clock on a GPU."""
    if images[0].is_cuda:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
        start.record()
        for i in range(times):
            run(images[i % len(images)])
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3 / times
    began = time.perf_counter()
    for i in range(times):
        run(images[i % len(images)])
    return (time.perf_counter() - began) / times


def visit(s: Setup, c: Case, turn: int = 0, times: int = 1) -> float:
    """Open a case, measure it once and close it."""
    images = [s.images[(turn + i) % len(s.images)] for i in range(len(s.images))]
    with c.open(s) as run, torch.set_grad_enabled(c.grad):
        return timed(run, images, times)


def peak_of(s: Setup, c: Case) -> int:
    """Bytes that torch allocates at the same time during one call, above what it held before."""
    with c.open(s) as run, torch.set_grad_enabled(c.grad):
        if s.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            run(s.images[0])
            torch.cuda.synchronize()
            return int(torch.cuda.max_memory_allocated() - before)
        activities = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as profile:
            run(s.images[0])
    assert profile.profiler is not None
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def examine(
    s: Setup,
    c: Case,
    others: Sequence[Case],
    rights: dict[tuple[str, bool], dict[str, list[Tensor]]],
    outputs: dict[str, Tensor],
) -> Measured:
    """Run a case for the first time and compare what it returns with what is right, worked out once for all cases."""
    m = Measured(c)
    few = 2 if s.images[0].shape[-1] <= 224 else 1
    try:
        with c.open(s) as run, torch.set_grad_enabled(c.grad):
            output, got = run(s.images[0])
            if c.reads and (c.family, c.grad) not in rights:
                wanted = sorted({o.reads for o in others if o.reads and (o.family, o.grad) == (c.family, c.grad)})
                rights[c.family, c.grad] = reference_of(s.models[c.family], s.images[0][:few], wanted)
            right = rights[c.family, c.grad][c.reads] if c.reads else []
            m.verdict, m.error = judged(c.reads, got, right, TOLERANCE[s.images[0].dtype])
        if output is not None:
            first = outputs.setdefault(c.base, output)
            off = float((output.double() - first.double()).norm() / first.double().norm())
            m.output = "bit-identical" if torch.equal(output, first) else f"off by {off:.1g}"
    except NotHereError as reason:
        m.verdict = f"not here: {reason}"
    except torch.OutOfMemoryError:
        m.verdict = "out of memory"
    except Exception as error:  # whatever a user would see
        m.verdict = f"raises {type(error).__name__}: {str(error)[:160]}"
    return m


def measure(s: Setup, wanted: Sequence[Case], options: argparse.Namespace) -> tuple[list[Measured], int]:
    """All cases in turns, those that are right only; and how often each is called in one turn."""
    rights: dict[tuple[str, bool], dict[str, list[Tensor]]] = {}
    outputs: dict[str, Tensor] = {}
    found: dict[str, Measured] = {}
    for c in wanted:
        found[c.key] = examine(s, c, wanted, rights, outputs)
        say(f"  {c.key}: {found[c.key].verdict} {found[c.key].error or ''} {found[c.key].output}")
        collect(s)
    rights.clear()
    timing = [m for m in found.values() if m.is_timed and (base := found.get(m.case.base)) and base.is_timed]
    for m in timing:
        m.peak = peak_of(s, m.case)
        collect(s)
    warm: dict[str, float] = {}
    for turn in range(options.warmup):
        warm = {m.case.key: visit(s, m.case, turn) for m in timing}
    shortest = min(warm.values(), default=1.0)
    times = max(1, round(AT_LEAST[s.device.type] / shortest))
    for m in timing:
        m.every = max(1, min(8, round(warm[m.case.key] / warm[m.case.base] / 4)))
    for turn in range(options.rounds):
        for m in timing:
            if turn % m.every == 0:
                if options.pairs and m.case.base != m.case.key:
                    m.before[turn] = visit(s, CASES[m.case.base], turn, times)
                m.seconds[turn] = visit(s, m.case, turn, times)
        say(f"  round {turn + 1} of {options.rounds}")
    return list(found.values()), times


def collect(s: Setup) -> None:
    """Let go of what the case before has left."""
    s.models["timm"].zero_grad(set_to_none=True)
    gc.collect()
    if s.device.type == "cuda":
        torch.cuda.empty_cache()


def fill(model: nn.Module, size: int, like: Tensor) -> int:
    """The batch from which on twice as many images are hardly faster, or do not fit."""
    batch, before = 1, 0.0
    while True:
        try:
            x = torch.randn(batch, 3, size, size, device=like.device, dtype=like.dtype)
            with torch.no_grad():
                times = [timed(lambda x: (model(x), []), [x], max(1, 16 // batch)) for _ in range(5)]
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            return max(1, batch // 2)
        rate = batch / statistics.median(times)
        if rate < before * (1 + FILLED):
            return batch // 2
        batch, before = 2 * batch, rate


def prepared(name: str, dtype: torch.dtype, mode: str, batch: str, device: str) -> Setup:
    """A model with random parameters, and images for it."""
    timm_name, arguments, size = MODELS[name]
    model = alive(timm.create_model(timm_name, **arguments)).to(device, dtype)
    count = fill(model, size, next(model.parameters())) if batch == "fill" else int(batch)
    images = [torch.randn(count, 3, size, size).to(device, dtype) for _ in range(IMAGES)]
    return Setup(name, {"timm": model}, images, mode == "compiled")


def machine(device: str) -> dict[str, Any]:
    """What it ran on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())
    found = {"device": device, "cpu": cpu, "cores": os.cpu_count(), "torch_threads": torch.get_num_threads()}
    found |= {"system": platform.platform(terse=True), "python": platform.python_version()}
    found |= {"cpu_capability": torch.backends.cpu.get_cpu_capability()}
    if device == "cuda":
        about = torch.cuda.get_device_properties(0)
        found |= {"gpu": about.name, "gpu_memory": about.total_memory, "cuda": torch.version.cuda}
        found |= {"float32_matmul_precision": torch.get_float32_matmul_precision()}
    return found


def versions() -> dict[str, str | None]:
    """Of what is installed."""
    found: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def one_run(name: str, dtype: str, mode: str, batch: str, options: argparse.Namespace) -> dict[str, Any]:
    """All cases of one model, dtype, mode and batch size."""
    torch.compiler.reset()
    s = prepared(name, DTYPES[dtype], mode, batch, options.device)
    count = len(s.images[0])
    say(f"{name}, {dtype}, {mode}, batch {count}")
    bases = {CASES[k].base for k in options.cases}
    wanted = [c for c in CASES.values() if c.key in options.cases or c.key in bases]
    load, began = os.getloadavg(), time.time()
    found, times = measure(s, wanted, options)
    by_key = {m.case.key: m for m in found}
    return {
        "model": name,
        "image_size": s.images[0].shape[-1],
        "dtype": dtype,
        "mode": mode,
        "batch": count,
        "fills_the_device": batch == "fill",
        "rounds": options.rounds,
        "pairs": options.pairs,
        "forwards_per_measurement": times,
        "load_average": {"before": load[0], "after": os.getloadavg()[0]},
        "minutes": round((time.time() - began) / 60, 2),
        "cases": [m.report(by_key[m.case.base], count) for m in found],
    }


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def identity(run: dict[str, Any]) -> tuple[Any, ...]:
    """What two runs of the same thing have in common."""
    return tuple(run[k] for k in ("model", "dtype", "mode", "batch"))


def parsed() -> argparse.Namespace:
    """The command line, with defaults that fit the device."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="one small model, few rounds: does it run?")
    parser.add_argument("--models", default="", help=f"globs of {', '.join(MODELS)}")
    parser.add_argument("--cases", default="*", help=f"globs of {', '.join(CASES)}")
    parser.add_argument("--dtypes", default="", help="float32, bfloat16, float16")
    parser.add_argument("--modes", default="", help="eager, compiled")
    parser.add_argument("--batch", default="", help='batch sizes; "fill" for the one that fills the device')
    parser.add_argument("--rounds", type=int, default=0)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--threads", type=int, default=0, help="of torch, on the CPU")
    parser.add_argument("--pairs", action="store_true", help="measure the base before each case")
    parser.add_argument("--append", action="store_true", help="keep other runs of the same file, if machine and versions agree")
    parser.add_argument("--out", type=Path)
    o = parser.parse_args()
    if o.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device here; nothing is measured or estimated without one.")
    gpu, small = o.device == "cuda", o.quick or o.device == "cpu"
    o.models = globbed(o.models or ("vit_small_patch16_224" if small else "*"), MODELS)
    o.cases = globbed(o.cases, CASES)
    o.dtypes = (o.dtypes or ("float32" if small else "float32,bfloat16")).split(",")
    o.modes = (o.modes or ("eager" if small else "eager,compiled")).split(",")
    o.batch = (o.batch or ("2" if o.quick else "1,fill" if gpu else "8")).split(",")
    o.rounds = o.rounds or (3 if o.quick else 30)
    o.out = o.out or RESULTS / f"throughput-{o.device}.json"
    return o


def globbed(patterns: str, names: Any) -> list[str]:
    """The names that one of some globs, with commas between them, stands for."""
    found = [n for n in names if any(fnmatch.fnmatch(n, p) for p in patterns.split(","))]
    if not found:
        raise SystemExit(f"{patterns!r} is none of {', '.join(names)}")
    return found


def begun(options: argparse.Namespace) -> dict[str, Any]:
    """Results without runs, or with those of the file if they are added to; threads are set, and the folder is there."""
    if options.threads:
        torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    results: dict[str, Any] = {"machine": machine(options.device), "versions": versions(), "runs": []}
    if options.append and options.out.exists():
        before = json.loads(options.out.read_text())
        if any(before[k] != results[k] for k in ("machine", "versions")):
            raise SystemExit(f"{options.out} is of another machine or of other versions: leave out --append, or give --out.")
        results["runs"] = before["runs"]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    return results


def main() -> None:
    options = parsed()
    results = begun(options)
    for name in options.models:
        for dtype in options.dtypes:
            for mode in options.modes:
                for batch in options.batch:
                    run = one_run(name, dtype, mode, batch, options)
                    results["runs"] = [r for r in results["runs"] if identity(r) != identity(run)] + [run]
                    options.out.write_text(json.dumps(results, indent=1) + "\n")
    say(f"wrote {options.out}")


if __name__ == "__main__":
    main()
