"""Weights from a file: read without running code in it, unwrapped, and loaded where all names fit."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Union

import torch
from torch import Tensor, nn

from ..errors import HookattnError, listed
from .output import say

# what training scripts keep weights under; averaged ones first, as timm takes them
_WRAPPERS = ("state_dict_ema", "model_ema", "teacher", "state_dict", "model", "student", "backbone", "encoder")
_PREFIXES = ("_orig_mod.", "module.", "model.", "teacher.", "student.", "backbone.", "encoder.", "visual.", "vision_model.")
_AROUND = _PREFIXES[:3]  # around all of a model, where the others tell it from what stands beside it
_HEADS: tuple[str, ...] = (
    "head",
    "heads",
    "fc",
    "classifier",
    "head_dist",
    "mask_token",
    "pre_logits",
    "predictor",
    "projection_head",
)
_HEADS += ("dino_head", "ibot_head", "proj_head", "logit_scale", "logit_bias", "pooler")


class Weights(NamedTuple):
    """Tensors by name, and in words what was done to come by them."""

    tensors: dict[str, Tensor]
    done: tuple[str, ...] = ()


@dataclass(frozen=True)
class Fit:
    """How names and shapes of weights fit those of a model.

    Attributes:
        names: what the model has.
        missing, unexpected: names that only the model, only the weights have, those of heads left out.
        misshapen: names of which both have tensors of different shapes, with both shapes.
        unused: names of heads that only the weights have.
        failed: why the names could not be compared.
    """

    names: Sequence[str] = ()
    missing: Sequence[str] = ()
    unexpected: Sequence[str] = ()
    misshapen: Sequence[str] = ()
    unused: Sequence[str] = field(default_factory=list)
    failed: str = ""

    @property
    def is_right(self) -> bool:
        return not (self.missing or self.unexpected or self.misshapen or self.failed)

    def __str__(self) -> str:
        lists = {"missing": self.missing, "unexpected": self.unexpected, "of another shape": self.misshapen}
        parts = [f"{len(names)} {what}: {listed(names)}" for what, names in lists.items() if names]
        return "; ".join([*([self.failed] if self.failed else []), *parts])


Attempt = Callable[[dict[str, Tensor]], tuple[Union[nn.Module, None], Fit]]
"""Makes a model of weights, and says how they fit; None where it cannot."""


def load_fitting(path: Path, attempt: Attempt) -> nn.Module:
    """Make a model with the weights of a file: as they are or, where those do not fit, without prefixes of their names.

    Raises:
        HookattnError: it is no file of weights, or names or shapes do not fit.
    """
    weights = read_weights(path)
    model, fit = attempt(dict(weights.tensors))
    if not fit.is_right and (stripped := _strip(weights, fit.names)).done != weights.done:
        weights = stripped
        model, fit = attempt(dict(weights.tensors))
    if model is None or not fit.is_right:
        done = f" ({', '.join(weights.done)})" if weights.done else ""
        raise HookattnError(
            f"{path} does not fit the model{done}: {fit}. Nothing was loaded; name the model the file is of: --model."
        )
    unused = [f"not used: {listed(fit.unused)}"] if fit.unused else []
    say(f"weights of {path.name}: {', '.join([*weights.done, *unused]) or 'as they are'}")
    return model


def read_weights(path: Path) -> Weights:
    """Read a file of PyTorch or of safetensors; pickled code is refused.

    Raises:
        HookattnError: it is neither, or holds no tensors.
    """
    try:
        with path.open("rb") as file:
            start = file.read(9)
        found = _read_safetensors(path) if start[8:] == b"{" else _read_torch(path)
    except Exception as error:  # whatever readers of two formats raise for what is neither
        reason = str(error).split("\n")[0] or type(error).__name__
        if "weights_only" in reason.lower() or "Weights only" in reason:
            reason = "to load it would run code that is in it; save its state_dict() alone"
        raise HookattnError(f"{path} is no file of weights that can be read: {reason}") from error
    done: list[str] = []
    while isinstance(found, Mapping) and (key := next((k for k in _WRAPPERS if _is_dict(found.get(k))), None)):
        done.append(f"took {key!r} of it")
        found = found[key]
    tensors = {k: v for k, v in found.items() if isinstance(v, Tensor)} if isinstance(found, Mapping) else {}
    if not tensors:
        raise HookattnError(f"{path} holds no weights by name, but {type(found).__name__}; save model.state_dict().")
    return Weights(tensors, tuple(done))


def _read_torch(path: Path) -> Any:
    with torch.serialization.safe_globals([argparse.Namespace]):  # in which training scripts keep their options
        return torch.load(path, map_location="cpu", weights_only=True)


def _read_safetensors(path: Path) -> Any:
    from safetensors.torch import load_file

    return load_file(path)


def _is_dict(found: Any) -> bool:
    return isinstance(found, Mapping) and len(found) > 0


def _strip(weights: Weights, names: Sequence[str]) -> Weights:
    """Take known prefixes off names where the model has no names with them; what does not have a part's prefix is left out."""
    tensors, done = weights
    while prefix := next((p for p in _PREFIXES if _begin(tensors, p) and not _begin(names, p)), None):
        kept = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix) or prefix in _AROUND}
        others = f" and left out {len(tensors) - len(kept)} others" if len(kept) < len(tensors) else ""
        done += (f"stripped {prefix!r} from names{others}",)
        tensors = kept
    return Weights(tensors, done)


def _begin(names: Any, prefix: str) -> bool:
    return any(name.startswith(prefix) for name in names)


def compare(model: nn.Module, tensors: Mapping[str, Any], missing: Sequence[str], unexpected: Sequence[str]) -> Fit:
    """Tell heads, which may be missing and unused, from names that have to fit."""
    config = getattr(model, "pretrained_cfg", None) or {}
    heads = config.get("classifier") or ()
    heads = (*_HEADS, *((heads,) if isinstance(heads, str) else heads))
    own = model.state_dict()
    misshapen = [
        f"{k} ({' x '.join(map(str, v.shape))} for {' x '.join(map(str, own[k].shape))})"
        for k, v in tensors.items()
        if k in own and getattr(v, "shape", None) != own[k].shape
    ]
    unused = [name for name in unexpected if _is_of_head(name, heads) or name.startswith("decoder")]
    return Fit(
        list(own),
        [name for name in missing if not _is_of_head(name, heads)],
        [name for name in unexpected if name not in unused],
        misshapen,
        unused,
    )


def _is_of_head(name: str, heads: Sequence[str]) -> bool:
    return any(name == head or name.startswith(f"{head}.") for head in heads)


@contextmanager
def watching_loads() -> Iterator[list[Fit]]:
    """Keep how weights fit each time a model loads them, whatever others make of names on the way; shapes are not forced."""
    fits: list[Fit] = []
    load = nn.Module.load_state_dict

    def watched(self: nn.Module, state_dict: Mapping[str, Any], *_: Any, **__: Any) -> Any:
        own = self.state_dict()
        shaped = {k: v for k, v in state_dict.items() if k not in own or getattr(v, "shape", None) == own[k].shape}
        result = load(self, shaped, strict=False)
        missing = [name for name in result.missing_keys if name not in state_dict]
        fits.append(compare(self, state_dict, missing, result.unexpected_keys))
        return result

    # timm converts names and sizes between reading and loading, in functions of each model's own: only here it shows what fits
    nn.Module.load_state_dict = watched  # type: ignore[method-assign]
    logger = logging.getLogger("timm")
    level = logger.level
    logger.setLevel(logging.ERROR)  # its warnings of names, which are judged here
    try:
        yield fits
    finally:
        logger.setLevel(level)
        nn.Module.load_state_dict = load  # type: ignore[method-assign]
