"""A default device: what a recorder makes for itself lies where it belongs, whatever the user has set."""

from __future__ import annotations

import ast
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from support.models import TINY, enliven, tiny
from torch import Tensor, nn

import hookattn
from hookattn import AttentionMap, AttentionRecorder
from hookattn.analysis import contributions, mean_attention_distance, rollout

MAKES = {"zeros", "ones", "empty", "full", "rand", "randn", "randint", "randperm", "arange", "linspace", "eye"}
MAKES |= {"tensor", "as_tensor", "scalar_tensor", "normal", "tril_indices", "triu_indices"}
READ = [
    n for n in ("vit", "vit_registers", "rope_mixed", "beit", "relpos", "parallel", "differential", "eva_fused") if n in TINY
]
SMALL: dict[str, dict[str, Any]] = {  # windows, pooled keys, scores of what came out before, keys of a coarser grid
    "swin_tiny_patch4_window7_224": {"img_size": 64, "window_size": 4, "depths": (2, 2), "embed_dim": 24, "num_heads": (1, 2)},
    "efficientvit_m0": {},
    "pvt_v2_b0": {},
    "nextvit_small": {},
}


def test_whatever_the_package_makes_is_told_where_to_lie() -> None:
    """A tensor that is made without a device lies on the user's default device, and meets others there that do not."""
    found = []
    for path in Path(hookattn.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in MAKES:
                is_of_torch = isinstance(node.func.value, ast.Name) and node.func.value.id == "torch"
                if is_of_torch and not any(k.arg == "device" for k in node.keywords):
                    found.append(f"{path.name}:{node.lineno}")
    assert found == []


def of_timm(name: str) -> tuple[nn.Module, Tensor]:
    size = 64 if name != "efficientvit_m0" else 224
    model, x = timm.create_model(name, **SMALL[name]).eval(), torch.randn(2, 3, size, size)
    return enliven(model, x).eval(), x


def of_nobody() -> tuple[nn.Module, Tensor]:
    """Attention that has no recipe, whose axes are established by running it."""

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.out = nn.Linear(24, 72), nn.Linear(24, 24)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).unflatten(-1, (3, 3, 8)).permute(2, 0, 3, 1, 4)
            out: Tensor = self.out(((q @ k.mT * 8**-0.5).softmax(-1) @ v).transpose(1, 2).flatten(2))
            return out

    return nn.Sequential(Own(), Own()).eval(), torch.randn(2, 7, 24)


def multihead() -> tuple[nn.Module, Tensor]:
    layer = nn.TransformerEncoderLayer(24, 3, 48, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval(), torch.randn(2, 7, 24)


MADE: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    **{name: lambda name=name: tiny(name) for name in READ},  # type: ignore[misc]
    **{name: lambda name=name: of_timm(name) for name in SMALL},  # type: ignore[misc]
    "of nobody": of_nobody,
    "nn.MultiheadAttention": multihead,
}


def figures_of(rec: AttentionRecorder) -> list[Tensor | float]:
    """All that is read of a model, of each map."""

    def of(m: AttentionMap) -> list[Tensor]:
        found = [m[...], m[0, [0, 1]] if m.shape[1] > 1 else m[0], m.gradient[...]]
        with suppress(hookattn.UnreadableError):
            found += [m.v[...], m.effective[...], m.output(), contributions(m)[:, :, 0]]
        with suppress(hookattn.TokenError):
            found += [m.image((0, 0)), m.tokens.centres((1, 1)), mean_attention_distance(m)]
        return found

    figures: list[Tensor | float] = [t for m in rec.maps.values() for t in of(m)]
    with suppress(hookattn.HookattnError, ValueError):
        figures.append(rollout(rec))
    return [*figures, *(float(m.verify()) for m in rec.maps.values())]


@pytest.mark.parametrize("name", MADE)
def test_what_is_read_under_another_default_device_is_the_same(name: str) -> None:
    model, x = MADE[name]()
    with AttentionRecorder(model, gradients=True) as rec:
        model(x).sum().backward()
    with torch.device("meta"):  # the strictest: what lies there has no values
        found = figures_of(rec)
    torch.testing.assert_close(found, figures_of(rec), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("keep", ["inputs", "maps"])
@pytest.mark.parametrize("name", ["vit", "of nobody", "nn.MultiheadAttention"])
def test_a_model_that_is_recorded_under_another_default_device(name: str, keep: Any) -> None:
    model, x = MADE[name]()
    with AttentionRecorder(model) as rec, torch.no_grad():
        model(x)
    expected = [m[...] for m in rec.maps.values()]
    with torch.device("meta"), AttentionRecorder(model, keep=keep) as rec, torch.no_grad():
        model(x)
    assert all(torch.equal(m[...], right) for m, right in zip(rec.maps.values(), expected, strict=True))
