"""NaN, closed rows, nothing at all, odd strides: any part of any map is that part of the definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import reference
from support.inside import own_registers
from support.models import randomise, some, tiny
from support.oracle import own_map, unfused
from support.reading import maps_of
from timm.layers import Attention
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from hookattn import QK, AttentionRecorder, recipe
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
    with AttentionRecorder(attn) as rec, unfused(attn) as expected:
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

    qk, expected, index = case

    class Given(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    with pytest.MonkeyPatch.context() as patch:
        own_registers(patch)
        recipe(Given)(lambda self, x: qk)
        module = Given()
        with AttentionRecorder(module, lambda _, m: True) as rec:
            module(torch.zeros(1))
        m = rec.maps[0]
        got, wanted = result(m, index), result(expected, index)
        assert m.dtype == (torch.float64 if qk.q.dtype == torch.float64 else torch.float32)
    if isinstance(got, Tensor) and isinstance(wanted, Tensor):
        torch.testing.assert_close(got.double(), wanted, rtol=0, atol=1e-12 if m.dtype == torch.float64 else 2e-6)
    else:
        assert got is wanted


# Words that mean nothing


@pytest.mark.parametrize("name", ["beit", "levit"])
def test_a_nan_in_an_image_is_in_the_maps_of_that_image_and_of_no_other(name: str) -> None:
    model, x = some(name)
    x[0, 0, 0, 0] = torch.nan
    with AttentionRecorder(model) as rec, torch.no_grad():
        model(x)
    assert rec.maps[0][0].isnan().any()
    for m in rec.maps.values():
        assert not m[1].isnan().any()
        m.verify()


def test_a_nan_that_a_mask_leaves_open_stays_and_one_it_closes_goes() -> None:
    attn, x = Attention(48, num_heads=3), torch.randn(1, 4, 48)
    x[0, 3] = torch.nan
    mask = torch.ones(4, 4, dtype=torch.bool)
    mask[:2, 3] = False
    with AttentionRecorder(attn) as rec, torch.no_grad():
        attn(x, mask)
    got = rec.maps[0][0, 0]
    assert not got[:2].isnan().any()
    assert got[2:].isnan().all()


def test_x_is_the_first_argument_whatever_the_order_of_the_call() -> None:
    attn = Attention(16, 4).eval()
    x, mask = torch.randn(2, 5, 16), torch.zeros(5, 5)
    with AttentionRecorder(attn) as rec:
        attn(attn_mask=mask, x=x)
    assert torch.equal(rec.maps[0].x, x)


@pytest.mark.parametrize("keep", ["inputs", "maps"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtype_is_what_slices_come_in(keep: Any, dtype: torch.dtype) -> None:
    model, x = tiny("vit")
    expected = maps_of(model, x)
    with AttentionRecorder(model, keep=keep, dtype=dtype) as rec, torch.no_grad():
        model(x)
    for name, m in rec.maps.items():
        assert m.dtype == m[...].dtype == m[0, 0, 0].dtype == m.image().dtype == dtype
        assert torch.equal(m[...], expected[name].to(dtype))


@pytest.mark.parametrize("keep", ["inputs", "maps"])
def test_device_is_where_slices_go(keep: Any) -> None:
    model, x = tiny("vit")
    with AttentionRecorder(model, keep=keep, device="meta") as rec, torch.no_grad():
        model(x)
    for m in rec.maps.values():
        assert m.device == m[...].device == m[0, 0, 0].device == m.image().device == torch.device("meta")
        assert m.shape == m[...].shape == (2, 3, 17, 17)


@pytest.mark.parametrize("keep", ["inputs", "maps"])
def test_detach_false_leaves_maps_in_the_graph_with_the_gradient_of_the_unfused_computation(keep: Any) -> None:
    model, x = tiny("vit")
    model.double()
    images = x.double().requires_grad_()
    with AttentionRecorder(model, keep=keep, detach=False) as rec:
        model(images)
    m = rec.maps["blocks.1.attn"]
    net: Any = model
    features = net.blocks[0](net.norm_pre(net._pos_embed(net.patch_embed(images))))
    expected = own_map(net.blocks[1].attn, net.blocks[1].norm1(features))
    wanted = [images, *model.parameters()]
    for index in (..., (0, slice(None), 0)):
        got, own = (
            torch.autograd.grad(
                attention[index].square().sum(), wanted, retain_graph=True, allow_unused=True, materialize_grads=True
            )
            for attention in (m, expected)
        )
        torch.testing.assert_close(got, own, rtol=1e-9, atol=1e-12)
        assert got[0].abs().max() > 0


@pytest.mark.parametrize("keep", ["inputs", "maps"])
@pytest.mark.parametrize("detach", [True, False])
def test_detach_decides_whether_anything_of_a_map_requires_grad(keep: Any, detach: bool) -> None:
    model, x = tiny("vit")
    with AttentionRecorder(model, keep=keep, detach=detach) as rec:
        model(x)
    m = rec.maps[1]
    assert m[...].requires_grad is m[0, 0].requires_grad is m.image().requires_grad is not detach
    if keep == "inputs":
        assert m.x.requires_grad is not detach
