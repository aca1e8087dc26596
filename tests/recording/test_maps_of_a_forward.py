"""The maps of one forward as a mapping: some of them by a glob, all of them stacked."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from support.models import tiny
from support.reading import record
from timm.layers import Attention
from torch import Tensor, nn

from hookattn import AttentionRecorder, LayerNotFoundError, UnreadableError


class Odd(nn.Module):
    """Attention under names that contain what globs are made of, of several shapes, and one that forms no map."""

    def __init__(self) -> None:
        super().__init__()
        self.add_module("a*", Attention(12, num_heads=3))
        self.add_module("ab", Attention(12, num_heads=3))
        self.add_module("ac", Attention(12, num_heads=2))
        self.add_module("[ab]", Attention(12, num_heads=3))

    def forward(self, x: Tensor) -> Tensor:
        for module in self.children():
            x = module(x)
        return x


@pytest.fixture
def rec() -> AttentionRecorder:
    return record(Odd().eval(), torch.randn(2, 5, 12))


def test_a_glob_is_answered_with_maps_in_their_order(rec: Any) -> None:
    assert list(rec.maps["*b*"]) == ["ab", "[ab]"]
    assert list(rec.maps["a?"]) == ["a*", "ab", "ac"]
    assert type(rec.maps["a?"]) is type(rec.maps)
    assert rec.maps["a?"][-1] is rec.maps["ac"]
    assert rec.maps["*"]["a[!b]"].called == rec.maps.called == "forward"


def test_a_name_is_that_map_whatever_it_matches(rec: Any) -> None:
    assert rec.maps["a*"].name == "a*"
    assert rec.maps["[ab]"].name == "[ab]"


def test_a_glob_that_matches_nothing_is_an_error_that_names_what_there_is(rec: Any) -> None:
    with pytest.raises(LayerNotFoundError, match=r"no map was recorded of 'blocks\.\*'"):
        rec.maps["blocks.*"]
    assert "b*" not in rec.maps
    assert rec.maps.get("nothing*") is None


@pytest.mark.parametrize("count", [1, 3, 5])
def test_why_nothing_can_be_read_is_one_sentence_however_many_reasons_there_are(count: int) -> None:
    model, x = tiny("vit")
    with AttentionRecorder(model) as rec, torch.no_grad():
        model(x)
    maps = rec.maps
    maps.skipped.update({f"layer{i}": f"'layer{i}': it forms none; type this." for i in range(count)})
    told = ["'layer0': it forms none; type this", "'layer1': it forms none; type this", "'layer2': it forms none; type this"]
    more = "; and 2 more" if count == 5 else ""
    with pytest.raises(UnreadableError, match=re.escape(f"{'; '.join(told[:count])}{more}.") + "$"):
        maps[99]


def test_what_cannot_be_read_is_skipped_in_a_glob_too() -> None:
    model, x = tiny("vit")
    with AttentionRecorder(model) as rec, torch.no_grad():
        model(x)
    maps = rec.maps
    maps.skipped["blocks.7.attn"] = "for this reason"
    maps.skipped["other"] = "for another"
    assert maps["blocks.*"].skipped == {"blocks.7.attn": "for this reason"}
    with pytest.raises(UnreadableError, match="for this reason"):
        maps["blocks.*"]["blocks.7.attn"]


def test_names_are_completed(rec: Any) -> None:
    assert rec.maps._ipython_key_completions_() == ["a*", "ab", "ac", "[ab]"]


def test_maps_of_one_shape_are_stacked_in_their_order(rec: Any) -> None:
    stacked = rec.maps["*[b*]"].stack()
    assert stacked.shape == (2, 2, 3, 5, 5)
    assert torch.equal(stacked[0], rec.maps["a*"][...])
    assert torch.equal(stacked[1], rec.maps["ab"][...])


def test_maps_of_several_shapes_are_refused_by_name(rec: Any) -> None:
    with pytest.raises(ValueError, match=r"\(2, 3, 5, 5\), cpu: a\*, ab, \[ab\]; \(2, 2, 5, 5\), cpu: ac\. .*maps\.values"):
        rec.maps.stack()


def test_no_maps_are_not_stacked(rec: Any) -> None:
    with pytest.raises(ValueError, match="none"):
        type(rec.maps)({}).stack()


def test_a_stack_is_in_the_graph_of_its_maps() -> None:
    model, x = tiny("vit")
    with AttentionRecorder(model, detach=False) as rec:
        model(x)
    assert rec.maps.stack().requires_grad
