"""A model on one device or in one dtype, and what it is called with on another, where it is called here and not by the user."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..errors import HookattnError, ModelError, listed
from .meta import name_missing

# Undocumented, torch 2.6 to 2.15: what operators raise of tensors that lie apart has one of these words in it
_WORDS = ("device", "type", "meta")


@contextmanager
def telling_apart(model: nn.Module, *given: Any) -> Iterator[None]:
    """Say where a model lies and what it is called with, and what to type, if they lie apart and something raises of it.

    They may lie apart all the same: with hooks that move what a module is called with, or under autocast.

    Args:
        model: what is called.
        given: what it is called with, in any nesting.

    Raises:
        ModelError: in place of a RuntimeError of PyTorch's.
    """
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, (HookattnError, torch.OutOfMemoryError)) or not any(word in str(error) for word in _WORDS):
            raise
        if not (told := _tell_devices(model, given) or _tell_dtypes(model, given)):
            raise
        raise ModelError(f"{told} ({str(error).splitlines()[0]})") from error


def _tell_devices(model: nn.Module, given: Any) -> str:
    own = dict.fromkeys(str(each.device) for each in (*model.parameters(), *model.buffers()))
    others = [device for device in dict.fromkeys(str(each.device) for each in _tensors_in(given)) if device not in own]
    if not own or not others:
        return ""
    told = f"this {type(model).__name__} lies on {listed(own)}, and what it is called with on {listed(others)}"
    first = next(iter(own))
    if missing := name_missing(model):
        return f"{told}: {missing} Where shapes are enough, images.to('meta')."
    if "meta" in others:
        return f"{told}, where there are shapes and no values: make that on {first}, too."
    return f"{told}: bring that there, images.to({first!r}), or the model here, model.to({others[0]!r})."


def _tell_dtypes(model: nn.Module, given: Any) -> str:
    own = dict.fromkeys(each.dtype for each in model.parameters() if each.is_floating_point())
    others = [t.dtype for t in _tensors_in(given) if t.is_floating_point() and t.dtype not in own]
    if not own or not others:
        return ""
    told = f"this {type(model).__name__} is {listed(map(str, own))}, and what it is called with {others[0]}"
    return f"{told}: images.to({next(iter(own))})."


def _tensors_in(given: Any) -> list[Tensor]:
    return [each for each in pytree.tree_leaves(given) if isinstance(each, Tensor)]
