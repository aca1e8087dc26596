"""What is right: the softmaxes of the model itself, on its unfused path in float64. It knows nothing of hookattn."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import timm
import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}  # of `judge`
# how a softmax that is not (images * windows, heads, queries, keys) already becomes that
FOLDS = {
    "(b h) q k -> b h q k": ("layers.bottleneck_attn.BottleneckAttn", "models.vision_transformer_sam.Attention"),
    "(b h) w q k -> (b w) h q k": ("layers.halo_attn.HaloAttn",),
    "b h w q k -> (b w) h q k": ("models.hiera.MaskUnitAttention", "models.nest.Attention", "models.volo.OutlookAttention"),
    "b w h q k -> (b w) h q k": ("models.twins.LocallyGroupedAttn",),
    "b q k -> b 1 q k": ("models.efficientvit_msra.CascadedGroupAttention", "models.iformer.SHMA", "models.shvit.SHSA"),
}


def randomise(model: nn.Module) -> Any:
    """The same in eval mode, with noise on all that is zero or one when it is new: maps are neither flat nor one-hot."""
    for module in model.modules():
        constants = {n: b for n, b in module.named_buffers(recurse=False) if n.endswith("bias") and b.is_floating_point()}
        for key, tensor in {**dict(module.named_parameters(recurse=False)), **constants}.items():
            matrix = key.endswith("weight") and tensor.dim() > 1
            spread = tensor[0].numel() ** -0.5 if matrix else 0.5 if "bias" in key else 0.3
            tensor.data.add_(torch.randn_like(tensor), alpha=spread)
    return model.eval()


def unfuse(model: Any) -> Any:
    """The same with fused attention off: by timm's flags, or as transformers does it."""
    set_flags(fused_modules(model), False)
    if hasattr(model, "set_attn_implementation"):
        model.set_attn_implementation("eager")
    return model


def kind_of(module: nn.Module) -> str:
    """The class of a module, without the name of timm."""
    return f"{type(module).__module__}.{type(module).__qualname__}".removeprefix("timm.")


@contextmanager
def unfused(model: nn.Module) -> Iterator[None]:
    """For as long as the block lasts, every `fused_attn` flag is off."""
    flagged = fused_modules(model)
    set_flags(flagged, False)
    try:
        yield
    finally:
        set_flags(flagged, True)


def fused_modules(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if getattr(m, "fused_attn", False)]


def set_flags(modules: Sequence[Any], fused: bool) -> None:
    for module in modules:
        module.fused_attn = fused


class Softmaxes(TorchFunctionMode):
    """Hands over what every softmax puts out; a fused attention, which forms none, raises."""

    def __init__(self, seen: Callable[[Tensor], None]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out, name = func(*args, **(kwargs or {})), getattr(func, "__name__", "")
        if name == "scaled_dot_product_attention":
            raise RuntimeError("fused attention runs although it is turned off: what is right cannot be told")
        if name == "softmax":
            self.seen(out)
        return out


@dataclass
class Call:
    """One call of one module, and what its softmaxes put out."""

    base: str
    name: str
    module: Any
    softmaxes: list[Tensor] = field(default_factory=list)
    applied: list[Tensor] = field(default_factory=list)  # what came out of its `attn_drop`: the map after heads were mixed

    @property
    def kind(self) -> str:
        return kind_of(self.module)

    def canonical(self) -> Tensor:
        """(images * windows, heads, queries, keys); the heads of several softmaxes in turn."""
        fold, maps = next((f for f, kinds in FOLDS.items() if self.kind in kinds), ""), self.softmaxes
        if maps[0].dim() == len(fold.partition(" ->")[0].replace("b h)", "b)").split()):
            maps = [rearrange(m, fold, **({"h": self.module.num_heads} if "(b h)" in fold else {})) for m in maps]
        if maps[0].dim() != 4:
            raise RuntimeError(f"no fold is known for the softmax {tuple(maps[0].shape)} of {self.kind}")
        return torch.stack(maps, dim=2).flatten(1, 2)


def softmaxes_by_call(model: nn.Module, x: Tensor) -> list[Call]:
    """Calls that form softmaxes in a forward without fused attention, in the order they start."""
    names = {module: name for name, module in model.named_modules()}
    times: Counter[str] = Counter()
    calls: list[Call] = []
    running: list[Call] = []

    def start(module: nn.Module, _: Any) -> None:
        if module in names and not isinstance(module, nn.Softmax):
            base = names[module]
            running.append(Call(base, f"{base}#{times[base]}" if times[base] else base, module))
            calls.append(running[-1])
            times[base] += 1

    def stop(module: nn.Module, _: Any, output: Any) -> None:
        if running and running[-1].module is module:
            running.pop()
            if names[module].endswith("attn_drop"):
                running[-1].applied.append(output.detach().clone())

    with ExitStack() as stack, torch.no_grad():
        stack.enter_context(unfused(model))
        stack.enter_context(register_module_forward_pre_hook(start))
        stack.enter_context(register_module_forward_hook(stop, always_call=True))
        stack.enter_context(Softmaxes(lambda m: running[-1].softmaxes.append(m.detach().clone())))
        model(x)
    return [call for call in calls if call.softmaxes]


def right_answers(model: nn.Module, x: Tensor, wanted: Sequence[str]) -> dict[str, list[Tensor]]:
    """What is right of each kind that is wanted, "maps", "rows", "head" or "statistics": no more is held than that."""
    plain = isinstance(model, (timm.models.VisionTransformer, timm.models.SwinTransformer))
    centres = centres_of(model, x.shape[-1]) if plain else iter(())
    parts: dict[str, Callable[[Tensor], list[Tensor]]] = {
        "maps": lambda m: [m],
        "rows": lambda m: [m[:, :, 0].clone()],
        "head": lambda m: [m[:, 0].clone()],
        "statistics": lambda m: list(figures_of(m, next(centres))),
    }
    right: dict[str, list[Tensor]] = {kind: [] for kind in wanted}

    def seen(m: Tensor) -> None:
        for kind in wanted:
            right[kind] += parts[kind](m)

    with Softmaxes(seen), torch.no_grad():
        exact_copy(model)(x.double())
    return right


def right_gradients(model: nn.Module, x: Tensor, backward: Callable[[nn.Module, Tensor], Any]) -> list[Tensor]:
    """Gradients of all maps after a forward and a backward of the same model."""
    maps: list[Tensor] = []

    def seen(m: Tensor) -> None:
        m.retain_grad()
        maps.append(m)

    with Softmaxes(seen), torch.enable_grad():
        backward(exact_copy(model), x.double())
    return [m.grad for m in maps if m.grad is not None]


def exact_copy(model: nn.Module) -> Any:
    return unfuse(copy.deepcopy(model)).double()


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


def judge(kind: str, got: Sequence[Tensor], right: Sequence[Tensor], dtype: torch.dtype) -> tuple[str, float | None]:
    """A verdict on what was read of a model of some dtype, and how far it is off.

    That is ||got - right|| over ||right - 1/keys||, so that a flat map is off by 1. For statistics it is over
    ||right - its mean||, or a hundredth of ||right|| if that is more, since rounding is in proportion to it; for gradients
    over ||right||.
    """
    if not kind:
        return "ran", None
    if not got:
        return "empty", None
    if len(got) != len(right) or any(g.shape[1:] != r.shape[1:] for g, r in zip(got, right)):
        return f"wrong: {len(got)} of {tuple(got[0].shape)}, not {len(right)} of {tuple(right[0].shape)}", None
    errors = []
    for g, r in zip(got, right):
        flat = 0.0 if kind == "gradients" else float(r.mean()) if kind == "statistics" else 1 / r.shape[-1]
        size = max((r - flat).norm(), 0.01 * r.norm() if kind == "statistics" else 0.0)
        errors.append(float((g[: len(r)].to(r) - r).norm() / size))
    worst = max(math.inf if math.isnan(e) else e for e in errors)
    return ("right" if worst <= TOLERANCE[dtype] else f"wrong: off by {worst:.2g}"), worst


def largest_difference(a: Tensor, b: Tensor) -> float:
    """Between two maps; infinite where shapes differ or something is not finite."""
    return float((a.double() - b.double()).abs().nan_to_num(math.inf).max()) if a.shape == b.shape else math.inf
