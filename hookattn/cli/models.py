"""Models of timm by name: with weights from the hub or a file, or without."""

from __future__ import annotations

import difflib
import inspect
import os
import socket
from pathlib import Path
from typing import Any, Union
from urllib.parse import urlparse

import huggingface_hub.constants as hub
import timm
import torch
from torch import nn

from ..errors import HookattnError

Sizes = Union[int, tuple[int, int], None]
DEFAULT_MODEL = "vit_small_patch14_reg4_dinov2.lvd142m"


def load_model(name: str, checkpoint: Path | None, img_size: Sizes, *, whole: bool) -> nn.Module:
    """A model with weights; one that takes images of any size, where it can be made so and whole photos are to be shown."""
    options: dict[str, Any] = {"num_classes": 0}
    if whole and _can_take_any_size(name):
        options["dynamic_img_size"] = True
    if checkpoint is not None:
        # pretrained, with the file in place of the hub's: timm then converts names and sizes as it does for those
        return create_model(name, img_size, pretrained=True, pretrained_cfg_overlay={"file": str(checkpoint)}, **options)
    if not _hub_answers():
        hub.HF_HUB_OFFLINE = True  # weights that were fetched before still load, and nobody waits for the others
    try:
        return create_model(name, img_size, pretrained=True, **options)
    except HookattnError:
        raise
    except Exception as error:  # whatever the hub's client and its network stack raise
        raise HookattnError(
            f"the weights of {name} could not be fetched ({type(error).__name__}). With a file of weights: "
            f"hookattn record PHOTO --model {name.split('.')[0]} --checkpoint FILE. Without a network: hookattn demo."
        ) from error


def _hub_answers() -> bool:
    """Whether the hub's name resolves, asked first, since its client waits and tries again; behind a proxy it need not."""
    if any(name.lower().endswith("_proxy") for name in os.environ):
        return True
    try:
        socket.getaddrinfo(urlparse(hub.ENDPOINT).hostname, 443)
    except OSError:
        return False
    return True


def _can_take_any_size(name: str) -> bool:
    """Whether a model that is made for one size can be made for any, as the signature of its class tells."""
    if not timm.is_model(name):
        return False
    try:
        with torch.device("meta"):  # without memory or weights
            model = timm.create_model(name)
    except Exception:  # some of timm look at values while they are made
        return False
    return "dynamic_img_size" in inspect.signature(type(model).__init__).parameters


def create_model(name: str, img_size: Sizes, **options: Any) -> nn.Module:
    if not timm.is_model(name):
        near = timm.list_models(f"*{name.split('.')[0]}*")[:6]
        near = near or difflib.get_close_matches(name, timm.list_models(), n=6, cutoff=0.4)
        raise HookattnError(f"timm has no model {name!r}." + (f" Did you mean {', '.join(near)}?" if near else ""))
    try:
        model: nn.Module = timm.create_model(name, **size_options(img_size), **options)
    except TypeError as error:
        if "'img_size'" not in str(error):
            raise
        model = timm.create_model(name, **options)  # one that takes any size is not made for one
    return model.eval()


def read_size(text: str | None) -> Sizes:
    """A number of pixels, or height and width with a comma between them."""
    if text is None:
        return None
    parts = text.split(",")
    if len(parts) > 2 or not all(part.strip().isdecimal() and int(part) for part in parts):
        raise HookattnError(f"--img-size {text!r} is no size: a number of pixels such as 224, or height and width as 224,320.")
    sides = [int(part) for part in parts]
    return sides[0] if len(sides) == 1 else (sides[0], sides[1])


def size_options(img_size: Sizes) -> dict[str, Sizes]:
    return {} if img_size is None else {"img_size": img_size}
