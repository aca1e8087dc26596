"""A partition or a layout of one's own in ten lines, proven by `check_recipe`, and answers to wrong ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from support.inside import own_registers, registry
from timm.models.volo import OutlookAttention
from torch import Tensor, nn

import hookattn
from hookattn import QK, TokenError, UnfaithfulMapError, UnreadableError, layout, partition, project, recipe
from hookattn.image import Geometry, Tokens, cut_windows, whole_grid
from hookattn.testing import check_recipe


class TheirAttention(nn.Module):
    """Attention inside of windows that somebody else has cut."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class TheirBlock(nn.Module):
    """A block that cuts windows, image by image or window by window."""

    def __init__(self, dim: int, *, window: int, shift: int, windows_first: bool = False) -> None:
        super().__init__()
        self.window, self.shift = window, shift
        self.batch = "(w1 w2 b)" if windows_first else "(b w1 w2)"
        self.attn = TheirAttention(dim, 4)

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = x.shape[1] // self.window, x.shape[2] // self.window
        x = x.roll((-self.shift, -self.shift), (1, 2))
        cut = f"b (w1 y) (w2 x) c -> {self.batch} (y x) c"
        sizes = {"y": self.window, "x": self.window, "w1": rows, "w2": columns}
        y = self.attn(rearrange(x, cut, y=self.window, x=self.window))
        back = rearrange(y, " -> ".join(reversed(cut.split(" -> "))), **sizes)
        return back.roll((self.shift, self.shift), (1, 2))


@pytest.fixture(autouse=True)
def _registries_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    own_registers(monkeypatch)


def test_windows_of_a_user_in_ten_lines(prove: Callable[..., int]) -> None:
    block, x = TheirBlock(16, window=2, shift=1), torch.randn(2, 4, 6, 16)
    with pytest.raises(UnreadableError, match=r"has no recipe; file one with .* @hookattn.partition"):
        check_recipe(block, x)

    @partition(TheirBlock)
    def their_windows(self: Any, geometry: Geometry) -> Tokens:
        _, rows, columns, _ = geometry.block_argument(self, "x")
        return cut_windows((rows, columns), self.window, self.shift)

    assert prove(block, x) == 2
    with hookattn.AttentionRecorder(block) as rec, torch.no_grad():
        block(x)
    picture = rec.maps["attn"].image((1, 1))
    assert picture.shape == (2, 4, 6)
    assert picture[0].nonzero().tolist() == [[1, 1], [1, 2], [2, 1], [2, 2]]
    torch.testing.assert_close(picture.sum((1, 2)), torch.ones(2))


def test_windows_that_do_not_come_image_by_image_are_caught() -> None:
    @partition(TheirBlock)
    def their_windows(self: Any, geometry: Geometry) -> Tokens:
        return cut_windows(geometry.block_argument(self, "x")[1:3], self.window, self.shift)

    with pytest.raises(UnfaithfulMapError, match="order than image by image, 6 windows each"):
        check_recipe(TheirBlock(16, window=2, shift=1, windows_first=True), torch.randn(2, 4, 6, 16))


def test_a_recipe_inside_of_a_block_is_checked_with_its_places(prove: Callable[..., int]) -> None:
    @partition(TheirBlock)
    def their_windows(self: Any, geometry: Geometry) -> Tokens:
        return cut_windows(geometry.block_argument(self, "x")[1:3], self.window, self.shift)

    block, x = TheirBlock(16, window=2, shift=1), torch.randn(2, 4, 6, 16)

    @recipe(TheirAttention)
    def without_a_bias(self: Any, x: Tensor) -> QK:
        q, k, _ = F.linear(x, self.qkv.weight).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return QK(q, k)

    with pytest.raises(UnfaithfulMapError, match="the map differs from what the module's own forward"):
        check_recipe(block, x)
    del registry._RECIPES._facts[registry.qualified_name(TheirAttention)]

    @recipe(TheirAttention)
    def theirs(self: Any, x: Tensor) -> QK:
        q, k = project(self.qkv, x, "b n (parts h d) -> parts b h n d", parts=2, of=3, h=self.num_heads)
        return QK(q, k)

    assert prove(block, x) == 2
    assert prove(TheirAttention(16, 4), torch.randn(2, 5, 16)) == 0  # nothing is said of places


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (None, r"the partition of .*TheirBlock returned a NoneType; return the Tokens .* hookattn.image.cut_windows\("),
        ((4, 6), "returned a tuple of int, int"),
        (whole_grid((4, 5)), r"sees 2 images as 12 pieces"),
        (cut_windows((4, 9), (2, 3)), r"has 4 queries and 4 keys, not the 6 and 6"),
    ],
    ids=str,
)
def test_a_partition_that_returns_something_else_is_answered(returned: Any, message: str) -> None:
    partition(TheirBlock)(lambda self, geometry: returned)
    with pytest.raises(hookattn.errors.LayoutError, match=message):
        check_recipe(TheirBlock(16, window=2, shift=1), torch.randn(2, 4, 6, 16))


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (
            whole_grid((2, 3)),
            "the layout of .*TheirAttention returned a Tokens; return two Tokens, of the queries and of the keys",
        ),
        ((whole_grid((2, 3)), 6), "returned a tuple of Tokens, int; return two"),
        ((whole_grid((2, 3)), cut_windows((2, 3), 1)), "queries in 1 windows and keys in 6"),
        ((whole_grid((2, 4)),) * 2, "has 6 queries and 6 keys, not the 8 and 8"),
    ],
    ids=["one", "a number", "two kinds", "too many"],
)
def test_a_layout_that_returns_something_else_is_answered(returned: Any, message: str) -> None:
    layout(TheirAttention)(lambda geometry, shape: returned)
    with pytest.raises(hookattn.errors.LayoutError, match=message):
        check_recipe(TheirAttention(16, 4), torch.randn(2, 6, 16))


def test_a_grid_that_is_nowhere_in_the_input_is_answered() -> None:
    partition(TheirBlock)(lambda self, geometry: cut_windows((6, 4), 2))
    with pytest.raises(TokenError, match="said to lie on a grid of 6 x 4, and TheirBlock was called with"):
        check_recipe(TheirBlock(16, window=2, shift=1), torch.randn(2, 4, 6, 16))


def test_places_that_a_layout_does_not_know_stay_unknown(prove: Callable[..., int]) -> None:
    @layout(TheirAttention)
    def unknown(geometry: Geometry, shape: Any) -> tuple[Tokens, Tokens]:
        raise TokenError("they are shuffled")

    recipe(TheirAttention)(lambda self, x: QK(*self.qkv(x).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)[:2]))
    assert prove(TheirAttention(16, 4), torch.randn(2, 5, 16)) == 0


def test_an_argument_that_a_forward_does_not_have_is_answered() -> None:
    partition(TheirBlock)(lambda self, geometry: geometry.block_argument(self, "size"))
    with pytest.raises(hookattn.errors.LayoutError, match=r"TheirBlock.forward has no parameter 'size', only x\."):
        check_recipe(TheirBlock(16, window=2, shift=1), torch.randn(2, 4, 6, 16))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TheirBlock(4, window=2, shift=0), "call it with a grid whose rows, columns and channels differ"),
        (lambda: nn.Sequential(TheirBlock(16, window=2, shift=0), TheirBlock(16, window=2, shift=1)), None),
        (
            lambda: nn.Sequential(
                nn.Flatten(1, 2), nn.Linear(16, 16), nn.Unflatten(1, (4, 4)), TheirBlock(16, window=2, shift=1)
            ),
            None,
        ),
    ],
    ids=["three ways", "two blocks", "behind a layer"],
)
def test_what_cannot_be_proven_is_not_passed(
    make: Callable[[], nn.Module], message: str | None, prove: Callable[..., int]
) -> None:
    partition(TheirBlock)(lambda self, geometry: cut_windows(geometry.block_argument(self, "x")[1:3], self.window, self.shift))
    module = make()
    if message is None:  # the block itself is where its windows are looked at
        assert prove(module, torch.randn(2, 4, 4, 16)) == 2 * sum(isinstance(m, TheirBlock) for m in module.modules())
        return
    with pytest.raises(TokenError, match=message):
        check_recipe(module, torch.randn(2, 4, 4, 4))


def test_tokens_that_are_mixed_before_they_are_cut_prove_nothing() -> None:
    class Mixed(TheirBlock):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x + x.mean((1, 2), keepdim=True))

    partition(Mixed)(lambda self, geometry: cut_windows(geometry.block_argument(self, "x")[1:3], self.window, self.shift))
    with pytest.raises(TokenError, match="depends on all rows or columns that go into Mixed, which proves nothing"):
        check_recipe(Mixed(16, window=2, shift=1), torch.randn(2, 4, 6, 16))


def test_scores_that_do_not_show_their_keys_prove_nothing() -> None:
    outlook = OutlookAttention(dim=16, num_heads=2)
    with pytest.raises(TokenError, match="shows its scores alone, and one place changes all of a window"):
        check_recipe(outlook, torch.randn(2, 4, 6, 16))
