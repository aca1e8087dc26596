"""A forward that was put in the place of a class's own is the one whose map is read, and its coming and going is told."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.models import randomise
from support.oracle import own_map
from timm.layers import Attention
from torch import Tensor

from hookattn import AttentionRecorder, StaleMapError


def sharpened(self: Any, x: Tensor, attn_mask: Any = None, is_causal: bool = False) -> Any:
    q, k, v = self.qkv(x).reshape(*x.shape[:2], 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
    return self.proj(F.scaled_dot_product_attention(q, k, v, scale=0.7).transpose(1, 2).flatten(2))


def true(module: Any, x: Tensor) -> Tensor:
    q, k, _ = module.qkv(x).reshape(*x.shape[:2], 3, 4, -1).permute(2, 0, 3, 1, 4)
    return (q @ k.mT * 0.7).softmax(-1)


@pytest.mark.parametrize("keep", ["inputs", "maps"])
def test_a_forward_replaced_on_the_class_is_the_one_that_is_read(keep: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = randomise(Attention(32, 4)).eval(), torch.randn(2, 9, 32)
    with torch.no_grad(), AttentionRecorder(module, keep=keep) as rec:  # its recipe is known from before
        module(x)
        torch.testing.assert_close(rec.maps[0][...], own_map(module, x))
    monkeypatch.setattr(Attention, "forward", sharpened)
    with torch.no_grad(), AttentionRecorder(module, keep=keep) as rec:
        module(x)
        torch.testing.assert_close(rec.maps[0][...], true(module, x))


def test_one_that_comes_or_goes_after_the_forward_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = randomise(Attention(32, 4)).eval(), torch.randn(2, 9, 32)
    with torch.no_grad(), AttentionRecorder(module) as rec:
        module(x)
    with monkeypatch.context() as patch:
        patch.setattr(Attention, "forward", sharpened)
        with pytest.raises(StaleMapError, match="replaced after the forward"):
            rec.maps[0][...]
    rec.maps[0][...]


def test_another_class_after_the_forward_is_told() -> None:
    class Other(Attention):
        pass

    module, x = randomise(Attention(32, 4)).eval(), torch.randn(2, 9, 32)
    with torch.no_grad(), AttentionRecorder(module) as rec:
        module(x)
    module.__class__ = Other
    with pytest.raises(StaleMapError, match="replaced after the forward"):
        rec.maps[0][...]


def test_weights_in_another_order_in_memory_are_looked_at_too() -> None:
    module, x = randomise(Attention(32, 4)).eval(), torch.randn(2, 9, 32)
    module.qkv.weight = torch.nn.Parameter(module.qkv.weight.detach().t().contiguous().t())  # type: ignore[union-attr]
    with torch.no_grad(), AttentionRecorder(module) as rec:
        module(x)
    rec.maps[0][...]
    module.qkv.weight.data.mul_(2)  # type: ignore[union-attr, operator]
    with pytest.raises(StaleMapError):
        rec.maps[0][...]


def test_a_tuple_that_was_changed_since_is_read_as_it_was() -> None:
    class Scaled(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.num_heads, self.qkv, self.scales = 4, torch.nn.Linear(32, 96), (0.7, 1.0)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
            return F.scaled_dot_product_attention(q, k, v, scale=self.scales[0]).transpose(1, 2).flatten(2)

    model, x = torch.nn.Sequential(Scaled()).eval(), torch.randn(2, 9, 32)
    with torch.no_grad(), AttentionRecorder(model, layers="0") as rec:
        model(x)
    module: Any = model[0]
    module.scales = (0.1, 1.0)
    q, k, _ = module.qkv(x).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
    torch.testing.assert_close(rec.maps[0][...], (q @ k.mT * 0.7).softmax(-1))
    assert module.scales == (0.1, 1.0)


def given_a_bias(attn: Attention) -> None:
    attn.qkv.bias = torch.nn.Parameter(torch.randn(96))


def merged_away(attn: Attention) -> None:
    weight = attn.qkv.weight.detach() + 1
    del attn.qkv.weight
    attn.qkv.weight = weight


def merged_and_back(attn: Attention) -> None:
    before = attn.qkv.weight.detach()
    merged_away(attn)
    del attn.qkv.weight
    attn.qkv.register_parameter("weight", torch.nn.Parameter(before + 2))


def given_another_parameter(attn: Attention) -> None:
    attn.register_parameter("temperature", torch.nn.Parameter(torch.ones(1)))


@pytest.mark.parametrize("change", [given_a_bias, merged_away, merged_and_back, given_another_parameter])
def test_parameters_that_come_go_or_are_merged_leave_the_map_of_then_or_it_is_stale(change: Any) -> None:
    """Each map is of the parameters that were there, and all stay where they are, in the order of an optimizer's."""
    attn = randomise(Attention(32, 4, qkv_bias=False)).eval()
    x = torch.randn(2, 9, 32)
    with torch.no_grad(), AttentionRecorder(attn, passes="all") as rec:
        first = own_map(attn, x)
        attn(x)
        change(attn)
        second = own_map(attn, x)
        attn(x)
    change(attn)
    held = {name: list(vars(module)[name]) for module in attn.modules() for name in ("_parameters", "_buffers")}
    for maps, expected in zip(rec.passes, (first, second)):
        try:
            torch.testing.assert_close(maps[0][...], expected)
        except StaleMapError:
            assert change is not given_a_bias
    assert (change is given_another_parameter) == torch.equal(first, second)
    assert {name: list(vars(module)[name]) for module in attn.modules() for name in ("_parameters", "_buffers")} == held
