"""A map is its reader's: slices are fresh, and what is kept, copied or saved is the map and nothing else."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.image import SWIN, build
from support.inside import lost
from support.models import levit, tiny, tiny_double
from torch import Tensor, nn

from hookattn import AttentionMap, AttentionRecorder, NoGradientError, RecorderError, StaleMapError, UnreadableError
from hookattn.analysis import mean_attention_distance

KEEPS = ["inputs", "maps"]


def recorded(name: str, **options: Any) -> tuple[Any, AttentionRecorder]:
    model, x = tiny(name)
    with AttentionRecorder(model, **options) as rec, torch.no_grad():
        model(x)
    return model, rec


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("index", [..., 0, (0, 1), (slice(None), slice(None), 0), (slice(None), 1, [0, 2])], ids=str)
def test_writing_into_a_slice_changes_no_map(index: Any, keep: Any) -> None:
    m = recorded("vit", keep=keep)[1].maps[0]
    before = m[...].clone()
    m[index].zero_()
    assert torch.equal(m[...], before)


def saved(m: AttentionMap) -> AttentionMap:
    torch.save(m, file := io.BytesIO())
    assert file.tell() < m[...].nbytes + 20_000
    file.seek(0)
    loaded: AttentionMap = torch.load(file, weights_only=False)
    return loaded


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("again", [lambda m: pickle.loads(pickle.dumps(m)), copy.deepcopy, copy.copy, saved])
def test_a_map_that_is_saved_is_the_map_and_knows_where_it_lies(again: Any, keep: Any) -> None:
    m = recorded("vit_registers", keep=keep)[1].maps[0]
    other = again(m)
    assert type(other) is AttentionMap
    assert repr(other) == repr(m)
    assert torch.equal(other[...], m[...])
    assert other.axes == m.axes
    assert other.tokens.prefix == m.tokens.prefix
    torch.testing.assert_close(other.image((0.5, 0.25), size=20), m.image((0.5, 0.25), size=20))
    torch.testing.assert_close(mean_attention_distance(other), mean_attention_distance(m))
    with pytest.raises(RecorderError, match="was let go"):
        other.x  # noqa: B018


MODES: dict[str, dict[str, Any]] = {
    "captured": {},
    "kept": {"keep": "maps"},
    "elsewhere": {"device": "cpu", "dtype": torch.float32},
    "half": {"keep": "maps", "dtype": torch.float16},
    "all": {"passes": "all"},
    "in the graph": {"detach": False},
    "kept in the graph": {"keep": "maps", "detach": False},
    "gradients": {"gradients": True},
    "kept gradients": {"keep": "maps", "gradients": True},
    "verified": {"verify": True},
    "verified and kept": {"keep": "maps", "verify": True, "called_from": True},
}
COPIES: dict[str, Callable[[Any], Any]] = {
    "pickle": lambda given: pickle.loads(pickle.dumps(given)),
    "deepcopy": copy.deepcopy,
    "torch.save": lambda given: loaded_by_torch(given),
}
MODELS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "vit": lambda: tiny_double("vit"),
    "windows": lambda: (build("swin_tiny_patch4_window7_224", img_size=(40, 72), **SWIN), torch.randn(2, 3, 40, 72).double()),
    "replayed": lambda: cast_double(*levit()),
}


def cast_double(model: nn.Module, x: Tensor) -> tuple[nn.Module, Tensor]:
    return model.double(), x.double()


def loaded_by_torch(given: Any) -> Any:
    torch.save(given, file := io.BytesIO())
    file.seek(0)
    return torch.load(file, weights_only=False)


def numbers_of(maps: Any) -> list[Any]:
    """What two lists of maps have alike that are the same."""
    numbers = [each for m in maps.values() for each in (m[...].detach(), m.image((0.5, 0.25), size=20).detach())]
    return [*numbers, [m.axes for m in maps.values()], repr(maps), maps.skipped, maps.called]


def assert_same(found: list[Any], expected: list[Any]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected):
        if isinstance(other, Tensor):
            # a row that is read alone is computed another way than a whole map: pictures differ in the last bits
            assert other.dim() == 3 or torch.equal(one, other)
            torch.testing.assert_close(one, other, equal_nan=True)
        else:
            assert one == other


@pytest.mark.parametrize("when", ["inside", "after"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("made", MODELS)
def test_copies_of_all_maps_keep_neither_model_nor_input_in_any_mode(made: str, mode: str, when: str) -> None:
    model, x = MODELS[made]()
    follows = "gradients" in MODES[mode]
    with AttentionRecorder(model, **MODES[mode]) as rec, torch.set_grad_enabled(follows or not MODES[mode].get("detach", True)):
        out = model(x)
        if follows:
            out.square().sum().backward()
        copies = [copied(rec.maps) for copied in COPIES.values()] if when == "inside" else []
    copies = copies or [copied(rec.maps) for copied in COPIES.values()]
    expected = numbers_of(rec.maps)
    slopes = [m.gradient[...] for m in rec.maps.values()] if follows else []
    moved = [m.verify() for m in rec.maps.values()] if "verify" in MODES[mode] else []
    sizes = sum(m[...].nbytes for m in rec.maps.values()) * (2 if follows else 1)
    there = [weakref.ref(model), weakref.ref(x)]
    del model, x, rec, out
    gc.collect()
    assert [each() for each in there] == [None, None]
    for maps in copies:
        assert_same(numbers_of(maps), expected)
        assert all(torch.equal(m.gradient[...], slope) for m, slope in zip(maps.values(), slopes))
        assert [m.verify() for m in (maps.values() if moved else ())] == moved
        assert len(pickle.dumps(maps)) < sizes * 1.3 + 10_000 * len(maps)


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_passes_are_copied(copied: Callable[[Any], Any]) -> None:
    model, x = tiny("vit")
    with AttentionRecorder(model, passes="all") as rec, torch.no_grad():
        model(x)
        model(x.flip(0))
    one, other = copied(rec.passes)
    assert torch.equal(one[0][...], rec.passes[0][0][...])
    assert torch.equal(other[0][...], rec.passes[1][0][...])


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_a_map_that_is_stale_is_copied_as_one_and_keeps_no_model(copied: Callable[[Any], Any]) -> None:
    model, rec = recorded("vit")
    with torch.no_grad():
        next(model.parameters()).add_(1)
        model.blocks[0].attn.qkv.weight.add_(1)
    with pytest.raises(StaleMapError) as raised:
        rec.maps[0][...]
    told = str(raised.value)
    other, there = copied(copied(rec.maps[0])), weakref.ref(model)
    fine = copied(rec.maps[1])
    expected = rec.maps[1][...]
    del model, rec, raised
    gc.collect()
    assert there() is None
    for read in (lambda: other[...], lambda: other.shape, other.image, lambda: other.tokens, lambda: other.axes):
        with pytest.raises(StaleMapError) as again:
            read()
        assert str(again.value) == told
    assert torch.equal(fine[...], expected)


def test_a_map_that_is_lost_is_copied_as_one() -> None:
    m = lost("for this reason", recorded("vit")[1].maps[0])
    for copied in COPIES.values():
        with pytest.raises(UnreadableError, match="for this reason"):
            copied(m)[...]
        assert repr(copied(m)) == repr(m)


@pytest.mark.parametrize("which", ["q", "k", "v"])
@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_queries_keys_and_values_are_copied_without_the_model(copied: Callable[[Any], Any], which: str) -> None:
    model, rec = recorded("vit_registers")
    given: Any = getattr(rec.maps[0], which)
    values, picture, there = given[...], given.image(), weakref.ref(model)
    other = copied(given)
    assert repr(other) == repr(given)
    assert len(pickle.dumps(given)) < values.nbytes + 20_000
    del model, rec, given
    gc.collect()
    assert there() is None
    assert torch.equal(other[...], values)
    assert torch.equal(other[:, 1, 2], values[:, 1, 2])
    assert torch.equal(copied(other).image(), picture)


def test_queries_that_are_stale_are_copied_as_such() -> None:
    model, rec = recorded("vit")
    with torch.no_grad():
        model.blocks[0].attn.qkv.weight.add_(1)
    with pytest.raises(StaleMapError):
        pickle.loads(pickle.dumps(rec.maps[0].q))[...]


def test_a_copy_of_a_gradient_that_has_not_arrived_says_what_the_gradient_says() -> None:
    model, x = tiny("vit")
    with AttentionRecorder(model, gradients=True) as rec:
        model(x)
    with pytest.raises(NoGradientError) as raised:
        rec.maps[0].gradient[...]
    for copied in COPIES.values():
        with pytest.raises(NoGradientError) as again:
            copied(copied(rec.maps[0].gradient))[...]
        assert str(again.value) == str(raised.value)


def test_torch_takes_a_saved_map_for_what_it_is_a_pickle() -> None:
    torch.save(recorded("vit")[1].maps[0], file := io.BytesIO())
    file.seek(0)
    with pytest.raises(pickle.UnpicklingError, match="weights_only"):
        torch.load(file, weights_only=True)


def test_a_gradient_is_saved_with_its_map() -> None:
    model, x = tiny("vit")
    with AttentionRecorder(model, gradients=True) as rec:
        model(x).square().sum().backward()
    other = pickle.loads(pickle.dumps(rec.maps[0]))
    assert torch.equal(other.gradient[:, 1], rec.maps[0].gradient[:, 1])


def test_kept_maps_keep_no_model_alive() -> None:
    model, rec = recorded("vit", keep="maps")
    maps, there = rec.maps[:], weakref.ref(model)
    del model, rec
    gc.collect()
    assert there() is None
    assert [m.image("cls").shape for m in maps] == [(2, 4, 4)] * 2
