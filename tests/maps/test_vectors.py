"""Queries, keys and values are those that reach the kernel, laid where they lie; only what is asked for is computed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from support.models import ANY_DTYPE, TINY, B, C, D, H, N, plain, randomise
from support.modes import operations_of
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hookattn import AttentionRecorder, RecorderError, StaleMapError, UnreadableError


class Kernel(TorchFunctionMode):
    """Notes what reaches `scaled_dot_product_attention`."""

    def __init__(self) -> None:
        super().__init__()
        self.given: list[tuple[Tensor, ...]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            named = {**dict(zip(("query", "key", "value"), args)), **(kwargs or {})}
            self.given.append((named["query"], named["key"], named["value"]))
        return func(*args, **(kwargs or {}))


def recorded(model: nn.Module, x: Tensor) -> tuple[Any, list[tuple[Tensor, ...]]]:
    with torch.no_grad():
        with Kernel() as kernel:
            model(x)
        with AttentionRecorder(model) as rec:
            model(x)
    return rec.maps, kernel.given


def for_each_head(t: Tensor, heads: int) -> Tensor:
    return t.repeat_interleave(heads // t.shape[1], dim=1)


@pytest.mark.parametrize("name", [name for name in ANY_DTYPE if not name.startswith("differential")])
def test_they_are_those_that_reach_the_kernel(name: str) -> None:
    torch.manual_seed(0)
    model, options, size = TINY[name]
    maps, given = recorded(
        randomise(timm.create_model(model, **options)).eval().double(), torch.randn(2, 3, size, size).double()
    )
    assert len(maps) == len(given)
    for m, tensors in zip(maps.values(), given):
        for vectors, tensor in zip((m.q, m.k, m.v), tensors):
            expected = for_each_head(tensor, m.shape[1])
            assert vectors.shape == expected.shape
            assert vectors.dtype == torch.float64
            torch.testing.assert_close(vectors[...], expected)
            torch.testing.assert_close(vectors[1, -1, 3:, ::2], expected[1, -1, 3:, ::2])


class Own(nn.Module):
    """Attention of nobody's, that multiplies by hand."""

    def __init__(self, change: Callable[[Tensor], Tensor] = lambda a: a) -> None:
        super().__init__()
        self.qkv, self.change = nn.Linear(12, 36), change
        self.out = nn.Parameter(torch.randn(12, 12))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 6)).permute(2, 0, 3, 1, 4)
        a = self.change((q @ k.mT).softmax(-1))
        return (a @ v).transpose(1, 2).flatten(2) @ self.out  # a product of matrices that is none of the map's


def test_values_that_are_multiplied_by_hand_are_found() -> None:
    model, x = randomise(Own()).double(), torch.randn(3, 5, 12).double()
    with AttentionRecorder(model) as rec, torch.no_grad():
        model(x)
    expected = model.qkv(x).unflatten(-1, (3, 2, 6)).permute(2, 0, 3, 1, 4)[2]
    torch.testing.assert_close(rec.maps[0].v[...], expected)
    with pytest.raises(UnreadableError, match="does not show queries and keys"):
        rec.maps[0].k[...]


def test_values_of_a_map_that_is_changed_first_are_those_of_what_it_is_changed_to() -> None:
    model, x = randomise(Own(lambda a: a.flip(1) * 2)).double(), torch.randn(3, 5, 12).double()
    with AttentionRecorder(model) as rec, torch.no_grad():
        model(x)
    expected = model.qkv(x).unflatten(-1, (3, 2, 6)).permute(2, 0, 3, 1, 4)[2]
    torch.testing.assert_close(rec.maps[0].v[...], expected)


def test_no_more_is_projected_than_what_is_asked_for() -> None:
    with AttentionRecorder(model := plain()) as rec, torch.no_grad():
        model(torch.randn(B, N, C).double())
    assert operations_of(lambda: rec.maps[0].k[:, 1, 0]) == B * 2 * C * D
    assert operations_of(lambda: rec.maps[0].q[...]) == B * N * 2 * C * D * H
    assert operations_of(lambda: rec.maps[0].k.shape) == 0


def test_what_is_stale_or_let_go_is_not_read() -> None:
    model = plain()
    with AttentionRecorder(model) as rec, torch.no_grad():
        model(torch.randn(B, N, C).double())
    with torch.no_grad():
        next(model.parameters()).add_(1)
    for which in "qkv":
        with pytest.raises(StaleMapError):
            getattr(rec.maps[0], which)[...]
    with AttentionRecorder(model, keep="maps") as rec, torch.no_grad():
        model(torch.randn(B, N, C).double())
    with pytest.raises(RecorderError, match='keep="inputs"'):
        rec.maps[0].k[...]


@pytest.mark.parametrize("name", ["vit_small_patch16_224", "swin_tiny_patch4_window7_224", "hiera_tiny_224"])
def test_pictures_have_each_vector_where_its_token_lies(name: str) -> None:
    sizes: dict[str, Any] = {
        "vit_small_patch16_224": {"img_size": 64, "embed_dim": 24, "num_heads": 3, "depth": 1},
        "swin_tiny_patch4_window7_224": {"img_size": 64, "window_size": 4, "embed_dim": 24, "depths": (2,), "num_heads": (3,)},
        "hiera_tiny_224": {"img_size": 64, "embed_dim": 24, "stages": (1, 1, 1, 1)},
    }
    torch.manual_seed(0)
    model = timm.create_model(name, **sizes[name]).eval()
    with AttentionRecorder(model) as rec, torch.no_grad():
        model(torch.randn(2, 3, 64, 64))
    for m in rec.maps.values():
        for vectors, tokens in ((m.q, m.query_tokens), (m.k, m.tokens), (m.v, m.tokens)):
            laid, given = vectors.image(), vectors[...]
            assert laid.shape == (2, given.shape[1] * given.shape[3], *tokens.grid_size)
            window = tokens.windows - 1
            place = int(tokens.patches[0, window, 2])
            at = divmod(place, tokens.grid_size[1])
            expected = given[tokens.windows + window, :, tokens.num_prefix_tokens + 2].flatten()
            torch.testing.assert_close(laid[1, :, at[0], at[1]], expected)


def test_they_are_in_the_graph_where_maps_are() -> None:
    model = plain()
    with AttentionRecorder(model, detach=False) as rec:
        model(x := torch.randn(B, N, C).double().requires_grad_())
    for vectors in (rec.maps[0].q, rec.maps[0].k, rec.maps[0].v):
        (grad,) = torch.autograd.grad(vectors[...].sum(), x)
        assert grad.abs().sum() > 0
