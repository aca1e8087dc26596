"""Maps in a file: what comes back is what was recorded, without the model; and a file of anybody is safe to open."""

from __future__ import annotations

import json
import os
import pickle
import re
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import safetensors.torch
import torch
from support import reference
from support.image import DAVIT, MAXVIT, SHRUNK, SWIN, build, naflex
from support.inside import own_registers
from support.models import ANY_DTYPE, levit, tiny, tiny_double
from support.reading import record
from torch import Tensor, nn

import hookattn
from hookattn import (
    AttentionMap,
    AttentionRecorder,
    HookattnError,
    LayerNotFoundError,
    NoMapError,
    RecorderError,
    StaleMapError,
    TokenError,
    UnreadableError,
)
from hookattn.analysis import entropy, mean_attention_distance, rollout
from hookattn.figures import page, plot

Made = Callable[[], tuple[nn.Module, Any]]


def timm_model(name: str, size: tuple[int, int], **options: Any) -> Made:
    return lambda: (build(name, **options), torch.randn(2, 3, *size).double())


def of_naflex() -> tuple[nn.Module, Any]:
    rec, batch = naflex()
    return rec.model, batch


MODELS: dict[str, Made] = {
    "registers": lambda: tiny_double("vit_registers"),
    "distilled": lambda: tiny_double("deit_distilled"),
    "shifted windows": timm_model("swin_tiny_patch4_window7_224", (40, 72), img_size=(40, 72), **SWIN),
    "pooled keys": timm_model("pvt_v2_b0", (64, 96), **SHRUNK),
    "padding and a rest": timm_model("pvt_v2_b0", (57, 83), **SHRUNK),
    "grids and windows": timm_model("maxvit_rmlp_pico_rw_256", (64, 96), **MAXVIT),
    "pooled queries": timm_model("hiera_tiny_224", (64, 64), img_size=(64, 64), stages=(1, 1, 1, 1), embed_dim=24, num_heads=1),
    "images of their own": of_naflex,
    "channels": timm_model("xcit_nano_12_p16_224", (64, 64), depth=2, cls_attn_layers=1, embed_dim=32, num_heads=2),
    "channels and windows": timm_model("davit_tiny", (64, 64), **DAVIT),
    "replayed": levit,
}
QUERIES: list[Any] = ["cls", "dist", "mean", (0, 0), (1, 1), (0.3, 0.6), (0.99, 0.99), 0, 5]


def answer(ask: Callable[[], Any]) -> Any:
    """What it gives, or what the error says."""
    try:
        return ask()
    except HookattnError as error:
        return type(error), str(error)


def all_of(m: AttentionMap) -> list[Any]:
    """All that a map tells without its module."""
    asked: list[Callable[[], Any]] = [lambda: m[...], lambda: m[0, 0], lambda: m.shape, lambda: m.dtype, lambda: m.axes]
    for query in QUERIES:
        asked += [lambda query=query: m.rows(query), lambda query=query: m.image(query)]
        asked += [lambda query=query: m.image(query, heads=None, size=(31, 57))]
    for which in ("tokens", "query_tokens"):
        for part in ("prefix", "grid_size", "places", "spread", "extent", "seen", "windows"):
            asked.append(lambda which=which, part=part: getattr(getattr(m, which), part))
    asked += [lambda: mean_attention_distance(m), lambda: entropy(m), lambda: repr(m)]
    return [answer(ask) for ask in asked]


def assert_same(found: list[Any], expected: list[Any]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected):
        if isinstance(other, Tensor):
            assert one.dtype == other.dtype
            torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
        else:
            assert one == other


def saved(maps: Any, path: Path, **options: Any) -> Any:
    maps.save(path / "x.safetensors", **options)
    return hookattn.load(path / "x.safetensors")


@pytest.mark.parametrize("made", MODELS.values(), ids=MODELS)
def test_what_is_loaded_is_what_was_saved_bit_for_bit(made: Made, tmp_path: Path) -> None:
    rec = record(*made(), keep="maps")
    maps = saved(rec, tmp_path)
    assert type(maps) is type(rec.maps)
    assert list(maps) == list(rec.maps)
    assert (maps.skipped, maps.called, repr(maps)) == (rec.maps.skipped, "forward", repr(rec.maps))
    for one, other in zip(maps.values(), rec.maps.values()):
        assert_same(all_of(one), all_of(other))


@pytest.mark.parametrize("made", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("options", [{}, {"what": "qk"}, {"dtype": torch.float16}], ids=str)
def test_what_is_loaded_can_be_saved_again_and_is_the_same_file(made: Made, options: Any, tmp_path: Path) -> None:
    maps = saved(record(*made()), tmp_path, **options)
    before = (tmp_path / "x.safetensors").read_bytes()
    maps.save(tmp_path / "again.safetensors", **options)
    assert (tmp_path / "again.safetensors").read_bytes() == before
    copy = pickle.loads(pickle.dumps(maps))
    copy.save(tmp_path / "again.safetensors", **options)
    assert (tmp_path / "again.safetensors").read_bytes() == before
    assert len(pickle.dumps(maps)) < 1.2 * len(before) + 20_000
    assert sum(len(pickle.dumps(m)) for m in maps.values()) < 1.2 * len(before) + 20_000 * len(maps)


def test_a_map_is_a_tensor_of_its_name_for_everybody(tmp_path: Path) -> None:
    model, x = tiny("vit_registers")
    rec = record(model, x)
    rec.save(path := tmp_path / "x.safetensors")
    tensors = safetensors.torch.load_file(path)
    assert list(tensors) == list(rec.maps)
    assert all(torch.equal(tensors[name], m[...]) for name, m in rec.maps.items())
    raw = path.read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])["__metadata__"]
    told = json.loads(header["hookattn"])
    assert told["model"] == "vit_small_patch14_reg4_dinov2"
    assert told["version"] == hookattn.__version__
    assert told["maps"]["blocks.0.attn"]["axes"] == ["batch", "head", "query", "key"]
    assert told["tokens"][0]["prefix"] == ["cls", "reg0", "reg1", "reg2", "reg3"]


def test_a_model_that_is_none_of_timm_is_named_by_its_class(tmp_path: Path) -> None:
    model = nn.Sequential(nn.MultiheadAttention(8, 2, batch_first=True))
    model.forward = lambda x: model[0](x, x, x, need_weights=False)[0]  # type: ignore[method-assign]
    maps = saved(record(model.eval(), torch.randn(1, 5, 8)), tmp_path)
    assert maps.model == "Sequential"


# Queries and keys


@pytest.mark.parametrize("name", ANY_DTYPE)
def test_maps_are_computed_of_queries_and_keys_that_were_saved(name: str, tmp_path: Path) -> None:
    model, x = tiny_double(name)
    rec = record(model, x)
    maps = saved(rec, tmp_path, what="qk")
    for one, other in zip(maps.values(), rec.maps.values()):
        torch.testing.assert_close(one[...], other[...], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(one[1, :, 2:4], other[1, :, 2:4], rtol=1e-9, atol=1e-12)
        assert one.axes == other.axes


def test_queries_and_keys_with_biases_and_masks_of_windows(tmp_path: Path) -> None:
    rec = record(*MODELS["shifted windows"]())
    maps = saved(rec, tmp_path, what="qk")
    tensors = safetensors.torch.load_file(tmp_path / "x.safetensors")
    assert tensors["layers.0.blocks.1.attn:bias0"].shape[0] == 1  # once for all windows
    assert tensors["layers.0.blocks.0.attn:q"].shape == rec.maps[0].q.shape
    for one, other in zip(maps.values(), rec.maps.values()):
        torch.testing.assert_close(one[...], other[...], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(one.image((1, 2)), other.image((1, 2)), rtol=1e-9, atol=1e-12)


def test_queries_and_keys_in_the_file_make_the_map_by_its_definition(tmp_path: Path) -> None:
    model, x = tiny("vit")
    rec = record(model, x)
    rec.save(tmp_path / "x.safetensors", what="qk")
    tensors = safetensors.torch.load_file(tmp_path / "x.safetensors")
    for name, m in rec.maps.items():
        made = reference.attention(tensors[f"{name}:q"], tensors[f"{name}:k"], 16**-0.5)
        torch.testing.assert_close(m[...].double(), made, rtol=1e-5, atol=1e-6)


class Own(nn.Module):
    """Attention of nobody's, which shows scores and no queries and keys."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(12, 36)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 6)).permute(2, 0, 3, 1, 4)
        return ((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2)


class Everything(nn.Module):
    """Attention whose recipe has all that a recipe can have."""

    def forward(self, x: Tensor) -> Tensor:
        return x


@pytest.mark.parametrize("several", [True, False])
def test_all_that_a_recipe_can_have_is_saved_once(several: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own_registers(monkeypatch)
    q, k, scale = torch.randn(5, 3, 7, 4), torch.randn(5, 3, 7, 4), torch.rand(3, 1, 1)
    bias, mask, mix = torch.randn(1, 1, 7, 7).expand(5, 6, 7, 7), torch.rand(7, 7) > 0.2, torch.randn(6, 3)
    bias = (bias, torch.randn(6, 1, 7)) if several else bias  # type: ignore[assignment]
    hookattn.recipe(Everything)(lambda module, x: hookattn.QK(q, k, scale, bias, mask.expand(5, 6, 7, 7), True, mix))
    model = nn.Sequential(Everything())
    rec = record(model, torch.randn(5, 7, 4), layers=["0"])
    m = saved(rec, tmp_path, what="qk")[0]
    tensors = safetensors.torch.load_file(tmp_path / "x.safetensors")
    assert (tensors["0:bias0"].shape, tensors["0:mask"].shape) == ((1, 1, 7, 7), (1, 1, 7, 7))
    scores = torch.einsum("g h, b h q k -> b g q k", mix.double(), q.double() @ k.double().mT * scale)
    scores = scores + sum(each.double() for each in (bias if several else [bias]))
    open_keys = mask & torch.ones(7, 7).tril().bool()
    expected = torch.softmax(scores.masked_fill(~open_keys, -torch.inf), -1).nan_to_num(0)
    torch.testing.assert_close(m[...].double(), expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(m[1:3, 4, 5:].double(), expected[1:3, 4, 5:], rtol=1e-4, atol=1e-6)
    assert m.shape == rec.maps[0].shape == (5, 6, 7, 7)


def test_maps_that_are_not_made_of_queries_and_keys_are_saved_whole(tmp_path: Path) -> None:
    for rec in (record(Own().eval(), torch.randn(2, 5, 12)), record(*tiny("vit"), keep="maps")):
        maps = saved(rec, tmp_path, what="qk")
        assert set(safetensors.torch.load_file(tmp_path / "x.safetensors")) >= set(rec.maps)
        assert all(torch.equal(one[...], other[...]) for one, other in zip(maps.values(), rec.maps.values()))


def test_a_dtype_of_the_recorder_is_that_of_maps_that_are_computed_later(tmp_path: Path) -> None:
    model, x = tiny("vit")
    rec = record(model, x, dtype=torch.bfloat16)
    for options in ({}, {"what": "qk"}):
        maps = saved(rec, tmp_path, **options)
        assert maps[0].dtype == maps[0][...].dtype == torch.bfloat16
        assert torch.equal(maps[0][...], rec.maps[0][...])


# Rows, layers, dtypes


@pytest.mark.parametrize("name", ["registers", "shifted windows", "pooled keys", "images of their own"])
@pytest.mark.parametrize("query", [(0, 0), (0.4, 0.4), [(0.2, 0.1), (0.9, 0.9)], 3])
def test_rows_alone_answer_for_their_queries(name: str, query: Any, tmp_path: Path) -> None:
    if (name, query) == ("images of their own", 3):
        pytest.skip("which is no token of the smallest image")
    rec = record(*MODELS[name](), keep="maps")
    on_the_image = [layer for layer, m in rec.maps.items() if all(m.query_tokens.grid_size)]
    maps = saved(rec, tmp_path, rows=query, layers=on_the_image)
    assert list(maps) == on_the_image
    for one, other in zip(maps.values(), map(rec.maps.get, on_the_image)):
        assert (one.shape, one.dtype, one.axes) == (other.shape, other.dtype, other.axes)
        for each in query if isinstance(query, list) else [query]:
            assert torch.equal(one.image(each), other.image(each))
            assert_same([answer(partial(one.rows, each))], [answer(partial(other.rows, each))])


def test_rows_that_were_not_saved_are_refused_by_number(tmp_path: Path) -> None:
    model, x = tiny("vit_registers")
    m = saved(record(model, x), tmp_path, rows=["cls", 3])[0]
    assert m[:, :, [0, 3]].shape == (2, 3, 2, 21)
    copy = pickle.loads(pickle.dumps(m))
    for ask in (lambda: m[...], lambda: m[:, :, 1], lambda: entropy(m), lambda: copy[:, 0]):
        with pytest.raises(UnreadableError, match=r"'blocks\.0\.attn' was saved without row 1: there is 0, 3"):
            ask()
    assert torch.equal(copy[:, :, 3], m[:, :, 3])
    assert os.path.getsize(tmp_path / "x.safetensors") < 2 * (2 * 3 * 2 * 21 * 4) + 3000


def test_a_query_that_a_map_has_not_is_refused(tmp_path: Path) -> None:
    rec = record(*MODELS["shifted windows"]())
    with pytest.raises(TokenError, match="there is no 'cls' token"):
        rec.save(tmp_path / "x.safetensors", rows="cls")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("layers", "names"),
    [
        ("blocks.1.*", ["blocks.1.attn"]),
        (-1, ["blocks.1.attn"]),
        ([1, "blocks.0.attn"], ["blocks.0.attn", "blocks.1.attn"]),
        (["blocks.*", 0], ["blocks.0.attn", "blocks.1.attn"]),
    ],
)
def test_layers_are_chosen(layers: Any, names: list[str], tmp_path: Path) -> None:
    model, x = tiny("vit")
    assert list(saved(record(model, x), tmp_path, layers=layers)) == names


def test_a_dtype_halves_the_file_and_one_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    model, x = tiny("vit")
    rec = record(model, x)
    whole = sum(m[...].nbytes for m in rec.maps.values())
    maps = saved(rec, tmp_path, dtype=torch.float16)
    assert os.path.getsize(tmp_path / "x.safetensors") < whole / 2 + 3000
    assert all(torch.equal(one[...], other[...].half()) for one, other in zip(maps.values(), rec.maps.values()))
    with torch.no_grad():
        model.blocks[0].attn.qkv.weight.mul_(1e6)
    with pytest.raises(HookattnError, match=r"'blocks\.0\.attn:q' has values that torch\.float16 cannot hold"):
        record(model, x).save(tmp_path / "x.safetensors", what="qk", dtype=torch.float16)


def test_slices_go_where_the_loader_says(tmp_path: Path) -> None:
    model, x = tiny("vit")
    rec = record(model, x)
    rec.save(tmp_path / "x.safetensors", dtype=torch.float16)
    maps = hookattn.load(tmp_path / "x.safetensors", dtype=torch.float64, device="meta")
    assert (maps[0].dtype, maps[0].device) == (torch.float64, torch.device("meta"))
    assert maps[0][:, 0].device == torch.device("meta")


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"what": "values"}, ValueError, 'what="maps" or what="qk"'),
        ({"what": "qk", "rows": "cls"}, ValueError, "leave rows= out"),
        ({"dtype": torch.int8}, ValueError, "dtype=torch.int8 is not written"),
        ({"layers": "stages.*"}, LayerNotFoundError, r"no map was recorded of 'stages\.\*'"),
    ],
)
def test_what_cannot_be_saved_is_said(options: Any, error: type[Exception], match: str, tmp_path: Path) -> None:
    model, x = tiny("vit")
    with pytest.raises(error, match=match):
        record(model, x).save(tmp_path / "x.safetensors", **options)
    assert not list(tmp_path.iterdir())


def test_nothing_is_saved_where_nothing_was_recorded(tmp_path: Path) -> None:
    model, x = tiny("vit")
    with pytest.raises(NoMapError):
        AttentionRecorder(model).save(tmp_path / "x.safetensors")
    with pytest.raises(NoMapError, match="there is no map to save"):
        type(record(model, x).maps)({}).save(tmp_path / "x.safetensors")


# Written whole or not at all


def test_a_file_that_cannot_be_finished_leaves_the_one_before(tmp_path: Path) -> None:
    model, x = tiny("vit")
    rec = record(model, x)
    rec.save(path := tmp_path / "x.safetensors")
    before = path.read_bytes()
    with torch.no_grad():
        model.blocks[1].attn.qkv.weight.add_(1)
    with pytest.raises(StaleMapError, match=r"blocks\.1\.attn"):
        rec.save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_folders_are_told(tmp_path: Path) -> None:
    model, x = tiny("vit")
    rec = record(model, x)
    with pytest.raises(HookattnError, match=r"there is no folder .*nowhere: make it first"):
        rec.save(tmp_path / "nowhere" / "x.safetensors")
    with pytest.raises(HookattnError, match="is a folder: name a file in it"):
        rec.save(tmp_path)
    with (
        mock.patch("os.replace", side_effect=OSError(28, "No space left on device")),
        pytest.raises(HookattnError, match="space"),
    ):
        rec.save(tmp_path / "x.safetensors")
    assert not list(tmp_path.iterdir())


def test_no_two_maps_are_in_memory_at_once(tmp_path: Path) -> None:
    model, x = tiny("vit", depth=4)
    rec = record(model, x)
    alive: list[weakref.ref[Tensor]] = []
    true = AttentionMap.read

    def read(self: AttentionMap, index: Any) -> Tensor:
        assert not any(each() is not None for each in alive)
        values = true(self, index)
        alive.append(weakref.ref(values))
        return values

    with mock.patch.object(AttentionMap, "read", read):
        rec.save(tmp_path / "x.safetensors")
    assert len(alive) == 4


@pytest.mark.skipif(os.name == "nt", reason="a file that is mapped is not written into there")
@pytest.mark.parametrize("options", [{}, {"rows": [0, 2, 4]}], ids=str)
def test_what_is_not_sliced_is_not_read(options: Any, tmp_path: Path) -> None:
    model, x = tiny("vit")
    rec = record(model, x, keep="maps")
    maps = saved(rec, tmp_path, **options)
    assert torch.equal(maps[0][:, :, 0], rec.maps[0][:, :, 0])
    path = tmp_path / "x.safetensors"
    raw = path.read_bytes()
    with open(path, "r+b") as file:  # of the last map, whose rows nobody has looked at
        file.seek(len(raw) - 4)
        file.write(np.float32(7).tobytes())
    last = maps[1][-1, -1, 4 if options else -1, -1]
    assert last == 7


# What is loaded is used like what was recorded


def test_loaded_maps_roll_out_and_are_drawn(tmp_path: Path) -> None:
    model, x = tiny("vit_registers")
    rec = record(model, x, keep="maps")
    maps = saved(rec, tmp_path)
    assert torch.equal(rollout(maps), rollout(rec))
    assert torch.equal(maps.stack(), rec.maps.stack())
    assert maps.to_xarray().identical(rec.maps.to_xarray())
    assert torch.equal(torch.mean(maps[0], 1), torch.mean(rec.maps[0], 1))
    assert np.array_equal(np.asarray(maps["blocks.*"][1]), rec.maps[1].numpy())
    assert "<table" in maps._repr_html_()
    plot.overview(maps).savefig(tmp_path / "x.png")
    for name, given in (("recorded", rec), ("loaded", maps)):
        page.write_page(given, None, tmp_path / f"{name}.html")
    # all but why it could not be verified
    recorded, loaded = (
        re.sub('verified": ".*?", "entropy"', "", (tmp_path / f"{name}.html").read_text()) for name in ("recorded", "loaded")
    )
    assert loaded == recorded


def test_what_a_file_has_not_is_said(tmp_path: Path) -> None:
    model, x = tiny("vit")
    m = saved(record(model, x), tmp_path)[0]
    for ask in (lambda: m.x, lambda: m.q, lambda: m.verify()):
        with pytest.raises(RecorderError, match=r"'blocks\.0\.attn' was loaded from a file, which holds no model and no input"):
            ask()
    with pytest.raises(RecorderError, match="gradients=True"):
        m.gradient  # noqa: B018


def test_writing_into_a_slice_changes_neither_map_nor_file(tmp_path: Path) -> None:
    model, x = tiny("vit")
    for options in ({}, {"rows": 0}, {"what": "qk"}):
        m = saved(record(model, x), tmp_path, **options)[0]
        before, raw = m[:, :, 0], (tmp_path / "x.safetensors").read_bytes()
        m[:, :, 0].zero_()
        m[:, :, slice(0, 1)].zero_()
        assert torch.equal(m[:, :, 0], before)
        assert (tmp_path / "x.safetensors").read_bytes() == raw


# Files of others


def rewritten(path: Path, change: Callable[[Any], Any]) -> None:
    """Change what a file tells of its maps."""
    raw = path.read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:end])
    told = json.loads(header["__metadata__"]["hookattn"])
    header["__metadata__"]["hookattn"] = json.dumps(change(told) or told)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[end:])


DAMAGES: dict[str, Callable[[Any], Any]] = {
    "no maps": lambda told: told.pop("maps") and None,
    "a list": lambda told: [told],
    "nested": lambda told: told.update(tokens=json.loads("[" * 500 + "]" * 500)),
    "another kind": lambda told: told["maps"]["blocks.0.attn"].update(kind="pickle"),
    "no such tensor": lambda told: told["maps"].update(other=told["maps"]["blocks.0.attn"]),
    "another grid": lambda told: told["tokens"][0].update(grid_size=[3, 4]),
    "words for numbers": lambda told: told["tokens"][0].update(grid_size=["a", "b"]),
    "no such tokens": lambda told: told["maps"]["blocks.0.attn"].update(tokens=[0, 7]),
    "more prefix tokens": lambda told: told["tokens"][0].update(prefix=["cls"] * 9),
    "a grid that no memory holds": lambda told: told["tokens"][0].update(grid_size=[2**20, 2**20]),
    "no model": lambda told: told.pop("model") and None,
    "skipped": lambda told: told.update(skipped=3),
    "no format": lambda told: told.pop("format") and None,
}


@pytest.mark.parametrize("change", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_file_is_refused(change: Callable[[Any], Any], tmp_path: Path) -> None:
    model, x = tiny("vit")
    record(model, x).save(path := tmp_path / "x.safetensors")
    rewritten(path, change)
    with pytest.raises(HookattnError, match=r"x\.safetensors is damaged: "):
        hookattn.load(path)


def test_what_a_file_says_is_no_html(tmp_path: Path) -> None:
    model, x = tiny("vit")
    record(model, x).save(path := tmp_path / "x.safetensors")
    evil = "</script><img src=x onerror=alert(1)>"
    rewritten(path, lambda told: told.update(model=evil, called=evil, skipped={evil: evil}))
    rewritten(path, lambda told: told["tokens"][0].update(prefix=[evil]))
    maps = hookattn.load(path)
    assert list(maps.skipped) == [maps.model] == [evil]
    page.write_page(maps, None, tmp_path / "x.html")
    for text in ((tmp_path / "x.html").read_text(), maps._repr_html_(), maps[0]._repr_html_()):
        assert "<img src=x" not in text


@pytest.mark.parametrize("number", [-2, 180])
def test_places_beyond_the_grid_are_refused(number: int, tmp_path: Path) -> None:
    record(*MODELS["shifted windows"]()).save(path := tmp_path / "x.safetensors")
    tensors = safetensors.torch.load_file(path)
    with safetensors.safe_open(path, "pt") as file:
        told = file.metadata()
    tensors[":places0"][0, 0, 0] = number
    safetensors.torch.save_file(tensors, path, told)
    with pytest.raises(HookattnError, match=r"damaged.*places that a grid"):
        hookattn.load(path)


def test_rows_that_are_not_those_of_the_file_are_refused(tmp_path: Path) -> None:
    model, x = tiny("vit")
    record(model, x).save(path := tmp_path / "x.safetensors", rows=[0, 1])
    for rows in ([0], [0, 99], [-1, 0]):
        rewritten(path, lambda told, rows=rows: told["maps"]["blocks.0.attn"].update(rows=rows))
        with pytest.raises(HookattnError, match="damaged"):
            hookattn.load(path)


def test_a_later_format_is_refused_with_what_to_install(tmp_path: Path) -> None:
    model, x = tiny("vit")
    record(model, x).save(path := tmp_path / "x.safetensors")
    rewritten(path, lambda told: told.update(format=2, version="9.1"))
    with pytest.raises(HookattnError, match=r"written by hookattn 9\.1 in format 2.*pip install --upgrade hookattn"):
        hookattn.load(path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    model, x = tiny("vit")
    path = tmp_path / "x.safetensors"
    with pytest.raises(FileNotFoundError):
        hookattn.load(path)
    safetensors.torch.save_file({"weight": torch.ones(3)}, path)
    with pytest.raises(HookattnError, match="holds no maps: it is a safetensors file that hookattn has not written"):
        hookattn.load(path)
    torch.save(record(model, x).maps, path)
    with pytest.raises(HookattnError, match="is no safetensors file"):
        hookattn.load(path)
    record(model, x).save(path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(HookattnError, match="is no safetensors file"):
        hookattn.load(path)
