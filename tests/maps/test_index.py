"""`m[index]` is `m[...][index]`, and costs no more than what it gives."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.models import tiny
from support.modes import Largest
from timm.layers import Attention
from torch import Tensor, nn

from hookattn import AttentionMap, AttentionRecorder

SHAPE = (2, 3, 17, 17)
KINDS = ["recipe", "bias", "replay", "kept", "causal"]


class UnknownAttention(nn.Module):
    """Attention without a recipe: it is run again to be read."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(48, 48), nn.Linear(48, 48)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (3, 16)).transpose(1, 2) for t in (self.query(x), self.key(x), x))
        return ((q @ k.mT / 4).softmax(-1) @ v).transpose(1, 2).flatten(2)


@cache
def map_and_whole(kind: str) -> tuple[AttentionMap, Tensor]:
    """A map of SHAPE that is computed in one of several ways, and all of it."""
    torch.manual_seed(0)
    x = torch.randn(2, 17, 48)
    model = (
        UnknownAttention() if kind == "replay" else tiny("beit" if kind == "bias" else "vit")[0].get_submodule("blocks.0.attn")
    )
    arguments = {"is_causal": True} if kind == "causal" else {}
    with AttentionRecorder(model, keep="maps" if kind == "kept" else "inputs") as rec, torch.no_grad():
        model(x, **arguments)
    m = rec.maps[0]
    assert m.shape == SHAPE
    return m, m[...]


def agrees(kind: str, index: Any) -> None:
    m, whole = map_and_whole(kind)
    got, expected = m[index], whole[index]
    assert got.shape == expected.shape
    assert got.dtype == expected.dtype
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def entries(length: int) -> st.SearchStrategy[Any]:
    """What may stand for one axis: a number from either end, or a slice, forwards, of any bounds."""
    bounds = st.none() | st.integers(-length - 3, length + 3)
    return st.integers(-length, length - 1) | st.builds(slice, bounds, bounds, st.none() | st.integers(1, 4))


@st.composite
def indices(draw: st.DrawFn) -> Any:
    """Up to four entries, with an ellipsis somewhere or nowhere; a single one with or without a tuple around it."""
    head = draw(st.integers(0, 4))
    tail = draw(st.integers(0, 4 - head))
    index = [draw(entries(length)) for length in SHAPE[:head]]
    if tail or draw(st.booleans()):
        index += [..., *(draw(entries(length)) for length in SHAPE[len(SHAPE) - tail :])]
    return index[0] if len(index) == 1 and draw(st.booleans()) else tuple(index)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(index=indices())
def test_numbers_slices_and_ellipses_pick_what_they_pick_of_the_whole(kind: str, index: Any) -> None:
    agrees(kind, index)


MASK = torch.arange(17) % 3 == 0
ADVANCED: list[Any] = [
    [0, 1],
    [1],
    ([1, 0],),
    (0, [2, 0]),
    (slice(None), [0, 2]),
    (slice(None), slice(None), [3, 3, -1]),
    (..., [5, 6]),
    ([0, 1], [1, 2], [3, 4]),
    ([0, 1], slice(None), [3, 4]),
    (0, slice(None), [3, 4], 5),
    torch.tensor([1, 0, 1]),
    torch.tensor(1),
    (slice(None), torch.tensor([[0], [2]])),
    (0, 1, torch.tensor([3, 4]), torch.tensor([5, 6])),
    (slice(None), slice(None), torch.tensor(4)),
    torch.tensor([True, False]),
    (slice(None), torch.tensor([True, False, True])),
    (slice(None), slice(None), MASK),
    (..., MASK),
    (..., MASK, slice(2, 5)),
    torch.ones(2, 3, dtype=torch.bool),
    torch.ones(SHAPE, dtype=torch.bool),
    None,
    (None, 0),
    (0, None, 1),
    (..., None),
    (slice(None), None, 1, 2, None, 3),
    True,
    False,
    (True, 0),
    np.int64(1),
    (np.int32(0), np.int64(-1), np.uint8(5)),
    (..., np.int64(-1)),
    slice(np.int64(0), np.int64(1)),
    np.array([1, 0]),
    (slice(None), np.array([True, False, True])),
    (slice(0, 0),),
    (slice(None), slice(2, 1), 0),
    (..., slice(20, 30)),
    (),
    ...,
]


@pytest.mark.parametrize("kind", ["recipe", "replay", "kept"])
@pytest.mark.parametrize("index", ADVANCED, ids=lambda index: "".join(str(index).split())[:40])
def test_lists_tensors_masks_none_and_numpy_pick_what_they_pick_of_the_whole(kind: str, index: Any) -> None:
    agrees(kind, index)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("index", "message"),
    [
        (2, r"batch 2 .*there are 2"),
        (-3, r"batch -3 .*there are 2"),
        ((0, 3), r"head 3 .*there are 3"),
        ((0, 0, 17), r"query 17 .*there are 17"),
        ((..., -18), r"key -18 .*there are 17"),
        ((np.int64(5), 0), r"batch 5 .*there are 2"),
        ((0, 0, 0, 0, 0), r"4 axes \(batch, head, query, key\)"),
        ((slice(None),) * 5, r"4 axes"),
        ((..., 0, ...), r"4 axes"),
        ((0, 0, 0, 0, [0]), r"4 axes \(batch, head, query, key\)"),
        ([0, 2], r"batch 2 .*there are 2"),
        ((0, [3]), r"head 3 .*there are 3"),
        (torch.tensor([0, 2]), r"batch 2 .*there are 2"),
        ((None, 0, torch.tensor([[0, -4]])), r"head -4 .*there are 3"),
        (([0, 1], ..., np.array([0, 17])), r"key 17 .*there are 17"),
        ((torch.tensor([True, False]), [0, 3]), r"head 3 .*there are 3"),
    ],
    ids=str,
)
def test_an_index_that_does_not_fit_is_an_index_error_that_says_why(kind: str, index: Any, message: str) -> None:
    with pytest.raises(IndexError, match=message):
        map_and_whole(kind)[0][index]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("index", [slice(None, None, -1), (..., slice(5, 0, -1)), (0, 0, slice(None, None, -2))], ids=str)
def test_negative_steps_are_refused_as_tensors_refuse_them(kind: str, index: Any) -> None:
    with pytest.raises(ValueError, match="step must be greater than zero"):
        map_and_whole(kind)[0][index]


@pytest.mark.parametrize("kind", KINDS)
def test_a_map_has_a_length_and_gives_its_images_one_by_one(kind: str) -> None:
    m, whole = map_and_whole(kind)
    assert len(m) == 2
    torch.testing.assert_close(torch.stack(list(m)), whole, rtol=1e-5, atol=1e-6)


# What it costs


TOKENS, HEADS = 300, 4
PAIRS = TOKENS * TOKENS


@pytest.fixture
def long() -> AttentionMap:
    """A map of one image, 4 heads and 300 tokens, far larger than what it is computed from."""
    attn, x = Attention(8, num_heads=HEADS), torch.randn(1, TOKENS, 8)
    with AttentionRecorder(attn) as rec, torch.no_grad():
        attn(x)
    m = rec.maps[0]
    with Largest() as shapes:
        assert m.shape == (1, HEADS, TOKENS, TOKENS)
    assert shapes.elements < PAIRS
    return m


@pytest.mark.parametrize(
    ("index", "rows"),
    [
        ((slice(None), slice(None), 0), HEADS),
        ((0, 0, 5), 1),
        ((..., 7, slice(None)), HEADS),
        ((0, slice(None), slice(3, 6)), 3 * HEADS),
        ((0, -1, -1, slice(2, None)), 1),
        ((0, 0, 0, 0), 1),
        ((0, 0, slice(None, None, 100)), 3),
    ],
    ids=str,
)
def test_a_row_is_read_without_forming_the_map(long: AttentionMap, index: Any, rows: int) -> None:
    with Largest() as read:
        long[index]
    assert read.elements <= max(rows * TOKENS, 2 * TOKENS * 8)  # the rows themselves, or queries and keys


def test_a_head_is_read_without_forming_the_others(long: AttentionMap) -> None:
    with Largest() as read:
        long[:, 1]
    assert read.elements == PAIRS
    with Largest() as read:
        long[...]
    assert read.elements == HEADS * PAIRS


def test_images_are_read_one_at_a_time() -> None:
    attn, x = Attention(8, num_heads=1), torch.randn(5, 100, 8)
    with AttentionRecorder(attn) as rec, torch.no_grad():
        attn(x)
    with Largest() as read:
        rec.maps[0][3]
    assert read.elements == 100 * 100


def test_recording_forms_no_map() -> None:
    attn, x = Attention(8, num_heads=HEADS), torch.randn(1, TOKENS, 8)
    with torch.no_grad():
        with Largest() as plain:
            attn(x)
        with AttentionRecorder(attn), Largest() as recorded:
            attn(x)
    assert recorded.elements == plain.elements < PAIRS
