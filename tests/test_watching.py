"""Models in which no class is named like attention: the first forward is watched."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hookattn import AttentionRecorder, NoMapError


class Mixer(nn.Module):
    """Attention under another name, with the fused kernel or without."""

    def __init__(self, dim: int = 24, heads: int = 3, fused: bool = True) -> None:
        super().__init__()
        self.heads, self.fused = heads, fused
        self.to_qkv, self.out, self.drop, self.soft = (
            nn.Linear(dim, 3 * dim),
            nn.Linear(dim, dim),
            nn.Dropout(0.1),
            nn.Softmax(-1),
        )

    def parts(self, x: Tensor) -> Any:
        return self.to_qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)

    def forward(self, x: Tensor, *, flip: bool = False) -> Tensor:
        q, k, v = self.parts(x.flip(1) if flip else x)
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            y = self.drop(self.soft(q @ k.mT * q.shape[-1] ** -0.5)) @ v
        return self.out(y.transpose(1, 2).flatten(2))


class Stack(nn.Module):
    """Two mixers, a gate over tokens whose softmax weighs nothing by a product, and a softmax over classes."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.first, self.second = Mixer(fused=fused), Mixer(fused=fused)
        self.gate, self.head = nn.Linear(24, 24), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.first(x)
        x = x + self.second(x, flip=True)
        x = x * self.gate(x).softmax(-1)
        return self.head(x.mean(1)).softmax(-1)


@pytest.mark.parametrize("keep", ["inputs", "maps"])
@pytest.mark.parametrize("fused", [True, False])
def test_modules_that_form_maps_are_found_in_the_first_forward(fused: bool, keep: Any) -> None:
    torch.manual_seed(0)
    model, x = Stack(fused).eval(), torch.randn(2, 7, 24)
    expected = model(x)
    with AttentionRecorder(model, keep=keep) as rec, torch.no_grad():
        assert torch.equal(model(x), expected)
        assert list(rec.maps) == rec.layers == ["first", "second"]
        once = [m[...] for m in rec.maps.values()]
        assert torch.equal(model(2 * x), model(2 * x))
        assert list(rec.maps) == ["first", "second"]
    q, k, _ = model.first.parts(x)
    torch.testing.assert_close(once[0], (q @ k.mT / 8**0.5).softmax(-1))
    q, k, _ = model.first.parts(2 * x)
    torch.testing.assert_close(rec.maps["first"][...], (q @ k.mT / 8**0.5).softmax(-1))
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    with rec, torch.no_grad():
        model(x)
    torch.testing.assert_close(rec.maps["second"][...], once[1])


def test_a_model_that_fails_while_it_is_watched_is_left_as_it_was() -> None:
    model = Stack(True)
    with pytest.raises(RuntimeError), AttentionRecorder(model) as rec:
        model(torch.randn(2, 7, 23))
    with pytest.raises(NoMapError):
        rec.maps  # noqa: B018
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    assert not torch.overrides._get_current_function_mode_stack()


def test_a_failed_forward_is_no_end_of_watching() -> None:
    model, x = Stack(True).eval(), torch.randn(2, 7, 24)
    with AttentionRecorder(model) as rec:
        with pytest.raises(RuntimeError):
            model(x[..., :3])
        model(x)
    assert list(rec.maps) == ["first", "second"]
