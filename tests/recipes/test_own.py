"""Recipes of users, and the conformance test they are checked with."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import reference
from support.inside import find_recipe, own_registers
from support.models import randomise, tiny
from support.oracle import unfused
from support.reading import attention_after
from timm.layers import Attention
from torch import Tensor, nn

from hookattn import AttentionRecorder, UnfaithfulMapError, recipe
from hookattn.testing import check_recipe


class TheirAttention(nn.Module):
    """Somebody's own attention, with a temperature."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads, self.scale = num_heads, (dim // num_heads) ** -0.5
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.temperature = nn.Parameter(torch.ones(num_heads, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q * self.temperature, k, v, scale=self.scale)
        return self.proj(y.transpose(1, 2).reshape(b, n, c))


def test_a_user_files_a_recipe_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    from hookattn import QK, project

    own_registers(monkeypatch)
    module = randomise(TheirAttention(32, 4)).eval()
    x = torch.randn(2, 6, 32)
    with pytest.raises(Exception, match=r"has no recipe; file one with @hookattn.recipe\("):
        check_recipe(module, x)

    @recipe(TheirAttention)
    def theirs(self: Any, x: Tensor) -> QK:
        q, k = project(self.qkv, x, "b n (parts h d) -> parts b h n d", parts=2, of=3, h=self.num_heads)
        return QK(q, k, scale=self.scale * self.temperature)

    check_recipe(module, x)
    with pytest.raises(ValueError, match="has a recipe already"):
        recipe(TheirAttention)(theirs)


@pytest.mark.parametrize("wrong", ["temperature", "bias", "scale"])
def test_check_recipe_catches_a_wrong_recipe(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from hookattn import QK

    own_registers(monkeypatch)

    @recipe(TheirAttention)
    def theirs(self: Any, x: Tensor) -> QK:
        y = F.linear(x, self.qkv.weight, None if wrong == "bias" else self.qkv.bias)
        q, k, _ = y.reshape(*x.shape[:2], 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        scale = 1.0 if wrong == "scale" else self.scale
        return QK(q, k, scale=scale if wrong == "temperature" else scale * self.temperature)

    with pytest.raises(UnfaithfulMapError):
        check_recipe(TheirAttention(32, 4), torch.randn(2, 6, 32))


class Holder(nn.Module):
    """Another version of a class, which holds the attention in place of being it."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x)  # type: ignore[no-any-return]


def test_a_recipe_may_be_one_for_some_modules_of_a_class_and_for_some_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    from hookattn import QK

    own_registers(monkeypatch)
    calls = []

    @recipe(Holder, where=lambda module: hasattr(module, "is_plain"))
    def held(self: Any, x: Tensor) -> Any:
        calls.append(x)
        q, k, _ = self.attention.qkv(x).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        return QK(q, k) if self.is_plain else NotImplemented

    model, x = nn.Sequential(randomise(Holder())).eval(), torch.randn(2, 7, 32)
    assert AttentionRecorder(model).layers == ["0.attention"]
    assert find_recipe(model[0]) is None
    maps = []
    for model[0].is_plain in (True, False):
        assert AttentionRecorder(model).layers == ["0", "0.attention"]
        for keep in ("inputs", "maps"):
            with AttentionRecorder(model, "0", keep=keep) as rec, torch.no_grad():
                model(x)
            assert rec.maps[0].shape == (2, 4, 7, 7)
            maps.append(rec.maps[0][...])
    assert calls
    for m in maps[1:]:
        torch.testing.assert_close(m, maps[0], rtol=0, atol=1e-6)


def test_a_derived_class_is_read_by_the_recipe_of_its_base() -> None:
    from timm.layers import Attention

    class Derived(Attention):  # type: ignore[misc]
        pass

    assert find_recipe(Derived(32, 4)) is find_recipe(Attention(32, 4))


def test_the_map_is_the_definition() -> None:
    from hookattn import QK

    q, k, bias, mask = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 7, 4), torch.randn(3, 5, 7), torch.rand(2, 1, 5, 7) > 0.4
    mask[1, 0, 3] = False
    got = QK(q, k, scale=0.7, bias=bias, mask=mask).values()
    torch.testing.assert_close(got.double(), reference.attention(q, k, 0.7, bias, mask), rtol=0, atol=1e-6)
    narrow = QK(q, k, scale=0.7, bias=bias, mask=mask).narrow(slice(1, 2), slice(None, None, 2), torch.tensor([4, 0]))
    assert torch.equal(narrow.values(), got[1:2, ::2][:, :, [4, 0]])


class Merged(Attention):  # type: ignore[misc]
    """A class that is derived from one with a recipe and forms its scores otherwise."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        scores = (q * self.scale) @ k.transpose(-2, -1) + torch.arange(n).log1p()
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, n, -1))


def derived(model: Any) -> None:
    for block in model.blocks:
        block.attn.__class__ = Merged


def patched(model: Any) -> None:
    for block in model.blocks:
        block.attn.forward = Merged.forward.__get__(block.attn)


@pytest.mark.parametrize("change", [derived, patched])
def test_a_forward_of_their_own_is_not_read_by_the_recipe_of_the_base_class(change: Any) -> None:
    model, x = tiny("vit")
    change(model)
    m = attention_after(model, x)
    with torch.no_grad(), unfused(model) as maps:
        model(x)
    torch.testing.assert_close(m[...], maps[0], rtol=0, atol=1e-6)


def test_a_learned_number_is_a_scale() -> None:
    from hookattn import QK

    q, k = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 5, 4)
    expected = reference.attention(q, k, 0.3).float()
    for scale in (torch.tensor(0.3), torch.full((3, 1, 1), 0.3)):
        qk = QK(q, k, scale=scale)
        torch.testing.assert_close(qk.values(), expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(qk.narrow(heads=slice(1, 2)).values(), expected[:, 1:2], rtol=0, atol=1e-6)
