"""The recorder touches a model between `with` and the end of the block, and the model does not notice."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.models import tiny
from support.oracle import own_map
from support.reading import NAMES, maps_of, read, same
from support.untouched import untouched
from timm.layers import Attention
from torch import Tensor, nn

from hookattn import AttentionMap, AttentionRecorder, LayerNotFoundError, NoMapError


class Reversed(nn.Module):
    """Attention modules that run in another order than they stand in."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (Attention(48, num_heads=3) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.a(self.b(self.c(x)))


# The maps of a forward


def test_maps_stand_in_the_order_of_execution_and_answer_to_name_position_and_slice() -> None:
    model, x = Reversed(), torch.randn(2, 5, 48)
    with AttentionRecorder(model) as rec, torch.no_grad():
        model(x)
    maps = rec.maps
    assert rec.layers == ["a", "b", "c"]
    assert list(maps) == ["c", "b", "a"]
    assert [m.name for m in maps.values()] == ["c", "b", "a"]
    assert len(maps) == 3
    assert maps[-1] is maps[2] is maps["a"]
    assert maps[:2] == [maps[0], maps[1]]
    assert maps[::-1] == [maps[2], maps[1], maps[0]]
    assert all(repr(m) in repr(maps) for m in maps.values())


def test_maps_tell_whether_a_name_is_among_them() -> None:
    model, x = tiny("vit")
    with AttentionRecorder(model) as rec, torch.no_grad():
        model(x)
    assert "blocks.1.attn" in rec.maps
    assert "blocks.1" not in rec.maps
    assert rec.maps.get("blocks.1") is None


def test_maps_that_are_not_there_are_refused_with_near_misses() -> None:
    model, x = tiny("vit")
    with AttentionRecorder(model) as rec, torch.no_grad():
        model(x)
    with pytest.raises(LayerNotFoundError, match=r"'blocks\.1\.atn'.*Did you mean 'blocks\.1\.attn'"):
        rec.maps["blocks.1.atn"]
    for position in (2, -3):
        with pytest.raises(LayerNotFoundError, match=f"no map {position}: 2 were recorded"):
            rec.maps[position]


def test_passes_last_keeps_one_forward_and_passes_all_keeps_each() -> None:
    model, x = tiny("vit")
    first, second = maps_of(model, x), maps_of(model, 2 * x)
    for passes in ("last", "all"):
        with AttentionRecorder(model, passes=passes) as rec, torch.no_grad():
            model(x)
            model(2 * x)
        kept = [{name: m[...] for name, m in maps.items()} for maps in rec.passes]
        assert len(kept) == (2 if passes == "all" else 1)
        assert same(kept[-1], second)
        assert same(kept[0], first if passes == "all" else second)
        assert same(read(rec), second)


@pytest.mark.parametrize("passes", ["last", "all"])
def test_maps_are_never_those_of_an_earlier_forward(passes: Any) -> None:
    model, x = tiny("vit")
    with AttentionRecorder(model, passes=passes) as rec, torch.no_grad():
        model(x)
        model.blocks, blocks = nn.Sequential(), model.blocks
        model(x)
        model.blocks = blocks
    with pytest.raises(NoMapError, match="called none of"):
        rec.maps  # noqa: B018


# Several recorders, several blocks


def test_two_recorders_on_one_model_do_not_see_each_other() -> None:
    model, x = tiny("vit")
    expected, other = maps_of(model, x), maps_of(model, -x)
    outer, inner = AttentionRecorder(model, called_from=True), AttentionRecorder(model, -1, keep="maps")
    with untouched(model), torch.no_grad(), outer:
        with inner:
            model(x)
        assert same(read(outer), expected)
        model(-x)
    assert same(read(outer), other)
    assert same(read(inner), {NAMES[1]: expected[NAMES[1]]})


def test_two_recorders_can_close_in_the_order_they_were_opened() -> None:
    model, x = tiny("vit")
    first, second = AttentionRecorder(model), AttentionRecorder(model)
    with untouched(model), torch.no_grad():
        first.__enter__()
        second.__enter__()
        model(x)
        first.__exit__(None, None, None)
        model(-x)
        second.__exit__(None, None, None)
    assert same(read(first), maps_of(model, x))
    assert same(read(second), maps_of(model, -x))


def test_a_recorder_can_be_used_again_and_begins_anew() -> None:
    model, x = tiny("vit")
    rec = AttentionRecorder(model, passes="all")
    assert "closed" in repr(rec)
    with untouched(model), torch.no_grad():
        with rec:
            assert "open" in repr(rec)
            model(x)
        before = rec.maps
        with rec:
            with pytest.raises(NoMapError):
                rec.maps  # noqa: B018
            model(-x)
    assert len(rec.passes) == 1
    assert same(read(rec), maps_of(model, -x))
    assert same({name: m[...] for name, m in before.items()}, maps_of(model, x))


def test_what_is_changed_on_the_model_before_the_block_is_not_stale_in_it() -> None:
    model, x = tiny("vit")
    rec = AttentionRecorder(model)
    attn: Any = model.blocks[0].attn
    attn.qkv.weight.data.mul_(2)
    attn.qkv = nn.Linear(48, 144)
    with rec, torch.no_grad():
        model(x)
    torch.testing.assert_close(rec.maps[0][...], own_map(attn, rec.maps[0].x))


# Who called


@pytest.mark.parametrize("keep", ["inputs", "maps"])
def test_a_repr_never_raises(keep: Any) -> None:
    model, x = tiny("vit")
    with AttentionRecorder(model, ["blocks.0.mlp", "blocks.1.attn"], keep=keep) as rec, torch.no_grad():
        model(x)
    model.double()  # the maps are stale now, and one was never readable
    assert repr(rec.maps).startswith("Maps of forward:")
    assert "blocks.1.attn" in repr(rec.maps["blocks.1.attn"])


def test_a_map_is_an_attention_map_and_tells_name_shape_dtype_and_device() -> None:
    model, x = tiny("vit")
    with AttentionRecorder(model) as rec, torch.no_grad():
        model(x)
    m = rec.maps[0]
    assert isinstance(m, AttentionMap)
    assert repr(m) == "AttentionMap('blocks.0.attn', shape=(2, 3, 17, 17), dtype=float32, device=cpu)"


# Two towers, names


class Towers(nn.Module):
    """Two encoders that are called by methods of their own, as CLIP's are."""

    def __init__(self) -> None:
        super().__init__()
        self.visual, self.text = Attention(16, num_heads=2), Attention(16, num_heads=4)

    def encode_image(self, x: Tensor) -> Tensor:
        return self.visual(x)

    def encode_text(self, x: Tensor) -> Tensor:
        return self.text(x)


def test_of_two_towers_one_after_the_other_the_last_is_kept_and_what_became_of_the_other_is_told() -> None:
    model, x = Towers(), torch.randn(2, 5, 16)
    with AttentionRecorder(model) as rec, torch.no_grad():
        model.encode_image(x)
        model.encode_text(x)
    assert list(rec.maps) == ["text"]
    assert rec.maps.called == "encode_text"
    assert repr(rec.maps).startswith("Maps of encode_text:")
    assert "1 maps of encode_text recorded" in repr(rec)
    with pytest.raises(LayerNotFoundError, match=r"'visual' ran in encode_image, .* when encode_text began: .*passes=\"all\""):
        rec.maps["visual"]
    with AttentionRecorder(model, passes="all") as rec, torch.no_grad():
        model.encode_image(x)
        model.encode_text(x)
    assert [(maps.called, list(maps)) for maps in rec.passes] == [("encode_image", ["visual"]), ("encode_text", ["text"])]


class Twice(nn.Module):
    """A module that is called twice, beside one that bears the name of its second call."""

    def __init__(self) -> None:
        super().__init__()
        self.a = Attention(16, num_heads=2)
        self.add_module("a#1", Attention(16, num_heads=4))

    def forward(self, x: Tensor) -> Tensor:
        return self.a(self.a(self._modules["a#1"](self.a(x))))


@pytest.mark.parametrize("keep", ["inputs", "maps"])
def test_a_module_that_is_named_as_a_second_call_keeps_its_name(keep: Any) -> None:
    model, x = Twice(), torch.randn(2, 5, 16)
    with AttentionRecorder(model, keep=keep, gradients=True) as rec:
        model(x).sum().backward()
    assert list(rec.maps) == ["a", "a#1", "a#2", "a#3"]
    assert [m.shape[1] for m in rec.maps.values()] == [2, 4, 2, 2]
    assert [m.gradient.shape[1] for m in rec.maps.values()] == [2, 4, 2, 2]
