"""Rows sum to 1 and maps are finite in every dtype, also where the module's own scores would overflow."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support.mechanisms import MODELS, moved
from support.models import ANY_DTYPE, TINY, tiny
from support.modes import KernelCalls
from support.oracle import unfused
from torch import Tensor, nn

from hookattn import AttentionRecorder

HALVES = [torch.bfloat16, torch.float16]


def model_of(name: str) -> tuple[nn.Module, Tensor]:
    if name in TINY:
        return tiny(name)
    return moved(name)


@pytest.mark.parametrize("name", [*ANY_DTYPE, *MODELS])
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
def test_rows_sum_to_1_within_the_rounding_of_float32_whatever_the_dtype(name: str) -> None:
    model, x = model_of(name)
    for dtype in HALVES if name in TINY else HALVES[:1]:  # convolutions in float16 take minutes on a CPU
        with AttentionRecorder(model) as rec, torch.inference_mode(), torch.autocast("cpu", dtype):
            model(x)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float16):  # another than that of the forward
            for m in rec.maps.values():
                rows = m[...]
                assert rows.dtype == torch.float32
                assert (rows.double().sum(-1) - 1).abs().max() < 2e-6, m.name


@pytest.mark.parametrize("autocast", [False, True], ids=["cast", "autocast"])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", ["vit", "rope_axial", "differential"])
def test_scores_that_overflow_half_precision_give_the_map_of_float64(name: str, dtype: torch.dtype, autocast: bool) -> None:
    model, x = tiny(name)
    with torch.no_grad():
        for block in model.blocks:
            (block.attn if hasattr(block, "attn") else block).qkv.weight.mul_(150)
    if not autocast:
        model, x = model.to(dtype), x.to(dtype)
    with (
        AttentionRecorder(model) as rec,
        KernelCalls() as calls,
        torch.no_grad(),
        torch.autocast("cpu", dtype, enabled=autocast),
    ):
        model(x)
    parts = len(calls.seen) // len(rec.maps)  # before reading, which runs the module under the same mode once more
    whole = rec.maps[0][...]
    assert whole.isfinite().all()
    for part, (q, k) in enumerate(calls.seen[:parts]):  # differential attention makes two maps, their heads in turn
        assert q.dtype == k.dtype == dtype
        scores = q.double() @ k.double().mT
        assert scores.abs().max() > torch.finfo(torch.float16).max
        exact = (scores * q.shape[-1] ** -0.5).softmax(-1)
        torch.testing.assert_close(whole[:, part::parts].double(), exact, rtol=0, atol=1e-3)


@pytest.mark.parametrize("dtype", HALVES)
def test_norms_that_stay_in_float32_are_read_as_they_are(dtype: torch.dtype) -> None:
    model, x = tiny("vit_qk_norm")
    model = copy.deepcopy(model).to(dtype)
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.float()
    with AttentionRecorder(model) as rec, KernelCalls() as calls, torch.no_grad():
        model(x.to(dtype))
    for m, (q, k) in zip(rec.maps.values(), calls.seen):
        exact = (q.double() @ k.double().mT * q.shape[-1] ** -0.5).softmax(-1)
        torch.testing.assert_close(m[...].double(), exact, rtol=0, atol=1e-6)
        m.verify()


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", ["vit", "rope_axial", "beit", "parallel"])
def test_a_scale_that_was_set_counts_where_the_module_looks_at_it(name: str, fused: bool) -> None:
    """timm's fused path does not, its unfused path does."""
    model: Any
    model, x = tiny(name)
    modules = [getattr(block, "attn", block) for block in model.blocks]
    for module in modules:
        module.scale, module.fused_attn = 1.0, fused
    with AttentionRecorder(model) as rec, KernelCalls() as calls, torch.no_grad(), unfused(nn.ModuleList()) as softmaxes:
        model(x)
    assert len(calls.seen) == (len(modules) if fused else 0)
    q, k = calls.seen[0] if fused else (torch.zeros(0), torch.zeros(0))
    if not fused:
        torch.testing.assert_close(rec.maps[0][...], softmaxes[0], rtol=0, atol=1e-6)
    elif name != "beit":
        torch.testing.assert_close(rec.maps[0][...], (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1), rtol=0, atol=1e-6)
    rec.verify()
