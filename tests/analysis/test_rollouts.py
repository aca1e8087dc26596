from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from support import reference
from support.models import tiny
from support.oracle import unfused

from hookattn import AttentionRecorder, NoGradientError, RecorderError
from hookattn.analysis import grad_rollout, relevance, rollout


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


def explained(
    name: str = "vit", which: int = 3, **options: Any
) -> tuple[AttentionRecorder, list[torch.Tensor], list[torch.Tensor]]:
    """A recorder after backward, and the maps and gradients of the unfused path in float64."""
    model, x = tiny(name, depth=3)
    model, x = model.double(), x.double()
    with AttentionRecorder(model, gradients=True, **options) as rec:
        model(x)[:, which].sum().backward()
    with unfused(model) as maps:
        end = model(x)[:, which].sum()
    gradients = torch.autograd.grad(end, maps)
    return rec, [m.detach() for m in maps], list(gradients)


@pytest.mark.parametrize("name", ["vit", "vit_registers", "eva_split", "deit_distilled"])
def test_relevance_is_what_the_paper_defines(name: str) -> None:
    rec, maps, gradients = explained(name)
    expected = reference.relevance(maps, gradients)
    tokens = torch.eye(expected.shape[-1], dtype=torch.float64)
    assert (expected - tokens)[:, 0].max() > 1e-6
    torch.testing.assert_close(relevance(rec), expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(relevance(rec.maps), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("residual", [0.0, 0.3, 0.5])
@pytest.mark.parametrize("keep", ["inputs", "maps"])
def test_grad_rollout_is_the_rollout_of_positive_contributions(residual: float, keep: Any) -> None:
    rec, maps, gradients = explained(keep=keep)
    assert (gradients[-1][:, :, 1:] == 0).all()  # in the last layer only the class token speaks for the class
    got = grad_rollout(rec, residual=residual)
    torch.testing.assert_close(got, reference.grad_rollout(maps, gradients, residual), rtol=0, atol=1e-12)
    torch.testing.assert_close(got.sum(-1), torch.ones_like(got.sum(-1)), rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", [relevance, grad_rollout])
def test_explanations_are_of_the_class_that_was_asked_for(method: Any) -> None:
    one, other = (method(explained(which=which)[0])[:, 0] for which in (3, 4))
    assert not torch.allclose(one, other, rtol=1e-3)


@pytest.mark.parametrize("method", [relevance, grad_rollout])
def test_explanations_say_what_they_need(method: Any) -> None:
    model, x = tiny("vit")
    with AttentionRecorder(model) as rec:
        model(x)
    with pytest.raises(RecorderError, match="gradients=True"):
        method(rec)
    with AttentionRecorder(model, gradients=True) as rec:
        model(x)
    with pytest.raises(NoGradientError, match="no gradient has reached"):
        method(rec)
    with pytest.raises(ValueError, match=f"{method.__name__} needs maps from all tokens to the same tokens"):
        method([])


@pytest.mark.parametrize("method", [relevance, grad_rollout])
def test_a_nan_is_not_hidden_by_an_explanation(method: Any) -> None:
    model, x = tiny("vit")
    x[1, 0, 0, 0] = float("nan")
    with AttentionRecorder(model, gradients=True) as rec:
        model(x)[:, 0].sum().backward()
    got = method(rec)
    assert got[0].isfinite().all()
    assert got[1].isnan().any()


def test_rollout_takes_a_recorder() -> None:
    rec, maps, _ = explained()
    torch.testing.assert_close(rollout(rec), reference.rollout(maps), rtol=0, atol=1e-12)
