"""Models of timm by name: with weights from the hub or a file, or without."""

from __future__ import annotations

import difflib
import os
import socket
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import huggingface_hub.constants as hub
import timm
from torch import nn

from ..errors import HookattnError

DEFAULT_MODEL = "vit_small_patch14_reg4_dinov2.lvd142m"


def load_model(name: str, checkpoint: Path | None, img_size: int | None) -> nn.Module:
    if checkpoint is not None:
        # pretrained, with the file in place of the hub's: timm then converts names and sizes as it does for those
        return create_model(name, img_size, pretrained=True, num_classes=0, pretrained_cfg_overlay={"file": str(checkpoint)})
    if not _hub_answers():
        hub.HF_HUB_OFFLINE = True  # weights that were fetched before still load, and nobody waits for the others
    try:
        return create_model(name, img_size, pretrained=True, num_classes=0)
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


def create_model(name: str, img_size: int | None, **options: Any) -> nn.Module:
    if not timm.is_model(name):
        near = timm.list_models(f"*{name.split('.')[0]}*")[:6]
        near = near or difflib.get_close_matches(name, timm.list_models(), n=6, cutoff=0.4)
        raise HookattnError(f"timm has no model {name!r}." + (f" Did you mean {', '.join(near)}?" if near else ""))
    model: nn.Module = timm.create_model(name, **size_options(img_size), **options)
    return model.eval()


def size_options(img_size: int | None) -> dict[str, int]:
    return {} if img_size is None else {"img_size": img_size}
