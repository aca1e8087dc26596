"""PyTorch's own `nn.MultiheadAttention` gives the weights it would return."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.inside import replay_of
from support.models import randomise
from support.variants import MULTIHEAD
from torch import nn

from hookattn import AttentionRecorder


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("name", MULTIHEAD)
def test_multihead_attention_gives_the_weights_pytorch_gives(name: str, need_weights: bool) -> None:
    options, asked = MULTIHEAD[name]
    options = {"batch_first": True, **options}
    module = randomise(nn.MultiheadAttention(32, 4, **options)).eval()
    q, k, v = torch.randn(2, 5, 32), torch.randn(2, 7, options.get("kdim", 32)), torch.randn(2, 7, options.get("vdim", 32))
    if asked.get("is_causal"):
        k, v = k[:, :5], v[:, :5]
    padding = torch.zeros(2, k.shape[1], dtype=torch.bool)
    padding[1, 4:] = True
    mask = {
        "bool": torch.rand(5, 7) > 0.7,
        "float": torch.randn(5, 7),
        "heads": torch.randn(8, 5, 7),
        "causal": torch.ones(5, 5, dtype=torch.bool).triu(1),
    }
    given: dict[str, Any] = {**asked}
    if "attn_mask" in asked:
        given["attn_mask"] = mask[asked["attn_mask"]]
    if "key_padding_mask" in asked:
        given["key_padding_mask"] = padding
    if not options["batch_first"]:
        q, k, v = (t.transpose(0, 1) for t in (q, k, v))
    with torch.no_grad():
        _, expected = module(q, k, v, average_attn_weights=False, **given)
    with AttentionRecorder(module) as rec:
        module(q, k, v, need_weights=need_weights, **given)
    m = rec.maps[0]
    torch.testing.assert_close(m[...], expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(m[...], replay_of(m), rtol=0, atol=1e-6)
    m.verify()


def test_multihead_attention_without_a_batch_axis_has_a_batch_of_one() -> None:
    module = randomise(nn.MultiheadAttention(32, 4)).eval()
    x = torch.randn(5, 32)
    with AttentionRecorder(module) as rec, torch.no_grad():
        _, expected = module(x, x, x, average_attn_weights=False)
    torch.testing.assert_close(rec.maps[0][...], expected.unsqueeze(0), rtol=0, atol=1e-6)


def test_a_transformer_encoder_layer_does_not_go_around_the_hooks() -> None:
    layer = nn.TransformerEncoderLayer(32, 4, batch_first=True).eval()  # has a fast path that calls no module
    with AttentionRecorder(layer) as rec, torch.inference_mode():
        layer(torch.randn(2, 5, 32))
    assert rec.verify() < 1e-5
