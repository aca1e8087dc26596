"""Hostile input: NaN, closed rows, nothing at all, odd strides, and words that mean nothing."""

from __future__ import annotations

from typing import Any

import pytest
import reference
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import randomise, tiny
from timm.layers import Attention
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from hookattn import QK, AttentionRecorder, LayerNotFoundError
from hookattn.analysis import rollout


def attention(dim: int = 16, heads: int = 4) -> Any:
    return randomise(Attention(dim, heads)).eval()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_shows_in_maps_pictures_and_rollouts_of_its_image_alone(value: float) -> None:
    model, x = tiny("vit")
    x[0, 0, 0, 0] = value
    with AttentionRecorder(model) as rec, torch.no_grad():
        output = model(x)
    m = rec.maps[1]
    found = [output, m[...], m.image(), m.image("mean"), m.image((0, 0), size=32), rollout(rec.maps)]
    assert [bool(t[0].isnan().any()) for t in found] == [True] * len(found)
    assert [bool(t[1].isfinite().all()) for t in found] == [True] * len(found)
    rec.verify()


@pytest.mark.parametrize("backend", [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION])
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_a_closed_row_is_what_the_kernels_make_of_it(kind: str, backend: SDPBackend) -> None:
    """With the identity for values, what a kernel puts out is its map."""
    attn, x = attention(32, 4), torch.randn(2, 8, 32)
    mask = torch.rand(8, 8) > 0.4
    mask[3] = False
    if kind == "float":
        mask = torch.randn(8, 8).masked_fill(~mask, -torch.inf)
    with AttentionRecorder(attn) as rec, torch.no_grad():
        attn(x, attn_mask=mask)
    q, k, _ = attn.qkv(x).reshape(2, 8, 3, 4, 8).permute(2, 0, 3, 1, 4)
    with sdpa_kernel(backend):
        expected = F.scaled_dot_product_attention(q, k, torch.eye(8).expand(2, 4, 8, 8), mask)
    torch.testing.assert_close(rec.maps[0][...], expected.detach(), rtol=0, atol=1e-6)
    assert bool((rec.maps[0][:, :, 3] == 0).all())


INPUTS = {
    "no images": lambda: torch.randn(0, 5, 16),
    "no tokens": lambda: torch.randn(2, 0, 16),
    "one token": lambda: torch.randn(2, 1, 16),
    "strided": lambda: torch.randn(16, 5, 4).permute(2, 1, 0)[::2],
    "expanded": lambda: torch.randn(1, 5, 16).expand(3, 5, 16),
    "channels last": lambda: torch.randn(2, 16, 4, 4).contiguous(memory_format=torch.channels_last).flatten(2).mT,
    "a leaf": lambda: torch.randn(2, 5, 16, requires_grad=True),
}


@pytest.mark.parametrize("heads", [1, 4, 16], ids="{} heads".format)
@pytest.mark.parametrize("name", INPUTS)
def test_an_odd_input_is_read_as_it_is_and_left_alone(name: str, heads: int) -> None:
    attn, x = attention(heads=heads), INPUTS[name]()
    with AttentionRecorder(attn) as rec, reference.unfused(attn) as expected:
        attn(x)
    m = rec.maps[0]
    torch.testing.assert_close(m[...], expected[0].detach(), rtol=0, atol=1e-6)
    assert m.shape == m[...].shape == expected[0].shape
    assert m.x.data_ptr() == x.data_ptr()
    assert m.x.stride() == x.stride()
    assert x.grad is None
    m.verify()


def test_a_batch_of_no_images_has_maps_pictures_and_rollouts_of_none() -> None:
    model, x = tiny("vit")
    with AttentionRecorder(model) as rec, torch.no_grad():
        model(x[:0])
    m = rec.maps[0]
    shapes = [t.shape for t in (m[...], m.image(), m.image("mean", size=8), rollout(rec.maps))]
    assert shapes == [(0, 3, 17, 17), (0, 4, 4), (0, 8, 8), (0, 17, 17)]
    assert rec.verify() == 0


SIZES = st.integers(1, 3)
ENTRY = st.integers(-4, 4) | st.builds(slice, *[st.none() | st.integers(-4, 4)] * 2, st.none() | st.integers(1, 3))


@st.composite
def cases(draw: st.DrawFn) -> tuple[QK, Tensor, Any]:
    """Queries and keys of any shape, dtype and mask; their map by the definition; an index that may or may not fit."""
    batch, heads, queries, keys, width = (draw(SIZES) for _ in range(5))
    dtype = draw(st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]))
    torch.manual_seed(draw(st.integers(0, 99)))
    q, k = (torch.randn(batch, heads, n, width).to(dtype) for n in (queries, keys))
    shape = tuple(draw(st.sampled_from([1, n])) for n in (batch, heads, queries)) + (keys,)
    bias = torch.randn(shape).to(dtype) if draw(st.booleans()) else None
    mask = torch.rand(shape) > 0.5 if draw(st.booleans()) else None
    causal = draw(st.booleans())
    scale = draw(st.none() | st.floats(0.1, 2))
    both = torch.ones(queries, keys, dtype=torch.bool).tril() if causal else None
    if mask is not None:
        both = mask if both is None else mask & both
    expected = reference.attention(q, k, width**-0.5 if scale is None else scale, bias, both)
    index = tuple(draw(st.lists(ENTRY, max_size=4)))
    return QK(q, k, scale=scale, bias=bias, mask=mask, is_causal=causal), expected, index


def result(of: Any, index: Any) -> Tensor | type[IndexError]:
    try:
        return of[index]
    except IndexError:
        return IndexError


@settings(max_examples=250, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(case=cases())
def test_any_part_of_any_map_is_that_part_of_the_definition_or_both_raise(case: tuple[QK, Tensor, Any]) -> None:
    from hookattn.recipes import registry

    qk, expected, index = case

    class Given(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    registry._RECIPES.register(lambda self, x: qk, Given)
    try:
        module = Given()
        with AttentionRecorder(module, lambda _, m: True) as rec:
            module(torch.zeros(1))
        m = rec.maps[0]
        got, wanted = result(m, index), result(expected, index)
        assert m.dtype == (torch.float64 if qk.q.dtype == torch.float64 else torch.float32)
    finally:
        del registry._RECIPES._facts[f"{Given.__module__}.{Given.__qualname__}"]
    if isinstance(got, Tensor) and isinstance(wanted, Tensor):
        torch.testing.assert_close(got.double(), wanted, rtol=0, atol=1e-12 if m.dtype == torch.float64 else 2e-6)
    else:
        assert got is wanted


# Words that mean nothing


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (1.5, "a float names nothing"),
        (True, "a bool names nothing"),
        ([0, False], "a bool names nothing"),
        ([None], "a NoneType names nothing"),
        (b"attn", "a bytes names nothing"),
        (slice(0, 1), "a slice names nothing"),
        (Attention, "the class Attention names nothing"),
        (nn.Identity(), "a Identity names nothing"),
        (torch.tensor([0, 1]), "a Tensor names nothing"),
        ("", "no attention module is called ''"),
        (lambda name, module: False, r"accepts none of blocks\.0\.attn, blocks\.1\.attn"),
    ],
    ids=str,
)
def test_layers_that_are_no_layers_are_refused_and_the_message_says_what_they_may_be(layers: Any, message: str) -> None:
    with pytest.raises(LayerNotFoundError, match=message):
        AttentionRecorder(tiny("vit")[0], layers)


@pytest.mark.parametrize("layers", [lambda name, module: True, 0, -1, "*", ["attn"]], ids=str)
def test_where_nothing_is_named_like_attention_layers_has_nothing_to_choose_from(layers: Any) -> None:
    with pytest.raises(LayerNotFoundError, match=r"nothing in Sequential is named like attention.*leave layers= out"):
        AttentionRecorder(nn.Sequential(nn.Linear(3, 3)), layers)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, "float16", float], ids=str)
def test_a_dtype_that_holds_no_probabilities_is_refused(dtype: Any) -> None:
    with pytest.raises(ValueError, match=r"holds no probabilities: dtype=torch\.float32"):
        AttentionRecorder(tiny("vit")[0], dtype=dtype)
