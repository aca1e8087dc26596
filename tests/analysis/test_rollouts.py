from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from support import reference
from support.inside import read_in_chunks
from support.models import tiny
from support.modes import Largest, operations_of
from support.oracle import unfused

from hookattn import AttentionRecorder, NoGradientError, RecorderError, TokenError
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
    assert not torch.allclose(rollout(maps), rollout(maps[::-1], gaps=True), atol=1e-3)
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


# The row of a query, alone


QUERIES: list[Any] = ["cls", 0, 7, (1, 2), (0.3, 0.8), "mean"]


@pytest.mark.parametrize("query", QUERIES, ids=str)
@pytest.mark.parametrize("keep", ["inputs", "maps"])
def test_a_row_of_its_own_is_that_of_the_whole(query: Any, keep: Any) -> None:
    rec, maps, gradients = explained("vit", keep=keep)
    selected = rec.maps[0].tokens.select(query)[0, 0]
    for residual in (0.0, 0.3, 1.0):
        expected = reference.rollout(maps, residual)[:, selected].mean(1)
        torch.testing.assert_close(rollout(rec, query, residual=residual), expected, rtol=0, atol=1e-12)
        expected = reference.grad_rollout(maps, gradients, residual)[:, selected].mean(1)
        torch.testing.assert_close(grad_rollout(rec, query, residual=residual), expected, rtol=0, atol=1e-12)
    expected = reference.relevance(maps, gradients)[:, selected].mean(1)
    torch.testing.assert_close(relevance(rec, query), expected, rtol=1e-9, atol=1e-12)


def test_a_row_is_had_without_a_matrix_of_all_tokens() -> None:
    model, _ = tiny("vit", img_size=256, patch_size=8, depth=4)
    with AttentionRecorder(model) as rec, torch.no_grad():
        model(torch.randn(1, 3, 256, 256))
    expected = rollout(rec)[:, 0]
    with pytest.MonkeyPatch.context() as patch:
        read_in_chunks(patch, 3 * 1025 * 8)
        with Largest() as largest:
            found = rollout(rec, "cls")
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert largest.elements < 1025 * 1025 // 4


def test_a_row_that_is_asked_of_the_last_layer_costs_one_row_of_it() -> None:
    model, x = tiny("vit", depth=1)
    with AttentionRecorder(model) as rec, torch.no_grad():
        model(x)
    whole = operations_of(lambda: rec.maps[0][...])
    assert operations_of(lambda: rollout(rec, "cls")) < whole


@pytest.mark.parametrize("keep", ["inputs", "maps"])
def test_a_row_is_added_up_in_float32_whatever_slices_are_and_under_autocast(keep: Any) -> None:
    model, x = tiny("vit", depth=4)
    with AttentionRecorder(model, keep=keep) as rec, torch.no_grad():
        model(x)
    right = reference.rollout([m[...] for m in rec.maps.values()])[:, 0]
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(rollout(rec, "cls").double(), right, rtol=0, atol=1e-6)
    with AttentionRecorder(model, keep=keep, dtype=torch.float16) as coarse, torch.no_grad():
        model(x)
    assert rollout(coarse, "cls").dtype == torch.float16
    torch.testing.assert_close(rollout(coarse, "cls").double(), right, rtol=0, atol=1e-3 if keep == "maps" else 1e-4)


def discarded(maps: list[torch.Tensor], residual: float, discard: float) -> torch.Tensor:
    """Image by image and entry by entry."""
    images = []
    for b in range(len(maps[0])):
        joint = torch.eye(maps[0].shape[-1], dtype=torch.float64)
        for attention in maps:
            mean = attention[b].double().mean(0)
            order = sorted((float(v), i) for i, v in enumerate(mean.flatten()))
            for _, i in order[: int(discard * len(order))]:
                mean[i // len(mean), i % len(mean)] = 0.0
            for i in range(len(mean)):
                mean[i] = mean[i] / mean[i].sum() if mean[i].sum() > 0 else torch.eye(len(mean), dtype=torch.float64)[i]
            joint = ((1 - residual) * mean + residual * torch.eye(len(mean), dtype=torch.float64)) @ joint
        images.append(joint)
    return torch.stack(images)


@pytest.mark.parametrize("discard", [0.2, 0.9, 1.0])
def test_the_smallest_entries_of_each_image_are_left_out(discard: float) -> None:
    rec, maps, _ = explained("vit")
    expected = discarded(maps, 0.4, discard)
    torch.testing.assert_close(rollout(rec, residual=0.4, discard=discard), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(rollout(rec, "cls", residual=0.4, discard=discard), expected[:, 0], rtol=0, atol=1e-12)
    assert torch.equal(rollout(rec, discard=0.0), rollout(rec))
    with pytest.raises(ValueError, match=r"discard=1.5 is no share"):
        rollout(rec, discard=1.5)


@pytest.mark.parametrize("method", [rollout, grad_rollout, relevance])
def test_layers_between_which_others_are_missing_are_refused_unless_asked_for(method: Any) -> None:
    model, x = tiny("vit", depth=4)
    with AttentionRecorder(model, layers=["blocks.0.attn", "blocks.1.attn", "blocks.3.attn"], gradients=True) as rec:
        model(x)[:, 0].sum().backward()
    with pytest.raises(ValueError, match=r"'blocks.3.attn' does not follow 'blocks.1.attn'.*gaps=True"):
        method(rec)
    torch.testing.assert_close(method(rec, gaps=True)[:, 0], method(rec, "cls", gaps=True))
    assert method(rec.maps[:2]).shape == (2, 17, 17)


def test_attentions_that_run_side_by_side_follow_each_other() -> None:
    model, x = tiny("parallel_things", depth=2)
    with AttentionRecorder(model) as rec, torch.no_grad():
        model(x)
    torch.testing.assert_close(rollout(rec)[:, 0], rollout(rec, "cls"), rtol=0, atol=1e-6)


def test_a_query_that_there_is_not_is_told() -> None:
    rec, _, _ = explained("vit")
    with pytest.raises(TokenError, match="reg"):
        rollout(rec, "reg1")
    with pytest.raises(IndexError):
        rollout(rec, 17)
