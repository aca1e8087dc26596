"""The recorder touches a model between `with` and the end of the block, and the model does not notice."""

from __future__ import annotations

import linecache
from typing import Any

import pytest
import torch
from support.models import TINY, Raises, tiny
from support.oracle import own_map
from support.reading import NAMES, maps_of, read, same
from support.untouched import untouched
from timm.layers import Attention
from torch import Tensor, nn

from hookattn import AttentionMap, AttentionRecorder, LayerNotFoundError, NoMapError, RecorderError


class Reversed(nn.Module):
    """Attention modules that run in another order than they stand in."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (Attention(48, num_heads=3) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.a(self.b(self.c(x)))


# The model does not notice


@pytest.mark.parametrize("name", TINY)
def test_outputs_are_bit_identical_and_nothing_is_left_on_the_model(name: str) -> None:
    model, x = tiny(name)
    with torch.no_grad():
        expected = model(x)
        with untouched(model):
            with AttentionRecorder(model, called_from=True) as rec, AttentionRecorder(model, keep="maps"):
                assert torch.equal(model(x), expected)
            assert torch.equal(model(x), expected)
    assert len(rec.maps) > 0


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_nothing_is_left_when_the_body_raises(error: type[BaseException]) -> None:
    model, x = tiny("vit")
    expected = maps_of(model, x)
    rec = AttentionRecorder(model, called_from=True)

    def body() -> None:
        with rec, torch.no_grad():
            model(x)
            raise error("mine")

    with untouched(model), pytest.raises(error, match="mine"):
        body()
    assert same(read(rec), expected)


def test_hooks_that_could_not_all_be_put_on_are_taken_off_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = tiny("vit")
    rec = AttentionRecorder(model)
    with monkeypatch.context() as patch, untouched(model):
        patch.setattr(nn.Module, "register_forward_hook", Raises.forward)
        with pytest.raises(TypeError), rec:
            raise AssertionError("the block was entered")
    with rec:
        model(x)
    assert list(rec.maps) == NAMES


# Which modules

CHOICES: list[tuple[Any, list[int]]] = [
    (None, [0, 1, 2]),
    ("blocks.1.attn", [1]),
    ("blocks.*.attn", [0, 1, 2]),
    ("blocks.[02].attn", [0, 2]),
    ("*2*", [2]),
    ("blocks.0", [0]),
    ("blocks", [0, 1, 2]),
    (0, [0]),
    (-1, [2]),
    (-3, [0]),
    ([-1, "blocks.0"], [0, 2]),
    ((1,), [1]),
    (["blocks.1", "blocks.1.attn", 1], [1]),
    (lambda name, _: name.startswith("blocks.1."), [1]),
    (lambda _, module: isinstance(module, Attention), [0, 1, 2]),
]


@pytest.mark.parametrize(("layers", "expected"), CHOICES, ids=str)
def test_layers_narrows_by_name_glob_container_index_list_and_predicate(layers: Any, expected: list[int]) -> None:
    model, x = tiny("vit", depth=3)
    names = [f"blocks.{i}.attn" for i in expected]
    with AttentionRecorder(model, layers) as rec, torch.no_grad():
        model(x)
    assert rec.layers == names
    assert list(rec.maps) == names


def test_a_container_is_not_taken_for_another_whose_name_begins_alike() -> None:
    model, _ = tiny("vit", depth=11)
    assert AttentionRecorder(model, "blocks.1").layers == ["blocks.1.attn"]


def test_a_module_that_is_not_known_as_attention_is_recorded_when_it_is_called_by_its_name() -> None:
    model, x = tiny("vit")
    with AttentionRecorder(model, ["blocks.1.attn", "blocks.0.mlp"]) as rec, torch.no_grad():
        model(x)
    assert set(rec.layers) == {"blocks.0.mlp", "blocks.1.attn"}
    assert list(rec.maps) == ["blocks.0.mlp", "blocks.1.attn"]


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("blocks.0.atn", r"'blocks\.0\.atn'.*Did you mean 'blocks\.0\.attn'"),
        ("block.1.attn", r"Did you mean .*'blocks\.1\.attn'"),
        ("zzz", r"There is: blocks\.0\.attn, blocks\.1\.attn"),
        ("blocks.7*", r"no attention module is called 'blocks\.7\*'"),
        (["blocks.0.attn", "blocks.9.attn"], r"'blocks\.9\.attn'"),
        (2, r"no layer 2: the model has 2 attention modules, 0 to 1"),
        (-3, r"no layer -3"),
        (lambda *_: False, r"accepts none of blocks\.0\.attn, blocks\.1\.attn"),
        ([], r"layers"),
    ],
    ids=str,
)
def test_layers_that_name_nothing_are_refused_with_near_misses(layers: Any, message: str) -> None:
    model, _ = tiny("vit")
    with untouched(model), pytest.raises(LayerNotFoundError, match=message):
        AttentionRecorder(model, layers)


def test_an_attention_module_alone_can_be_recorded() -> None:
    attn, x = Attention(48, num_heads=3), torch.randn(2, 5, 48)
    with untouched(attn), AttentionRecorder(attn) as rec, torch.no_grad():
        attn(x)
        attn(-x)
    assert [m.shape for m in rec.maps.values()] == [(2, 3, 5, 5)]
    assert torch.equal(rec.maps[0].x, -x)


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


def test_called_from_tells_the_line_and_what_x_is() -> None:
    model, x = tiny("vit")
    with AttentionRecorder(model, called_from=True) as rec, torch.no_grad():
        model(x)
    site = rec.maps["blocks.1.attn"].called_from
    assert site.file.endswith("vision_transformer.py")
    assert site.function.endswith("forward")
    assert "self.attn(" in site.code
    assert linecache.getline(site.file, site.line).strip() == site.code
    assert site.x == "what blocks.1.norm1 made of the output of blocks.0"
    assert f"{site.file}:{site.line}" in str(site)
    assert site.code in str(site)


def test_called_from_tells_a_call_by_hand_from_one_of_the_models() -> None:
    model: Any = tiny("vit")[0]
    y = torch.randn(1, 17, 48)
    with AttentionRecorder(model, called_from=True) as rec, torch.no_grad():
        model.blocks[0].attn(y)
        model.blocks[1].attn(model.blocks[1].norm1(y))
    first, second = (m.called_from for m in rec.maps.values())
    assert first.file == second.file == __file__
    assert first.code == "model.blocks[0].attn(y)"
    assert "between modules" in first.x
    assert second.line == first.line + 1
    assert second.x == "what blocks.1.norm1 put out"


def test_called_from_names_the_innermost_module_that_made_x() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(48, 48), nn.Identity()), Attention(48, num_heads=3))
    with AttentionRecorder(model, called_from=True) as rec, torch.no_grad():
        model(torch.randn(1, 5, 48))
    site = rec.maps[0].called_from
    assert site.x == "what 0.0 put out"
    assert site.code == "model(torch.randn(1, 5, 48))"


@pytest.mark.parametrize("keep", ["inputs", "maps"])
def test_called_from_is_refused_where_it_was_not_asked_for(keep: Any) -> None:
    model, x = tiny("vit")
    with AttentionRecorder(model, keep=keep) as rec, torch.no_grad():
        model(x)
    with pytest.raises(RecorderError, match="called_from=True"):
        rec.maps[0].called_from  # noqa: B018


@pytest.mark.parametrize("keep", ["inputs", "maps"])
def test_a_repr_never_raises(keep: Any) -> None:
    model, x = tiny("vit")
    with AttentionRecorder(model, ["blocks.0.mlp", "blocks.1.attn"], keep=keep) as rec, torch.no_grad():
        model(x)
    model.double()  # the maps are stale now, and one was never readable
    assert "blocks.0.mlp" in repr(rec.maps)
    assert "blocks.1.attn" in repr(rec.maps["blocks.1.attn"])


def test_a_map_is_an_attention_map_and_tells_name_shape_dtype_and_device() -> None:
    model, x = tiny("vit")
    with AttentionRecorder(model) as rec, torch.no_grad():
        model(x)
    m = rec.maps[0]
    assert isinstance(m, AttentionMap)
    assert repr(m) == "AttentionMap('blocks.0.attn', shape=(2, 3, 17, 17), dtype=float32, device=cpu)"
