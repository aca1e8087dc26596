"""Masks, norms, gates, widths and strides that no registered model uses, but the classes take."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from support.inside import replay_of
from support.models import randomise
from support.oracle import unfused
from support.variants import attention_modules

from hookattn import AttentionRecorder
from hookattn.testing import check_recipe


def masks(tokens: int, batch: int) -> dict[str, dict[str, Any]]:
    square = torch.rand(tokens, tokens) > 0.3
    square.fill_diagonal_(True)
    each = torch.rand(batch, 1, tokens, tokens) > 0.3
    each[..., 0] = True
    return {
        "none": {},
        "bool": {"attn_mask": square},
        "bool_per_image": {"attn_mask": each},
        "float": {"attn_mask": torch.randn(batch, 1, tokens, tokens)},
        "minus_infinity": {"attn_mask": torch.zeros(tokens, tokens).masked_fill(~square, float("-inf"))},
        "causal": {"is_causal": True},
    }


CASES = [
    (name, mask)
    for name, module in attention_modules().items()
    for mask, given in masks(2, 1).items()
    if given.keys() <= inspect.signature(module.forward).parameters.keys()
]


@pytest.mark.parametrize(("name", "mask"), CASES)
def test_masks_norms_gates_and_head_widths(name: str, mask: str) -> None:
    module = randomise(attention_modules()[name]).eval()
    x, given = torch.randn(2, 9, 32), masks(9, 2)[mask]
    if "rope" in name or name.startswith("eva"):
        given = {**given, "rope": torch.randn(8, 16)}
    with AttentionRecorder(module) as rec, torch.no_grad(), unfused(module) as expected:
        module(x, **given)
    m = rec.maps[0]
    torch.testing.assert_close(m[...], expected[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(m[...], replay_of(m), rtol=0, atol=1e-6)
    torch.testing.assert_close(m[:, 1:, 3:7], expected[0][:, 1:, 3:7], rtol=0, atol=1e-6)
    torch.testing.assert_close(m[1, 0, 5], expected[0][1, 0, 5], rtol=0, atol=1e-6)
    m.verify()


def test_beit_adds_its_own_and_the_shared_bias() -> None:
    from timm.models.beit import Attention

    module = randomise(Attention(32, 4, qkv_bias=True, qkv_bias_separate=True, window_size=(2, 3))).eval()
    shared = torch.randn(1, 4, 7, 7)
    with AttentionRecorder(module) as rec, torch.no_grad(), unfused(module) as expected:
        module(torch.randn(2, 7, 32), shared_rel_pos_bias=shared)
    torch.testing.assert_close(rec.maps[0][...], expected[0], rtol=0, atol=1e-6)
    check_recipe(module, torch.randn(2, 7, 32), shared_rel_pos_bias=shared)
