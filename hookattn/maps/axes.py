"""How modules fold the axes of the map they form, and of what they form it of: into (batch, heads, ...) and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from ..errors import UnreadableError
from ..recipes.registry import find_axes, qualified_name


def check_softmax_axis(module: nn.Module, batch: int | None, scores: Tensor, dim: int) -> Tensor:
    """Bring scores of a softmax, or what has come of it, to (images * windows, heads, queries, keys), if it is over keys."""
    if dim not in (-1, scores.dim() - 1):
        raise UnreadableError(
            f"{class_of(module)} takes its softmax over axis {dim} of {tuple(scores.shape)}, not over keys; describe its map "
            "with @hookattn.recipe."
        )
    # By size alone: of scores (batch, queries, heads, keys) every number would be a map's, and all of them in the wrong place.
    elsewhere = scores.dim() == 4 and scores.shape[1] != _heads(module) == scores.shape[2]
    if elsewhere and find_axes(module) is None:
        raise _no_heads(module, scores)
    return unfold_axes(module, scores, batch)


def unfold_axes(module: nn.Module, tensor: Tensor, batch: int | None = None) -> Tensor:
    """Bring what a module has computed to (images * windows, heads, ...), by the form of its class or by its heads."""
    heads = _heads(module)
    form = _form(module, tensor.dim())
    if form is not None:
        sizes = {"h": heads} if heads is not None and "(b h)" in form else {}
        return rearrange(tensor, f"{form} -> {_canonical(form)}", **sizes)
    if tensor.dim() == 4 and (heads is None or tensor.shape[1] % heads == 0 or heads % max(1, tensor.shape[1]) == 0):
        return tensor
    if tensor.dim() == 3 and heads in (None, 1) and batch in (None, tensor.shape[0]):
        return tensor.unsqueeze(1)
    raise _no_heads(module, tensor)


def _no_heads(module: nn.Module, tensor: Tensor) -> UnreadableError:
    return UnreadableError(
        f"{class_of(module)} computes its map on {tensor.dim()} axes, {tuple(tensor.shape)}, which are not (batch, head, ...); "
        "describe its map with @hookattn.recipe."
    )


def fold_axes(module: nn.Module, attention: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Lay a map (images * windows, heads, queries, keys) out as the module has it, to be put in place of its own."""
    form = _form(module, len(shape))
    if form is None:
        return attention.reshape(shape)
    axes = form.replace("(b h)", "bh").split()
    sizes = {"w": shape[axes.index("w")]} if "w" in axes else {}
    return rearrange(attention, f"{_canonical(form)} -> {form}", **sizes)


def _form(module: nn.Module, rank: int) -> str | None:
    """The filed form of a module's map, if it has so many axes."""
    form = find_axes(module)
    return form if form is not None and len(form.replace("(b h)", "bh").split()) == rank else None


def _canonical(form: str) -> str:
    """The axes of a map as its reader has them, in the letters of a form."""
    return f"{'(b w)' if 'w' in form else 'b'} {'h' if 'h' in form else '1'} q k"


def _heads(module: nn.Module) -> int | None:
    """The number of heads that a module says it has, in any word that libraries use; None where it does not say."""
    told = (getattr(module, name, None) for name in ("num_heads", "heads", "num_attention_heads"))
    return next((n for n in told if isinstance(n, int)), None)


def interleave_heads(maps: Sequence[Any], module: nn.Module) -> Any:
    """Join several maps that one call has formed, or their gradients: head h of map i becomes head h * maps + i."""
    if len(maps) == 1:
        return maps[0]
    if len({(type(m), m.shape, getattr(m, "is_causal", None)) for m in maps}) > 1:
        raise UnreadableError(
            f"{class_of(module)} forms {len(maps)} maps of shapes {', '.join(str(m.shape) for m in maps)}; name the attention "
            "modules inside it with layers=, or describe one map with @hookattn.recipe."
        )
    whole = [m.narrow() for m in maps]  # biases and masks are expanded to the heads

    def turn(name: str) -> Any:
        values = [getattr(m, name) for m in whole]
        if name == "bias":
            return tuple([torch.stack(biases, dim=2).flatten(1, 2) for biases in zip(*values)])
        return torch.stack(values, dim=2).flatten(1, 2) if isinstance(values[0], Tensor) else values[0]

    return replace(whole[0], **{field.name: turn(field.name) for field in fields(whole[0])})


def class_of(module: nn.Module) -> str:
    return qualified_name(type(module))
