"""What the tokens of a map stand for, and what a query attends to as a picture."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.inside import read_in_chunks
from support.models import tiny
from support.modes import Largest
from support.reading import record
from torch import nn

from hookattn import AttentionMap, AttentionRecorder, TokenError


def first_map(name: str, size: tuple[int, int] | None = None, **overrides: Any) -> AttentionMap:
    """The first map of a tiny model, of images of its own size or another."""
    model, x = tiny(name, **overrides)
    return record(model, x if size is None else torch.randn(2, 3, *size)).maps[0]


# Prefix tokens and grids


@pytest.mark.parametrize(
    ("name", "overrides", "prefix", "grid"),
    [
        ("vit", {}, ("cls",), (4, 4)),
        ("vit", {"class_token": False, "global_pool": "avg"}, (), (4, 4)),
        ("vit", {"reg_tokens": 2}, ("cls", "reg0", "reg1"), (4, 4)),
        ("vit", {"class_token": False, "reg_tokens": 1, "global_pool": "avg"}, ("reg0",), (4, 4)),
        ("vit_registers", {}, ("cls", "reg0", "reg1", "reg2", "reg3"), (4, 4)),
        ("deit_distilled", {}, ("cls", "dist"), (4, 4)),
        ("parallel", {}, ("reg0",), (4, 4)),
        ("rope_half", {}, ("cls", "reg0", "reg1", "reg2", "reg3"), (4, 4)),
        ("eva_fused", {}, ("cls",), (4, 4)),
        ("beit", {}, ("cls",), (4, 4)),
        ("relpos", {}, (), (4, 4)),
    ],
    ids=str,
)
def test_prefix_tokens_come_first_and_have_names(
    name: str, overrides: dict[str, Any], prefix: tuple[str, ...], grid: Any
) -> None:
    m = first_map(name, **overrides)
    tokens = m.tokens
    assert tokens.prefix == prefix
    assert tokens.num_prefix_tokens == len(prefix)
    assert tokens.grid_size == grid
    assert len(tokens) == m.shape[-1] == len(prefix) + grid[0] * grid[1]
    assert [tokens.index(each) for each in prefix] == list(range(len(prefix)))


@pytest.mark.parametrize("size", [(64, 96), (96, 32)])
@pytest.mark.parametrize("dynamic", [True, False])
def test_the_grid_is_that_of_the_image_and_not_always_square(size: tuple[int, int], dynamic: bool) -> None:
    overrides = {"dynamic_img_size": True} if dynamic else {"img_size": size}
    m = first_map("vit", size, **overrides)
    rows, columns = size[0] // 16, size[1] // 16
    assert m.tokens.grid_size == (rows, columns)
    assert m.image().shape == (2, rows, columns)
    for row in range(rows):
        for column in range(columns):
            assert m.tokens.index((row, column)) == 1 + row * columns + column


def test_the_grid_of_padded_images_counts_the_padded_patches() -> None:
    m = first_map("vit", (70, 40), dynamic_img_size=True, dynamic_img_pad=True)
    assert m.tokens.grid_size == (5, 3)
    assert m.image().shape == (2, 5, 3)


def test_where_no_image_was_seen_the_grid_is_that_of_the_model() -> None:
    model, _ = tiny("vit", img_size=(32, 64))
    with AttentionRecorder(model) as rec, torch.no_grad():
        model.blocks[0].attn(torch.randn(1, 9, 48))
    assert rec.maps[0].tokens.grid_size == (2, 4)


def test_a_model_inside_another_tells_the_tokens() -> None:
    model, x = tiny("vit_registers")
    m = record(nn.Sequential(model, nn.Identity()), x).maps[0]
    assert m.tokens.prefix == ("cls", "reg0", "reg1", "reg2", "reg3")
    assert m.tokens.grid_size == (4, 4)


# Queries


@pytest.fixture(scope="module")
def m() -> AttentionMap:
    """Class token, four registers, 2 x 3 patches: every axis of another length."""
    torch.manual_seed(0)
    m = first_map("vit_registers", (28, 42), img_size=(28, 42))
    assert m.shape == (2, 3, 11, 11)
    return m


QUERIES: dict[Any, int] = {
    "cls": 0,
    "reg0": 1,
    "reg3": 4,
    (0, 0): 5,
    (0, 2): 7,
    (1, 0): 8,
    (-1, -1): 10,
    (-2, 1): 6,
    0: 0,
    5: 5,
    10: 10,
    -1: 10,
    -11: 0,
}


@pytest.mark.parametrize("query", QUERIES, ids=str)
def test_a_query_is_a_row_over_the_patches_laid_out_on_the_grid(m: AttentionMap, query: Any) -> None:
    row = m[...][:, :, QUERIES[query], 5:]
    assert m.tokens.index(query) == QUERIES[query]
    torch.testing.assert_close(m.image(query, heads=None), row.reshape(2, 3, 2, 3))
    torch.testing.assert_close(m.image(query), row.mean(1).reshape(2, 2, 3))
    torch.testing.assert_close(m.image(query, heads="mean"), m.image(query))


def test_the_class_token_is_the_query_where_none_is_named(m: AttentionMap) -> None:
    assert torch.equal(m.image(), m.image("cls"))


def test_mean_is_the_mean_of_all_patch_queries(m: AttentionMap) -> None:
    expected = m[...][:, :, 5:, 5:].mean(2).reshape(2, 3, 2, 3)
    torch.testing.assert_close(m.image("mean", heads=None), expected)
    torch.testing.assert_close(m.image("mean"), expected.mean(1))


@pytest.mark.parametrize("head", [0, 2, -1, -3])
def test_a_head_is_picked_by_its_number(m: AttentionMap, head: int) -> None:
    assert m.image("reg1", heads=head).shape == (2, 2, 3)
    torch.testing.assert_close(m.image("reg1", heads=head), m[...][:, head, 2, 5:].reshape(2, 2, 3))


@pytest.mark.parametrize(("size", "pixels"), [(28, (28, 28)), ((28, 42), (28, 42)), ((1, 5), (1, 5))])
@pytest.mark.parametrize("heads", ["mean", None, 1])
def test_with_a_size_pixels_get_what_their_patch_has(m: AttentionMap, heads: Any, size: Any, pixels: tuple[int, int]) -> None:
    small = m.image("cls", heads=heads)
    channels = small if heads is None else small.unsqueeze(1)
    expected = F.interpolate(channels, pixels, mode="nearest-exact")
    torch.testing.assert_close(m.image("cls", heads=heads, size=size), expected if heads is None else expected[:, 0])


def test_a_picture_sums_to_what_is_not_given_to_prefix_tokens(m: AttentionMap) -> None:
    expected = 1 - m[...][:, :, 0, :5].sum(-1)
    torch.testing.assert_close(m.image(heads=None).sum((-2, -1)), expected)
    assert (expected < 0.999).all()


@pytest.mark.parametrize(
    "query", ["dist", "reg4", "patch", "", (2, 0), (0, 3), (-3, 0), (0,), (0, 0, 0), 11, -12, 1.5, None, True]
)
def test_a_query_that_is_not_there_is_refused_with_those_that_are(m: AttentionMap, query: Any) -> None:
    message = (
        r"There is: query='cls', query='reg0', .*query='reg3', query='mean' .*rows 0 to 1 and columns 0 to 2.*i from 0 to 10"
    )
    with pytest.raises(TokenError, match=message):
        m.image(query)


@pytest.mark.parametrize("heads", [3, -4, "max", 1.0, [0]], ids=str)
def test_heads_that_are_not_there_are_refused(m: AttentionMap, heads: Any) -> None:
    with pytest.raises(TokenError, match=r"heads=.* no choice: heads='mean', heads=None for all, or a number from 0 to 2"):
        m.image(heads=heads)


def test_without_a_class_token_the_message_names_what_there_is() -> None:
    m = first_map("vit", class_token=False, global_pool="avg")
    with pytest.raises(TokenError, match=r"no 'cls' token\. There is: no class token .*query='mean'.*query=\(row, col\)"):
        m.image()
    torch.testing.assert_close(m.image("mean"), m[...].mean((1, 2)).reshape(2, 4, 4))


# Means of many rows


@pytest.mark.parametrize("chunk", [1, 100, 500, 10**9])
@pytest.mark.parametrize("keep", ["inputs", "maps"])
def test_a_mean_is_the_same_however_many_rows_are_read_at_a_time(
    monkeypatch: pytest.MonkeyPatch, keep: Any, chunk: int
) -> None:
    model, x = tiny("vit_registers")
    m = record(model, x, keep=keep).maps[0]
    expected = m[...][:, :, 5:, 5:].mean(2).reshape(2, 3, 4, 4)
    read_in_chunks(monkeypatch, chunk)
    torch.testing.assert_close(m.image("mean", heads=None), expected)
    torch.testing.assert_close(m.image("mean", heads=1), expected[:, 1])


def test_a_mean_of_all_rows_does_not_form_the_map(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = tiny("vit", img_size=256, patch_size=16, embed_dim=12, depth=1, batch=1)
    m = record(model, torch.randn(1, 3, 256, 256)).maps[0]
    assert m.shape == (1, 3, 257, 257)
    read_in_chunks(monkeypatch, 3 * 257 * 10)
    with Largest() as read:
        m.image("mean")
    assert read.elements <= 3 * 257 * 10
