"""`rec.rows(query)` is the row of a query in every map, in whichever window it stands; shapes that are remembered are right."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from support.inside import own_registers
from support.models import randomise, tiny
from support.oracle import unfused
from timm.layers import Attention
from torch import Tensor, nn

from hookattn import QK, AttentionRecorder, NoMapError, TokenError, project, recipe


@torch.no_grad()
def recorded(model: nn.Module, x: Tensor, **options: Any) -> AttentionRecorder:
    with AttentionRecorder(model, **options) as rec:
        model(x)
    return rec


def softmaxes(model: nn.Module, x: Tensor) -> list[Tensor]:
    with torch.no_grad(), unfused(model) as maps:
        model(x)
    return maps


@pytest.mark.parametrize("keep", ["inputs", "maps"])
@pytest.mark.parametrize(
    ("query", "row"), [("cls", 0), ("reg1", 2), ((1, 3), 5 + 1 * 4 + 3), ((0.99, 0.0), 5 + 3 * 4), (7, 7), (-1, -1)]
)
def test_rows_of_all_layers_are_those_of_the_softmaxes(query: Any, row: int, keep: Any) -> None:
    model, x = tiny("vit_registers")
    rec = recorded(model, x, keep=keep)
    assert rec.maps[0].tokens.prefix == ("cls", "reg0", "reg1", "reg2", "reg3")
    rows = rec.rows(query)
    assert list(rows) == list(rec.maps)
    for got, whole in zip(rows.values(), softmaxes(model, x), strict=True):
        torch.testing.assert_close(got, whole[:, :, row], rtol=0, atol=1e-6)


@pytest.mark.parametrize("place", [(0, 0), (3, 4), (7, 7), (2, 6)])
def test_in_windows_it_is_the_row_of_the_window_that_the_query_is_in(place: tuple[int, int]) -> None:
    options: dict[str, Any] = {"embed_dim": 12, "depths": (2,), "num_heads": (2,), "window_size": 4, "img_size": 32}
    model, x = randomise(timm.create_model("swin_tiny_patch4_window7_224", **options)).eval(), torch.randn(3, 3, 32, 32)
    rows = recorded(model, x).rows(place)
    for (got, whole), shift in zip(zip(rows.values(), softmaxes(model, x), strict=True), (0, 2)):
        row, column = ((side - shift) % 8 for side in place)
        window, inside = row // 4 * 2 + column // 4, row % 4 * 4 + column % 4
        torch.testing.assert_close(got, whole[window::4, :, inside], rtol=0, atol=1e-6)


@pytest.mark.parametrize("query", ["mean", "reg0", (9, 0), 17, (1.5, 0.0)])
def test_a_query_that_is_no_row_is_told(query: Any) -> None:
    model, x = tiny("vit")
    rec = recorded(model, x)
    with pytest.raises(TokenError, match="query"):
        rec.rows(query)


def test_nothing_recorded_has_no_rows() -> None:
    with AttentionRecorder(tiny("vit")[0]) as rec, pytest.raises(NoMapError):
        rec.rows()


def test_rows_go_where_the_recorder_brings_slices() -> None:
    model, x = tiny("vit")
    assert {row.dtype for row in recorded(model, x, dtype=torch.float16).rows().values()} == {torch.float16}


class Shrinking(Attention):  # type: ignore[misc]
    """Looks at so many tokens only, as a number and a parameter say."""

    most = 9

    def __init__(self) -> None:
        super().__init__(16, 4)
        self.most, self.more = 9, nn.Parameter(torch.zeros(1, 2, 16))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.cat((x[:, : self.most], self.more.expand(len(x), -1, -1)), 1))  # type: ignore[no-any-return]


def test_a_shape_that_is_remembered_is_that_of_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    own_registers(monkeypatch)

    @recipe(Shrinking)
    def shrinking(self: Any, x: Tensor) -> QK:
        x = torch.cat((x[:, : self.most], self.more.expand(len(x), -1, -1)), 1)
        q, k = project(self.qkv, x, "b n (parts h d) -> parts b h n d", parts=2, of=3, h=self.num_heads)
        return QK(q, k)

    model = Shrinking().eval()

    def shape(x: Tensor) -> tuple[int, ...]:
        m = recorded(model, x).maps[0]
        assert m.shape == m[...].shape  # asked for before it is computed
        return m.shape

    x = torch.randn(2, 12, 16)
    assert shape(x) == shape(x) == (2, 4, 11, 11)
    assert shape(x[:1, :5]) == (1, 4, 7, 7)
    model.most = 7
    assert shape(x) == (2, 4, 9, 9)
    model.more = nn.Parameter(torch.zeros(1, 4, 16))
    assert shape(x) == (2, 4, 11, 11)
    assert recorded(model.double(), x.double()).maps[0].dtype == torch.float64


class Keeping(nn.Module):
    """Attends to the first places of a grid, how many is given in a tuple and in a list, and fills a cache of biases."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.biases = Attention(16, 4), dict[str, Tensor]()

    def forward(self, x: Tensor, size: tuple[int, int], more: list[int | tuple[int, ...]]) -> Tensor:
        self.biases.setdefault("here", torch.zeros(x.shape[1]))
        return self.inner(x[:, : size[0] * size[1] + more[0]])  # type: ignore[no-any-return, operator]


@torch.no_grad()
def test_a_shape_is_remembered_of_grids_lists_and_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    own_registers(monkeypatch)
    asked = []

    @recipe(Keeping)
    def keeping(self: Any, x: Tensor, size: tuple[int, int], more: list[Any]) -> QK:
        asked.append(size)
        x = x[:, : size[0] * size[1] + more[0]]
        return QK(*project(self.inner.qkv, x, "b n (parts h d) -> parts b h n d", parts=2, of=3, h=4))

    model, x = nn.Sequential(Keeping()).eval(), torch.randn(2, 12, 16)
    model.forward = lambda *given: model[0](*given)  # type: ignore[method-assign]

    def shape(*given: Any) -> tuple[tuple[int, ...], int]:
        with AttentionRecorder(model, layers=["0"]) as rec:
            model(x, *given)
        asked.clear()
        return rec.maps[0].shape, len(asked)

    assert shape((2, 3), [1, (0, 1)]) == ((2, 4, 7, 7), 1)
    assert shape((2, 3), [1, (0, 1)]) == ((2, 4, 7, 7), 1)  # the cache is filled by now, as it was not before
    assert shape((2, 3), [1, (0, 1)]) == ((2, 4, 7, 7), 0)
    assert shape((2, 2), [1, (0, 1)]) == ((2, 4, 5, 5), 1)
    assert shape((2, 3), [2, (0, 1)]) == ((2, 4, 8, 8), 1)
    assert shape((2, 2), [1, (0, 1)]) == shape((2, 2), [1, (0, 1)]) == ((2, 4, 5, 5), 0)
    model[0].biases["there"] = x
    assert shape((2, 2), [1, (0, 1)]) == ((2, 4, 5, 5), 1)
    assert shape((2, 2), [1, object()]) == shape((2, 2), [1, object()]) == ((2, 4, 5, 5), 1)  # whatever that is
