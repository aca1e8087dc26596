"""What modules form themselves: the softmaxes of a model on its own unfused path, and what autograd gives of them."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from support.modes import Functions

# how a class lays out the map it forms itself, told independently of the package
LAYOUTS = {
    "nest.Attention": "b h w q k -> (b w) h q k",
    "hiera.MaskUnitAttention": "b h w q k -> (b w) h q k",
    "volo.OutlookAttention": "b h w q k -> (b w) h q k",
    "twins.LocallyGroupedAttn": "b w h q k -> (b w) h q k",
    "halo_attn.HaloAttn": "(b h) w q k -> (b w) h q k",
    "bottleneck_attn.BottleneckAttn": "(b h) q k -> b h q k",
    "vision_transformer_sam.Attention": "(b h) q k -> b h q k",
    "iformer.SHMA": "b q k -> b 1 q k",
    "shvit.SHSA": "b q k -> b 1 q k",
    "attention2d.MultiQueryAttentionV2": "b q h k -> b h q k",
}


@contextmanager
def unfused(model: nn.Module, edit: Callable[[int, Tensor], Tensor | None] | None = None) -> Iterator[list[Tensor]]:
    """Run a model on its own unfused path and collect what each softmax puts out, in order.

    Args:
        model: whose `fused_attn` flags are off meanwhile.
        edit: sees the n-th and may make another one of it.
    """
    fused, made = [m for m in model.modules() if getattr(m, "fused_attn", False)], list[Tensor]()

    def see(func: Any, out: Any, args: Any, kwargs: Any) -> Tensor | None:
        if getattr(func, "__name__", "") != "softmax":
            return None
        made.append(out)
        return None if edit is None else edit(len(made) - 1, out)

    for module in fused:
        module.fused_attn = False
    try:
        with Functions(see):
            yield made
    finally:
        for module in fused:
            module.fused_attn = True


def softmaxes_of(model: nn.Module, *args: Any, **kwargs: Any) -> list[Tensor]:
    """What the softmaxes of a model put out in one forward."""
    with unfused(model) as made, torch.no_grad():
        model(*args, **kwargs)
    return made


def short_name(module: nn.Module) -> str:
    """The file of a module's class and the class."""
    cls = type(module)
    return ".".join([*cls.__module__.split("."), *cls.__qualname__.split(".")][-2:])


def exists(name: str) -> bool:
    """Whether the library at hand has a class, where it is defined."""
    module, _, kind = name.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), kind, None)
    except ImportError:
        return False
    return found is not None and found.__module__ == module


def as_read(module: Any, maps: list[Tensor]) -> Tensor:
    """Softmaxes of one call of a module as (images * windows, heads, queries, keys); heads of two softmaxes in turn."""
    if len(maps) > 1 and maps[0].dim() == 4:
        return rearrange(maps, "two b h q k -> b (h two) q k")
    if len(maps) > 1:  # one head after the other
        return torch.stack(maps, dim=1)
    pattern = LAYOUTS.get(short_name(module))
    if pattern is None or maps[0].dim() != len(pattern.split(" -> ")[0].replace("(b h)", "bh").split()):
        return maps[0]
    return rearrange(maps[0], pattern, **({"h": module.num_heads} if "(b h)" in pattern else {}))


def own_softmax(module: Any, *args: Any, **kwargs: Any) -> Tensor:
    """What a module forms itself, unfused, on these arguments: (images * windows, heads, queries, keys)."""
    with unfused(module) as maps, torch.no_grad():
        module.forward(*args, **kwargs)
    return as_read(module, maps)


def own_map(attn: Any, x: Tensor) -> Tensor:
    """The map of timm's `Attention` from its formula, in the graph."""
    q, k, _ = attn.qkv(x).unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
    return ((q * attn.scale) @ k.transpose(-2, -1)).softmax(-1)


def loss_of(output: Tensor, which: int = 1) -> Tensor:
    """Something whose gradient is another one for every token and channel."""
    output = output.flatten(1)
    return (output * torch.arange(output.shape[1]).to(output).add(which).cos()).square().sum()


def own_gradients(model: nn.Module, x: Tensor, loss: Callable[[Tensor], Tensor] = loss_of) -> dict[str, Tensor]:
    """dL/dA by the module that forms A: the model is run unfused, and autograd asked for the gradients of its softmaxes."""
    softmaxes: dict[str, list[Tensor]] = {}
    modules, running = dict(model.named_modules()), list[str]()
    with unfused(model, lambda _, a: softmaxes.setdefault(running[-1], []).append(a)) as _, ExitStack() as stack:
        for name, module in modules.items():
            stack.enter_context(module.register_forward_pre_hook(lambda *_, name=name: running.append(name)))
            stack.enter_context(module.register_forward_hook(lambda *_: [running.pop(), None][1]))
        end = loss(model(x))
    return {
        name: as_read(modules[name], list(torch.autograd.grad(end, maps, retain_graph=True, materialize_grads=True)))
        for name, maps in softmaxes.items()
    }


@contextmanager
def formed() -> Iterator[list[Tensor]]:
    """Every map that is formed without a graph, written down from the definition, whatever forms it."""
    maps: list[Tensor] = []

    def see(func: Any, out: Any, args: Any, kwargs: Any) -> None:
        if func is F.scaled_dot_product_attention:
            maps.append(_attention(*args, **kwargs))
        elif func in (torch.softmax, Tensor.softmax, F.softmax, torch.special.softmax):
            maps.append(out)
        elif func is F.multi_head_attention_forward:
            maps.append(func(*args, **{**kwargs, "need_weights": True, "average_attn_weights": False})[1])

    with Functions(see), torch.no_grad():
        yield maps


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
    is_causal: bool = False,
    **_: Any,
) -> Tensor:
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        scores = scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool).tril(), -math.inf)
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -math.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    return scores.softmax(-1)


def agree(got: Tensor, expected: Tensor) -> None:
    """Within what sums in float64 leave open."""
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-9)
