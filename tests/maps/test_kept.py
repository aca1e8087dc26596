"""A map is its reader's: slices are fresh, and what is kept, copied or saved is the map and nothing else."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from typing import Any

import pytest
import torch
from support.models import tiny

from hookattn import AttentionMap, AttentionRecorder, RecorderError
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
