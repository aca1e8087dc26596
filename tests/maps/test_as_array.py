"""Maps, gradients, queries, keys and values in the hands of torch, numpy and DLPack: read first, or refused with m[...]."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.models import tiny

from hookattn import AttentionMap, AttentionRecorder

READ: dict[str, Callable[[Any], Any]] = {
    "mean": lambda m: torch.mean(m, 1),
    "stack": lambda m: torch.stack([m, m]),
    "cat": lambda m: torch.cat((m, m), dim=1),
    "einsum": lambda m: torch.einsum("b h q k -> b q", m),
    "interpolate": lambda m: F.interpolate(m, scale_factor=2.0),
    "as_tensor": torch.as_tensor,
    "tensor": torch.tensor,
    "asarray": torch.asarray,
    "from_dlpack": torch.from_dlpack,
    "to double": lambda m: torch.as_tensor(m, dtype=torch.float64),
    "matmul": lambda m: m @ torch.ones(m.shape[3], 2),
    "matmul from the right": lambda m: torch.ones(2, m.shape[2]) @ m,
    "times": lambda m: m * 2,
    "times from the left": lambda m: 2 * m,
    "less": lambda m: 1 - m,
    "difference": lambda m: m - m,
    "quotient": lambda m: m / 3,
    "sum": lambda m: 1 + m + torch.ones(()),
    "power": lambda m: m**2,
    "negative": operator.neg,
    "absolute": abs,
    "compared": lambda m: [m > 0.1, m >= 0.1, m < 0.1, m <= 0.1],
    "in": lambda m: [0.123 in m, float(m[...][0, 0, 0, 0]) in m],
    "list": list,
}
OF_NUMPY: dict[str, Callable[[Any], Any]] = {
    "asarray": np.asarray,
    "array": lambda m: np.array(m, dtype=np.float16),
    "array, a copy": lambda m: np.array(m, copy=True),
    "mean": lambda m: np.mean(m, axis=1),
    "times from the left": lambda m: np.ones(m.shape[3]) * m,
    "numpy from_dlpack": np.from_dlpack,
}
PARTS = ["", "gradient", "q", "k", "v"]


@pytest.fixture(scope="module")
def m() -> AttentionMap:
    model, x = tiny("vit")
    with AttentionRecorder(model, gradients=True) as rec:
        model(x).square().sum().backward()
    return rec.maps[0]


def same(found: Any, expected: Any) -> bool:
    if isinstance(expected, list):
        return len(found) == len(expected) and all(map(same, found, expected))
    if isinstance(expected, np.ndarray):
        return type(found) is np.ndarray and found.dtype == expected.dtype and np.array_equal(found, expected)
    return type(found) is type(expected) and bool(torch.as_tensor(found == expected).all())


@pytest.mark.filterwarnings("ignore:To copy construct from a tensor")  # what torch says of the tensor that we compare with
@pytest.mark.parametrize("use", READ.values(), ids=READ)
@pytest.mark.parametrize("part", PARTS)
def test_what_torch_makes_of_a_map_is_what_it_makes_of_the_tensor(m: Any, use: Callable[[Any], Any], part: str) -> None:
    array = getattr(m, part) if part else m
    assert same(use(array), use(array[...]))


@pytest.mark.parametrize("use", OF_NUMPY.values(), ids=OF_NUMPY)
@pytest.mark.parametrize("part", PARTS)
def test_what_numpy_makes_of_a_map_is_what_it_makes_of_the_array(m: Any, use: Callable[[Any], Any], part: str) -> None:
    array = getattr(m, part) if part else m
    assert same(use(array), use(array[...].numpy()))
    assert same(array.numpy(), array[...].numpy())


@pytest.mark.parametrize(
    "use", [np.asarray, torch.as_tensor, torch.tensor, torch.from_dlpack, torch.relu], ids=lambda f: f.__name__
)
def test_it_is_read_as_a_whole_and_once(m: AttentionMap, use: Callable[[Any], Any]) -> None:
    with mock.patch.object(AttentionMap, "read", autospec=True, side_effect=AttentionMap.read) as read:
        use(m)
    assert [each.args[1:] for each in read.mock_calls] == [(...,)]


def test_all_maps_of_a_recorder_are_stacked(m: AttentionMap) -> None:
    model, x = tiny("vit")
    with AttentionRecorder(model) as rec, torch.no_grad():
        model(x)
    assert torch.equal(torch.stack(list(rec.maps.values())), torch.stack([each[...] for each in rec.maps.values()]))


@pytest.mark.parametrize(
    ("habit", "typed"), [("mean", "mean(...)"), ("T", "T"), ("cpu", "cpu(...)"), ("detach", "detach(...)")]
)
def test_a_method_of_tensors_is_answered_with_what_to_type(m: Any, habit: str, typed: str) -> None:
    with pytest.raises(AttributeError, match=r"AttentionMap has no .*: read it first, m\[\.\.\.\]\.") as raised:
        getattr(m, habit)
    assert str(raised.value).endswith(f"m[...].{typed}")


def test_other_attributes_that_are_missing_are_answered_as_always(m: Any) -> None:
    for name in ("nonsense", "__array_interface__"):
        with pytest.raises(AttributeError, match=f"'AttentionMap' object has no attribute '{name}'"):
            getattr(m, name)
    broken = mock.patch.object(AttentionMap, "call", property(lambda _: {}.nothing))  # type: ignore[attr-defined]
    with broken, pytest.raises(AttributeError, match="'dict' object has no attribute 'nothing'"):
        m.x  # noqa: B018


def test_writing_into_a_map_is_refused(m: Any) -> None:
    with pytest.raises(TypeError, match="nothing is written into AttentionMap"):
        torch.add(torch.ones(1), 1, out=m)


def test_a_view_that_is_no_copy_is_refused(m: AttentionMap) -> None:
    with pytest.raises(ValueError, match="leave copy=False out"):
        np.array(m, copy=False)


def test_a_map_is_true_and_itself_and_goes_by_image(m: Any) -> None:
    with mock.patch.object(AttentionMap, "read", side_effect=AssertionError("is computed")):
        assert m
        assert m == m
        assert m != 0
        assert {m: 1}[m] == 1
        images = iter(m)
    assert torch.equal(next(images), m[0])
    assert len(list(images)) == len(m) - 1


def test_bfloat16_which_numpy_has_not_comes_as_float32() -> None:
    model, x = tiny("vit")
    with AttentionRecorder(model, dtype=torch.bfloat16) as rec, torch.no_grad():
        model(x)
    assert same(np.asarray(rec.maps[0]), rec.maps[0][...].float().numpy())


@pytest.mark.parametrize("use", [torch.as_tensor, np.asarray, np.from_dlpack])
def test_a_graph_is_not_cut_off_unseen(use: Callable[[Any], Any]) -> None:
    model, x = tiny("vit")
    with AttentionRecorder(model, detach=False) as rec:
        model(x)
    with pytest.raises((RuntimeError, BufferError), match="detach"):
        use(rec.maps[0])
    assert torch.mean(rec.maps[0], 1).requires_grad  # type: ignore[call-overload]
