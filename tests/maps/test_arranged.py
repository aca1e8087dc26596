"""Attention in many styles, read as users read it: maps, rows, gradients, edits and kept maps are all arranged alike."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.inside import forget_what_was_established
from support.styles import SIZES, STYLES
from torch import Tensor, nn

from hookattn import AttentionRecorder, UnreadableError

MANY = [
    "fused", "heads_third", "heads_before_images", "fused_with_images_and_heads_in_one_axis", "keys_before_queries",
    "one_image_after_the_other", "chunks_of_queries", "one_query_after_the_other", "a_second_softmax_for_logging",
    "exp_by_sum", "softmax_into_its_scores", "sum_of_a_broadcast_product", "causal", "queries_of_one_image",
    "groups_in_the_fused_kernel", "talking_heads", "windows_that_are_padded", "windows_of_different_sizes",
    "packed_sequences_as_qwen_has_them", "lower_right_causal", "values_in_two_parts",
    "heads_queries_and_channels_in_one_axis", "rows_of_the_softmax_beside_the_map",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _in_double_precision() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class Block(nn.Module):
    """Holds an attention module."""

    def __init__(self, attn: nn.Module) -> None:
        super().__init__()
        self.attn = attn

    def forward(self, *args: Any) -> Any:
        return self.attn(*args)


def called(name: str, size: str = "odd", **options: Any) -> tuple[AttentionRecorder, Tensor]:
    module, args, true = STYLES[name].make(SIZES[size])
    with AttentionRecorder(Block(module), layers="attn", **options) as rec:
        rec.model(*args)
    return rec, true


@pytest.mark.parametrize("size", ["odd", "square"])
@pytest.mark.parametrize("name", MANY)
def test_maps_rows_and_heads_are_those_of_the_formula(name: str, size: str) -> None:
    rec, true = called(name, size)
    m = rec.maps[0]
    assert m.shape == true.shape
    torch.testing.assert_close(m[...], true, rtol=0, atol=1e-12)
    torch.testing.assert_close(m[:, :, -1], true[:, :, -1], rtol=0, atol=1e-12)
    torch.testing.assert_close(m[0, 1], true[0, 1], rtol=0, atol=1e-12)
    assert m.verify() < 1e-12


@pytest.mark.parametrize("known", [False, True], ids=["the first of its kind", "known"])
@pytest.mark.parametrize("name", MANY)
def test_kept_maps_are_the_same(name: str, known: bool) -> None:
    forget_what_was_established()
    if known:
        assert called(name)[0].maps[0].shape
    rec, true = called(name, keep="maps")
    for p in rec.model.parameters():
        p.data.zero_()
    torch.testing.assert_close(rec.maps[0][...].detach(), true, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", [name for name in MANY if name != "softmax_into_its_scores"])  # autograd has none of it
def test_a_gradient_is_that_of_the_loss_by_finite_differences_of_edits(name: str) -> None:
    module, args, true = STYLES[name].make(SIZES["odd"])
    model = Block(module)

    def loss() -> Tensor:
        out = model(*args)
        out = out[0] if isinstance(out, tuple) else out
        return (out * torch.linspace(-1, 2, out.numel()).view(out.shape)).square().sum()

    with AttentionRecorder(model, layers="attn", gradients=True) as rec:
        loss().backward()
        slope = rec.maps[0].gradient[...]
        torch.manual_seed(3)
        way = torch.randn_like(true) * (true != 0)  # what is closed stays so: padding is no part of the map
        up, down = (_loss_with(rec, loss, way, step) for step in (1e-5, -1e-5))
    torch.testing.assert_close((slope * way).sum(), (up - down) / 2e-5, rtol=1e-5, atol=1e-7)


def _loss_with(rec: AttentionRecorder, loss: Any, way: Tensor, step: float) -> Tensor:
    with rec.edit({"attn": lambda a: a + step * way}), torch.no_grad():
        value: Tensor = loss()
    return value


def test_what_a_module_forms_without_functions_of_pytorch_is_refused_and_skipped() -> None:
    rec, _ = called("under_vmap")
    assert list(rec.maps) == []
    assert set(rec.skipped) == {"attn"}
    with pytest.raises(UnreadableError, match=r"describe its map with @hookattn\.recipe"):
        rec.maps["attn"]
    with pytest.raises(UnreadableError, match="0 can be read"):
        rec.maps[0]


def test_a_mask_that_hides_nothing_at_first_is_in_the_map_later() -> None:
    module, (x, hidden), true = STYLES["a_mask_after_the_softmax"].make(SIZES["odd"])
    for mask in (torch.zeros_like(hidden), hidden):
        with AttentionRecorder(Block(module), layers="attn") as rec, torch.no_grad():
            rec.model(x, mask)
        m = rec.maps[0][...]
    torch.testing.assert_close(m, true, rtol=0, atol=1e-12)
