"""What benchmarks/counted.py counts from shapes, against operations that are really done, and a small point of scaling.py."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from support.modes import hooks_in_sight
from timm.layers import Attention
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from hookattn import AttentionMap, AttentionRecorder

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))  # at the end: `coverage` is a package, too
import counted
import scaling
from counted import Sizes

SIZES = [Sizes(16, 24, 3), Sizes(40, 48, 2, batch=3), Sizes(100, 24, 6)]
READ: dict[str, Callable[[AttentionMap], Tensor]] = {
    "class_rows": lambda m: m[:, :, 0],
    "one_head": lambda m: m[:, 0],
    "all_maps": lambda m: m[...],
}
COUNTED = {r.case.key: r for r in scaling.READINGS}


def products(run: Callable[[], Any]) -> int:
    """Operations of matrix products and convolutions, as PyTorch counts them."""
    with hooks_in_sight(), FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops())


def attention(s: Sizes) -> tuple[Any, Tensor]:
    """An unfused attention module, whose softmax counts for nothing, and what it is given."""
    module: Any = Attention(s.width, num_heads=s.heads).eval()
    module.fused_attn = False
    return module, torch.randn(s.batch, s.tokens, s.width)


@pytest.mark.parametrize("s", SIZES)
@pytest.mark.parametrize(("heads", "rows"), [(1, 1), (2, 5), (2, 16)])
def test_counted_scores_are_those_of_the_products_written_out(s: Sizes, heads: int, rows: int) -> None:
    x, w_q, w_k = torch.randn(s.tokens, s.width), *torch.randn(2, heads, s.width, s.width // s.heads).unbind()
    assert products(lambda: (x[:rows] @ w_q) @ (x @ w_k).mT) == counted.operations_projected(s, heads, rows)
    assert products(lambda: (x[:rows] @ w_q) @ w_k.mT @ x.T) == counted.operations_absorbed(s, heads, rows)


@pytest.mark.parametrize("s", SIZES)
@pytest.mark.parametrize("layers", [0, 1, 3])
def test_counted_forwards_are_those_of_timm(s: Sizes, layers: int) -> None:
    model: nn.Module
    if layers:
        s = replace(s, tokens=197, layers=layers)
        with torch.device("meta"):
            shape = {"depth": layers, "embed_dim": s.width, "num_heads": s.heads}
            model, x = timm.create_model("vit_small_patch16_224", **shape).eval(), torch.randn(s.batch, 3, 224, 224)
        for block in model.blocks:
            block.attn.fused_attn = False
    else:
        model, x = attention(s)
    softmax = counted.SOFTMAX * s.modules * s.batch * s.heads * s.tokens**2
    assert products(lambda: model(x)) == counted.operations_forward(s) - softmax
    matrices = sum(p.numel() for p in model.parameters() if p.dim() in (2, 4))
    assert counted.bytes_forward(s, 2) == 2 * (x.numel() + matrices + model(x).numel())


@pytest.mark.parametrize("s", SIZES)
@pytest.mark.parametrize("key", READ)
def test_no_reading_does_less_than_is_counted(s: Sizes, key: str) -> None:
    module, x = attention(s)
    with AttentionRecorder(module) as rec, torch.no_grad():
        module(x)
    (m,) = rec.maps.values()
    read, reading = READ[key](m), COUNTED[key]
    heads = 1 if key == "one_head" else s.heads
    softmax = counted.SOFTMAX * read.numel()
    assert products(lambda: READ[key](m)) >= reading.operations(s) - softmax > 0
    weights = 2 * heads * module.head_dim * s.width
    assert reading.moved(s, 2) == 2 * (x.numel() + weights) + 4 * read.numel()
    assert reading.formed(s) in (0, 4 * read.numel())


@pytest.mark.parametrize("key", COUNTED)
@pytest.mark.parametrize("grown", ["tokens", "width", "layers", "batch"])
def test_what_is_counted_grows_with_every_size(key: str, grown: str) -> None:
    small = Sizes(197, 48, 3, layers=2, batch=2)
    large, reading = replace(small, **{grown: 2 * getattr(small, grown)}), COUNTED[key]
    assert reading.operations(large) > reading.operations(small)
    assert reading.moved(large, 4) > reading.moved(small, 4)
    assert reading.formed(large) >= reading.formed(small)


def test_rows_grow_with_tokens_and_maps_with_their_square() -> None:
    large, larger = Sizes(2**14), Sizes(2**15)
    growth = {key: r.operations(larger) / r.operations(large) for key, r in COUNTED.items()}
    assert growth["class_rows"] == pytest.approx(2, rel=0.01)
    assert growth["all_maps"] == pytest.approx(4, rel=0.03)


def test_the_limit_is_what_takes_longer() -> None:
    row = {"operations": 600, "bytes": 100, "seconds": {"median": 8.0}}
    by_operations = counted.with_limit(row, {"operations_per_second": 100, "bytes_per_second": 50})
    assert (by_operations["limit_seconds"], by_operations["bound"], by_operations["of_the_limit"]) == (6.0, "operations", 0.75)
    by_bytes = counted.with_limit(row, {"operations_per_second": 100, "bytes_per_second": 12.5})
    assert (by_bytes["limit_seconds"], by_bytes["bound"], by_bytes["of_the_limit"]) == (8.0, "bytes", 1.0)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("layers", [0, 2])
def test_every_reading_is_right_and_maps_over_the_limit_are_not_formed(layers: int) -> None:
    s = Sizes(197, 48, 3, layers=layers)
    options = Namespace(device="cpu", rounds=1, seconds=0.0, memory=counted.bytes_of_maps(s, 1))
    rows = {row["reading"]: row for row in scaling.measured(s, torch.float32, options)}
    assert all(rows[key]["verdict"] == "right" for key in ("class_rows", "one_head"))
    assert all(rows[key]["verdict"] == "ran" for key in ("forward", "nothing_read"))
    assert rows["all_maps"]["verdict"].startswith("not measured: N x N would take")
    assert "seconds" not in rows["all_maps"]
    assert rows["class_rows"]["peak_bytes"] < counted.bytes_of_maps(s, s.heads)
