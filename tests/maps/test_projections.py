"""Projections that are computed when they are needed are those that the layer makes, however it packs them."""

from __future__ import annotations

from itertools import permutations, product

import pytest
import torch
from einops import rearrange
from support.inside import Projected
from support.models import tiny
from support.reading import record
from torch import nn

from hookattn import project

HEADS = slice(None), slice(1, 3), torch.tensor([3, 0])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("order", [*permutations(["parts", "h", "d"])], ids=" ".join)
@pytest.mark.parametrize("axes", [{"h": 4}, {"d": 3}, {"h": 4, "d": 3}], ids=str)
@torch.no_grad()
def test_each_part_is_that_of_the_layer_whole_or_cut(order: tuple[str, ...], axes: dict[str, int], bias: bool) -> None:
    layer, x = nn.Linear(8, 3 * 4 * 3, bias=bias).double(), torch.randn(2, 5, 8).double()
    pattern = f"b n ({' '.join(order)}) -> parts b h n d"
    for got, expected in zip(project(layer, x, pattern, parts=2, of=3, **axes), rearrange(layer(x), pattern, parts=3, **axes)):
        assert isinstance(got, Projected)
        assert got.shape == expected.shape
        # one token, a few, many: of one image, of both
        for batch, heads, tokens in product((slice(1, None), slice(None)), HEADS, (slice(4, None), slice(2, 4), slice(5))):
            part = expected[batch, heads, tokens]
            torch.testing.assert_close(got.compute_part(batch, heads, tokens), part, rtol=0, atol=1e-12)
            torch.testing.assert_close(got.narrowed(batch, heads) * 1, expected[batch, heads], rtol=0, atol=1e-12)
        torch.testing.assert_close(got * 1, expected, rtol=0, atol=1e-12)
        by_head = torch.einsum("b n c, h d c -> b h n d", x, got.weight)
        by_head = by_head if got.bias is None else by_head + got.bias[:, None]
        torch.testing.assert_close(by_head, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("axes", [{"h": 5}, {"d": 5}, {"h": 4, "d": 4}, {"h": 3, "d": 3}], ids=str)
def test_a_layer_that_makes_something_else_is_told(axes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="36 features, which cannot be divided"):
        project(nn.Linear(8, 36), torch.randn(2, 5, 8), "b n (parts h d) -> parts b h n d", parts=2, of=3, **axes)


@pytest.mark.parametrize("packed", [True, False])
@torch.no_grad()
def test_a_projection_is_computed_in_the_autocast_that_it_was_made_in(packed: bool) -> None:
    layer, x = nn.Linear(8, 12), torch.randn(2, 5, 8)

    def make() -> Projected:
        if not packed:
            return Projected(x, rearrange(layer.weight, "(h d) c -> h d c", h=4), rearrange(layer.bias, "(h d) -> h d", h=4))
        (made,) = project(layer, x, "b n (parts h d) -> parts b h n d", parts=1, of=1, h=4)
        assert isinstance(made, Projected)
        return made

    outside = make()
    with torch.autocast("cpu", torch.bfloat16):
        inside = make()
        assert outside.dtype == outside.compute().dtype == torch.float32
    assert inside.dtype == inside.compute().dtype == torch.bfloat16
    assert outside.compute_part(slice(1), slice(1), slice(1)).dtype == torch.float32


def test_slices_go_to_the_device_that_was_asked_for() -> None:
    m = record(*tiny("vit"), device="meta").maps[0]
    assert m[:, :, 0].device.type == m[...].device.type == m.rows().device.type == "meta"
