"""Ways to be silently wrong that users find: each once gave another map than the module's, without a word."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from support import reference
from support.models import randomise, tiny
from support.oracle import unfused
from timm.layers import Attention
from torch import Tensor, nn

from hookattn import AttentionMap, AttentionRecorder, StaleMapError, UnreadableError


def attention_after(model: nn.Module, x: Tensor, **options: Any) -> AttentionMap:
    with AttentionRecorder(model, **options) as rec, torch.no_grad():
        model(x)
    m: AttentionMap = rec.maps[0]
    return m


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


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_a_step_of_any_optimizer_makes_maps_stale(kind: Any, fused: bool) -> None:
    model, x = tiny("vit")
    optimizer = kind(model.parameters(), lr=0.1, fused=fused)
    with AttentionRecorder(model) as rec:
        model(x).square().sum().backward()
    rec.maps[0][0]
    optimizer.step()
    with pytest.raises(StaleMapError, match="changed in place after the forward"):
        rec.maps[0][0]


def hook_removed(attn: Any) -> Any:
    return attn.qkv.register_forward_hook(lambda _module, _args, y: y * 2).remove


def hook_added(attn: Any) -> Any:
    return lambda: attn.qkv.register_forward_hook(lambda _module, _args, y: y * 2)


def layer_wrapped(attn: Any) -> Any:
    return lambda: setattr(attn, "qkv", nn.Sequential(attn.qkv, nn.Tanh()))


def number_set(attn: Any) -> Any:
    return lambda: setattr(attn, "scale", 1.0)


def data_written(attn: Any) -> Any:
    return lambda: attn.qkv.weight.data.mul_(2)


@pytest.mark.parametrize("change", [hook_removed, hook_added, layer_wrapped, number_set, data_written])
def test_a_module_that_is_another_one_now_makes_its_maps_stale(change: Any) -> None:
    model, x = tiny("vit")
    with AttentionRecorder(model) as rec, torch.no_grad():
        apply = change(model.blocks[0].attn)  # type: ignore[index,union-attr]
        model(x)
    rec.maps[0][0]
    apply()
    with pytest.raises(StaleMapError):
        rec.maps[0][0]
    rec.maps[1][0]  # the other block is as it was


@pytest.mark.parametrize("keep", ["inputs", "maps"])
def test_a_hook_that_is_put_on_inside_the_block_and_changes_x_is_seen(keep: Any) -> None:
    model, x = tiny("vit")
    attn: Any = model.blocks[0].attn  # type: ignore[index,union-attr]
    with (
        AttentionRecorder(model, keep=keep) as rec,
        torch.no_grad(),
        attn.register_forward_pre_hook(lambda _, args: (args[0] * 2,)),
    ):
        model(x)
    with torch.no_grad(), attn.register_forward_pre_hook(lambda _, args: (args[0] * 2,)), unfused(model) as maps:
        model(x)
    torch.testing.assert_close(rec.maps[0][...], maps[0], rtol=0, atol=1e-6)
    assert not attn._forward_hooks


@pytest.mark.parametrize("keep", ["inputs", "maps"])
def test_parameters_that_are_swapped_for_one_call_are_not_mixed_up_with_the_module_s_own(keep: Any) -> None:
    model, x = tiny("vit")
    others = {name: p + torch.randn_like(p) for name, p in model.named_parameters()}
    with AttentionRecorder(model, keep=keep) as rec, torch.no_grad():
        torch.func.functional_call(model, others, (x,))
    with torch.no_grad(), unfused(model) as maps:
        torch.func.functional_call(model, others, (x,))
    torch.testing.assert_close(rec.maps[0][...], maps[0], rtol=0, atol=1e-6)


class WithDropout(nn.Module):
    """A projection with a random part, as LoRA has in train mode."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer, self.drop = layer, nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.drop(x))


@pytest.mark.parametrize("name", ["vit", "beit"])
@pytest.mark.parametrize("keep", ["inputs", "maps"])
def test_dropout_inside_a_projection_is_the_dropout_of_the_call(keep: Any, name: str) -> None:
    model, x = tiny(name)
    attn: Any = model.blocks[0].attn  # type: ignore[index,union-attr]
    if name == "vit":
        attn.qkv = WithDropout(attn.qkv)
    model.train()
    torch.manual_seed(3)
    with torch.no_grad(), unfused(model) as maps:
        alone = model(x)
    torch.manual_seed(3)
    with AttentionRecorder(model, keep=keep) as rec, torch.no_grad():
        recorded = model(x)
    torch.testing.assert_close(recorded, alone, rtol=0, atol=1e-4)  # one is fused, one is not
    torch.testing.assert_close(rec.maps[0][...], maps[0], rtol=0, atol=1e-6)
    assert torch.equal(rec.maps[0][...], rec.maps[0][...])


def test_a_window_is_not_drawn_as_the_whole_image() -> None:
    model = timm.create_model("maxvit_rmlp_pico_rw_256", img_size=64).eval()
    m = attention_after(model, torch.randn(2, 3, 64, 64))
    assert m.shape == (128, 1, 4, 4)
    picture = m.image((3, 4))
    assert picture.shape == (2, 16, 16)
    window = torch.zeros(16, 16, dtype=torch.bool)
    window[2:4, 4:6] = True  # the 2 x 2 window that holds the patch
    assert bool((picture[:, window] > 0).all())
    assert bool((picture[:, ~window] == 0).all())


class Folded(nn.Module):
    """Heads folded into the batch, and no attribute that tells how many there are."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, 4, 4).permute(2, 0, 3, 1, 4).reshape(3, b * 4, n, 4)
        return ((q @ k.transpose(1, 2)).softmax(-1) @ v).reshape(b, 4, n, 4).transpose(1, 2).reshape(b, n, c)


class KeysThird(nn.Module):
    """Scores on the axes (batch, query, head, key)."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 4
        self.qkv = nn.Linear(16, 48)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).reshape(*x.shape[:2], 3, 4, 4).unbind(2)
        scores = torch.einsum("bqhd,bkhd->bqhk", q, k)
        return torch.einsum("bqhk,bkhd->bqhd", F.softmax(scores, dim=-1), v).flatten(2)


@pytest.mark.parametrize("kind", [Folded, KeysThird])
def test_scores_on_other_axes_are_refused(kind: Any) -> None:
    m = attention_after(randomise(nn.Sequential(kind())), torch.randn(2, 5, 16), layers="0")
    with pytest.raises(UnreadableError, match=r"which are not \(batch, head, ...\)"):
        m[...]


def test_a_learned_number_is_a_scale() -> None:
    from hookattn import QK

    q, k = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 5, 4)
    expected = reference.attention(q, k, 0.3).float()
    for scale in (torch.tensor(0.3), torch.full((3, 1, 1), 0.3)):
        qk = QK(q, k, scale=scale)
        torch.testing.assert_close(qk.probabilities(), expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(qk.narrow(heads=slice(1, 2)).probabilities(), expected[:, 1:2], rtol=0, atol=1e-6)


def test_x_is_the_first_argument_whatever_the_order_of_the_call() -> None:
    attn = Attention(16, 4).eval()
    x, mask = torch.randn(2, 5, 16), torch.zeros(5, 5)
    with AttentionRecorder(attn) as rec:
        attn(attn_mask=mask, x=x)
    assert torch.equal(rec.maps[0].x, x)
