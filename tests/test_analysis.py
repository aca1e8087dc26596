from __future__ import annotations

from typing import Any

import pytest
import reference
import timm
import torch
from models import tiny

from hookattn import AttentionRecorder
from hookattn.analysis import rollout


@pytest.mark.parametrize("residual", [0.0, 0.3, 0.5, 1.0])
def test_rollout_is_the_product_the_paper_defines(residual: float) -> None:
    model, x = tiny("vit_registers", batch=3, depth=4)
    with AttentionRecorder(model) as rec, torch.no_grad():
        model(x)
    got = rollout(rec.maps, residual=residual)
    expected = reference.rollout([m[...] for m in rec.maps.values()], residual)
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(got.sum(-1), torch.ones(3, 21), rtol=0, atol=1e-6)


def test_rollout_depends_on_the_order_of_layers_and_on_the_image() -> None:
    model, x = tiny("vit")
    with AttentionRecorder(model) as rec, torch.no_grad():
        model(x)
    maps = rec.maps[:]
    assert not torch.allclose(rollout(maps), rollout(maps[::-1]), atol=1e-3)
    assert not torch.allclose(rollout(maps)[0], rollout(maps)[1], atol=1e-3)


def test_rollout_of_everything_kept_is_the_identity() -> None:
    model, x = tiny("vit")
    with AttentionRecorder(model) as rec, torch.no_grad():
        model(x)
    assert torch.equal(rollout(rec.maps, residual=1.0), torch.eye(17).expand(2, 17, 17))


def test_rollout_says_what_it_needs() -> None:
    model, x = tiny("vit")
    with AttentionRecorder(model) as rec, torch.no_grad():
        model(x)
    with pytest.raises(ValueError, match="rollout needs maps from all tokens to the same tokens"):
        rollout([])
    with pytest.raises(ValueError, match="residual=2 is no share"):
        rollout(rec.maps, residual=2)


@pytest.mark.parametrize(("name", "axes"), [("swin_tiny_patch4_window7_224", "windows"), ("xcit_nano_12_p16_224", "channel")])
def test_rollout_of_windows_or_channels_is_refused(name: str, axes: str) -> None:
    swin = {"window_size": 4, "embed_dim": 24, "depths": (1, 1), "num_heads": (1, 1)}
    options: Any = swin if "swin" in name else {"depth": 1}
    model = timm.create_model(name, img_size=64, **options).eval()
    with AttentionRecorder(model) as rec, torch.no_grad():
        model(torch.randn(2, 3, 64, 64))
    with pytest.raises(ValueError, match=f"rollout needs maps from all tokens of an image.*{axes}"):
        rollout(rec.maps[:1])
