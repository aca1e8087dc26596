"""Any architecture of timm, as small as it goes with the same classes of attention."""

from __future__ import annotations

import inspect
import itertools
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import is_dataclass
from typing import Any
from unittest import mock

import timm
import torch
from oracle import Call, randomise, softmaxes_by_call
from torch import Tensor, nn
from torch.utils import _pytree as pytree

DTYPES = (torch.float64, torch.float32)  # what is tried, in this order
Built = tuple[Any, Tensor, list[Call], dict[str, Any], Any]
"""A model, images for it, its calls that form softmaxes, and the arguments and the image size it was made with."""


def in_full(name: str) -> tuple[Any, dict[str, Any]]:
    """An architecture as it is, without memory, and the arguments that its class is made with."""
    arguments: dict[str, Any] = {}
    true = timm.models.build_model_with_cfg

    def build(cls: type, *args: Any, **kwargs: Any) -> Any:
        for c in reversed(cls.__mro__[:-2]):
            arguments.update({p.name: p.default for p in inspect.signature(c).parameters.values()})
        cfg = kwargs.get("model_cfg", kwargs.get("cfg"))
        if is_dataclass(cfg) and "kwargs" in arguments:  # a class that takes arguments over those of its cfg
            arguments.update(vars(cfg))
        arguments.update(kwargs)
        return true(cls, *args, **kwargs)

    with ExitStack() as stack, torch.device("meta"):
        for module in [m for key, m in sys.modules.items() if key.startswith("timm.models.")]:
            if hasattr(module, "build_model_with_cfg"):
                stack.enter_context(mock.patch.object(module, "build_model_with_cfg", build))
        return timm.create_model(name).eval(), {k: v for k, v in arguments.items() if v is not inspect.Parameter.empty}


def ladder(arguments: dict[str, Any], full: tuple[int, int]) -> Iterator[tuple[dict[str, Any], Any]]:
    """Arguments and an input size to try, from the smallest model to the one as it is."""
    depth, wide, special = shallow(arguments), narrow(arguments), small_windows(arguments)
    patch = arguments.get("patch_size")
    small = 4 * patch if isinstance(patch, int) and patch > 8 else 64
    for kwargs in ({**depth, **wide, **special}, {**depth, **wide}, {**depth, **special}, depth, {}):
        for size in sorted({small, max(small, 96), full[0] // 2, min(full[0], 256)}):
            two = isinstance(arguments.get("img_size"), (tuple, list))
            yield kwargs | ({"img_size": (size, size) if two else size} if "img_size" in arguments else {}), size
    yield {}, full


def shallow(arguments: dict[str, Any]) -> dict[str, Any]:
    """At most two blocks, or two in each stage."""
    names = [k for k in ("depth", "depths", "layers", "stages", "serial_depths") if arguments.get(k)]
    found = {k: pytree.tree_map(lambda d: min(d, 2), arguments[k]) for k in names}
    if isinstance(arguments.get("depth"), int):  # what is told block by block
        long = {k: v for k, v in arguments.items() if isinstance(v, (tuple, list)) and len(v) == arguments["depth"]}
        found |= {k: type(v)((v[0], v[len(v) // 2])) for k, v in long.items()}
    return found


def narrow(arguments: dict[str, Any]) -> dict[str, Any]:
    """Sixteen channels a head, or the widths of stages in proportion to the first."""
    found, heads = {}, arguments.get("num_heads")
    for key in [k for k in ("embed_dim", "embed_dims", "dims") if arguments.get(k)]:
        width = arguments[key]
        if isinstance(width, int):
            found = {key: 16 * pytree.tree_leaves(heads)[0]} if heads else {}
        elif all(isinstance(w, int) for w in width):
            heads = heads if isinstance(heads, (tuple, list)) and len(heads) == len(width) else None
            found = {key: type(width)(16 * h for h in heads) if heads else type(width)(32 * round(w / width[0]) for w in width)}
    return found


def small_windows(arguments: dict[str, Any]) -> dict[str, Any]:
    special: dict[str, Any] = {"window_size": 4, "local_up_to_layer": 1, "intermediate_size": 96}
    special |= {"window_size": 3, "global_attn_indexes": (1,)} if arguments.get("global_attn_indexes") else {}
    return {k: v for k, v in special.items() if arguments.get(k) or (k in arguments and "window_ratio" not in arguments)}


def build(name: str, kwargs: dict[str, Any], size: Any, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor]:
    """A model in eval mode with noise on its parameters, and two images for it.

    Batch norms, and they alone, take the statistics of one forward on them: maps are neither flat nor one-hot.
    """
    torch.manual_seed(0)
    model = randomise(timm.create_model(name, **kwargs))
    x = torch.randn(2, 3, *((size, size) if isinstance(size, int) else size), dtype=dtype)
    norms = [m for m in model.to(dtype).modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum, norm.training = None, True
    with torch.no_grad():
        model(x)
    for norm in norms:
        norm.training = False
    return model, x


def smallest(name: str, model: Any, arguments: dict[str, Any], kinds: set[str], pairless: set[str]) -> Built:
    """The first model of the ladder that runs, with softmaxes in the very classes of the full one and more than four keys.

    Args:
        name, model, arguments: the architecture, as it is and what its class was made with.
        kinds: classes that form a softmax in it.
        pairless: classes whose softmax may have few keys.
    """
    failures: list[str] = []
    huge, full = sum(p.numel() for p in model.parameters()) > 1e9, model.pretrained_cfg["input_size"][1:]
    for dtype, (kwargs, size) in itertools.product(DTYPES, ladder(arguments, full)):
        if huge and not kwargs.keys() - {"img_size"}:
            continue
        try:
            built, x = build(name, kwargs, size, dtype)
            calls = softmaxes_by_call(built, x)
        except Exception as error:  # whatever timm raises on arguments that do not fit
            failures.append(f"{kwargs} at {size}: {error!r}")
            continue
        keys: Counter[str] = Counter()
        for call in calls:
            keys[call.kind] = max(keys[call.kind], *(s.shape[-1] for s in call.softmaxes))
        if keys.keys() == kinds and (size == full or all(keys[kind] > 4 for kind in kinds - pairless)):
            return built, x, calls, kwargs, size
        failures.append(f"{kwargs} at {size}: other classes, or few keys")
    raise RuntimeError("; ".join(failures))
