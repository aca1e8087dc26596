"""Models whose maps lie on an image in windows, stages and grids of their own, and where timm says they lie."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from einops import rearrange
from torch import Tensor, nn

from hookattn import AttentionRecorder
from support.models import randomise
from support.reading import record


class Alone(nn.Module):
    """One module, which is called with the input and what else it takes."""

    def __init__(self, inner: nn.Module, more: tuple[Any, ...]) -> None:
        super().__init__()
        self.inner, self.more = inner, more

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, *(a[:1].expand(len(x), *a.shape[1:]).double() if isinstance(a, Tensor) else a for a in self.more))


def the_class(name: str) -> Any:
    module, _, cls = name.rpartition(".")
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"this timm has no {module}")
    return getattr(importlib.import_module(module), cls)


def made(option: Any) -> Any:
    """A class for its name, an object for the name of its class and arguments."""
    if isinstance(option, tuple) and option and isinstance(option[0], str):
        return the_class(option[0])(**option[1])
    return the_class(option) if isinstance(option, str) and "." in option else option


def build(name: str, *more: Any, **options: Any) -> nn.Module:
    """A randomised float64 model of timm, or a module of a class of this name alone."""
    if "." in name:
        options = {key: made(option) for key, option in options.items()}
        return randomise(Alone(the_class(name)(**options), more)).double().eval()
    if not timm.is_model(name):
        pytest.skip(f"this timm has no {name}")
    return randomise(timm.create_model(name, **options)).double().eval()


SWIN: dict[str, Any] = {"window_size": 4, "embed_dim": 24, "depths": [2, 2], "num_heads": [2, 4]}


SHRUNK: dict[str, Any] = {"depths": [1, 1, 1, 1], "embed_dims": [16, 32, 40, 64], "num_heads": [1, 2, 5, 8]}


VIT: dict[str, Any] = {"depth": 1, "embed_dim": 48, "num_heads": 3}


MVIT: dict[str, Any] = {"dim": 16, "dim_out": 16, "num_heads": 2, "feat_size": (16, 16)}


def marked(rows: int, columns: int) -> Tensor:
    """(1, rows, columns, 1): the numbers of the places, and 1 more."""
    return torch.arange(1.0, rows * columns + 1).reshape(1, rows, columns, 1)


def swin_places(block: Any, rows: int, columns: int) -> Tensor:
    """(windows, tokens): the place of every token of a Swin block, by timm's own code: what its attention receives."""
    received = []
    handle = block.attn.register_forward_pre_hook(lambda module, args: received.append(args[0]))
    x = marked(rows, columns).expand(-1, -1, -1, block.dim).double()
    with handle, torch.no_grad():
        (getattr(block, "_attn", None) or block._shifted_window_attn)(x)
    return received[0][..., 0].round().long() - 1


def as_patches(images: list[Tensor], side: int, length: int) -> dict[str, Tensor]:
    """Images of several sizes, (channels, height, width), cut into patches and padded to one length."""
    batch = {
        "patches": torch.zeros(len(images), length, 3 * side**2, dtype=torch.float64),
        "patch_coord": torch.zeros(len(images), length, 2, dtype=torch.long),
        "patch_valid": torch.zeros(len(images), length, dtype=torch.bool),
    }
    for i, image in enumerate(images):
        cut_up = rearrange(image, "c (h y) (w x) -> h w (y x c)", y=side, x=side)
        rows, columns, _ = cut_up.shape
        batch["patches"][i, : rows * columns] = cut_up.flatten(0, 1)
        batch["patch_coord"][i, : rows * columns] = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
        batch["patch_valid"][i, : rows * columns] = True
    return batch


SIZES = [(2, 5), (4, 3), (1, 1)]


def naflex(name: str = "naflexvit_base_patch16_map", **options: Any) -> tuple[AttentionRecorder, dict[str, Tensor]]:
    model = build(name, **(VIT | {"class_token": False, "reg_tokens": 0} | options))
    batch = as_patches([torch.randn(3, 16 * h, 16 * w, dtype=torch.float64) for h, w in SIZES], 16, 14)
    return record(model, batch), batch


Place = tuple[int, int]


Size = tuple[int, int]


SAM: dict[str, Any] = {"depth": 2, "embed_dim": 48, "num_heads": 3, "window_size": 4, "global_attn_indexes": [1]}


DAVIT: dict[str, Any] = {"depths": [1, 1, 1, 1], "embed_dims": [16, 32, 48, 64], "num_heads": [1, 2, 3, 4]}


MAXVIT: dict[str, Any] = {"img_size": (64, 96)}


GEMMA: dict[str, Any] = {"head_dim": 16, "intermediate_size": 96, "position_embedding_size": 64, "img_size": (96, 144)}


def some_places(grid: Size) -> list[Place]:
    """The corners and some others."""
    rows, columns = grid
    corners = [(0, 0), (0, columns - 1), (rows - 1, 0), (rows - 1, columns - 1), (0, 1), (1, 0)]
    others = torch.randperm(rows * columns)[:6].tolist()
    return list(dict.fromkeys([*corners, *((i // columns, i % columns) for i in others)]))


def made_of(name: str, size: tuple[int, int], **options: Any) -> Callable[[], tuple[nn.Module, Tensor]]:
    return lambda: (build(name, **options), torch.randn(2, 3, *size).double())
