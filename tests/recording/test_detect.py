"""Models in which no class is named like attention: the first forward is watched."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hookattn import AttentionRecorder, NoMapError, UnreadableError


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


def test_what_a_failed_forward_did_not_get_to_is_found_in_the_next_block() -> None:
    model, x = Stack(True).eval(), torch.randn(2, 7, 24)
    handle = model.second.register_forward_pre_hook(lambda *_: 1 / 0)
    rec = AttentionRecorder(model)
    with rec, pytest.raises(ZeroDivisionError):
        model(x)
    handle.remove()
    with rec:
        model(x)
    assert list(rec.maps) == ["first", "second"]


class Experts(nn.Module):
    """Weights over experts, over bins and over branches: none is a map from queries to keys."""

    def __init__(self) -> None:
        super().__init__()
        self.route, self.experts, self.bins = (
            nn.Linear(24, 4),
            nn.Parameter(torch.randn(4, 24, 24)),
            nn.Parameter(torch.randn(4, 24)),
        )

    def forward(self, x: Tensor) -> Tensor:
        weights = self.route(x).softmax(-1)
        x = torch.einsum("bne,ebnd->bnd", weights, torch.einsum("bnc,ecd->ebnd", x, self.experts))
        return x + self.route(x).softmax(-1) @ self.bins


def test_weights_over_experts_and_bins_are_no_maps() -> None:
    model = nn.Sequential(Experts(), Mixer()).eval()
    with AttentionRecorder(model) as rec, torch.no_grad():
        model(torch.randn(2, 7, 24))
    assert list(rec.maps) == ["1"]


class WritesIntoItsInput(Mixer):
    def forward(self, x: Tensor, *, flip: bool = False) -> Tensor:
        return x.add_(super().forward(x))


@pytest.mark.parametrize("layers", [None, "0"])
def test_a_module_that_writes_into_its_input_is_told_and_its_output_stays(layers: Any) -> None:
    model, x = nn.Sequential(WritesIntoItsInput()).eval(), torch.randn(2, 7, 24)
    with torch.no_grad():
        expected = model(x.clone())
        with AttentionRecorder(model, layers, keep="maps") as rec:
            assert torch.equal(model(x.clone()), expected)
            q, k, _ = model[0].parts(x)
            if layers is None:  # watched, and read after it ran
                with pytest.raises(UnreadableError, match="x changed in place"):
                    rec.maps[0][...]
                assert torch.equal(model(x.clone()), expected)
            torch.testing.assert_close(rec.maps[0][...], (q @ k.mT / 8**0.5).softmax(-1))


class Cache:
    def __init__(self) -> None:
        self.keys: list[Tensor] = []

    def update(self, k: Tensor) -> Tensor:
        self.keys.append(k)
        return torch.cat(self.keys, dim=2)


class Cached(Mixer):
    def forward(self, x: Tensor, cache: Any = None) -> Tensor:
        q, k, v = self.parts(x)
        k, v = (k, v) if cache is None else cache.update(torch.stack((k, v)).flatten(0, 1)).unflatten(0, (2, -1))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = Cached()

    def forward(self, x: Tensor, cache: Any) -> Tensor:
        return self.layer(x, cache)


def test_a_cache_that_a_forward_fills_is_read_as_it_was_and_left_alone() -> None:
    model, cache = Decoder().eval(), Cache()
    with AttentionRecorder(model, "layer", passes="all") as rec, torch.no_grad():
        xs = [torch.randn(2, tokens, 24) for tokens in (7, 1)]
        for x in xs:
            model(x, cache)
    assert [maps[0].shape[2:] for maps in rec.passes] == [(7, 7), (1, 8)]
    k = torch.cat([keys[:2] for keys in cache.keys], dim=2)
    for maps, x in zip(rec.passes, xs):
        q = model.layer.parts(x)[0]
        torch.testing.assert_close(maps[0][...], (q @ k[:, :, : maps[0].shape[3]].mT / 8**0.5).softmax(-1))
    assert len(cache.keys) == 2


@pytest.mark.parametrize("bases", [(nn.Module,), (set,)], ids=["a module", "a set"])
def test_a_cache_that_cannot_be_copied_is_left_alone_and_the_module_refused(bases: Any) -> None:
    cache = type("Cache", (Cache, *bases), {"__hash__": object.__hash__})()
    model = Decoder().eval()
    with AttentionRecorder(model, "layer") as rec, torch.no_grad():
        model(torch.randn(2, 7, 24), cache)
    with pytest.raises(UnreadableError, match=r'with a Cache, which its forward changes.*use_cache=False.*keep="maps"'):
        rec.maps[0][...]
    assert len(cache.keys) == 1


def test_maps_that_are_kept_look_at_what_a_cache_has_added() -> None:
    model, cache = Decoder().eval(), Cache()
    with AttentionRecorder(model, "layer", keep="maps", passes="all") as rec, torch.no_grad():
        for tokens in (7, 1):
            model(x := torch.randn(2, tokens, 24), cache)
    assert len(cache.keys) == 2
    assert [maps[0].shape[2:] for maps in rec.passes] == [(7, 7), (1, 8)]
    q, k = model.layer.parts(x)[0], torch.cat([keys[:2] for keys in cache.keys], dim=2)
    torch.testing.assert_close(rec.maps[0][...], (q @ k.mT / 8**0.5).softmax(-1))


def test_a_model_without_maps_is_watched_once() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    with AttentionRecorder(model) as rec:
        for _ in range(3):
            model(torch.randn(2, 3))
        assert sum(len(m._forward_pre_hooks) for m in model.modules()) == 1  # the one that knows forwards apart
    with pytest.raises(NoMapError, match="ran and was watched"):
        rec.maps  # noqa: B018


def test_an_error_of_the_model_s_own_comes_through() -> None:
    model = Stack(True)
    with AttentionRecorder(model) as rec:
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            model(torch.randn(2, 7, 23))
        model(torch.randn(2, 7, 24))
        assert list(rec.maps) == ["first", "second"]


def test_a_first_forward_that_was_interrupted_is_watched_again() -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    model = Stack(True)
    modes = torch.overrides._get_current_function_mode_stack()
    with AttentionRecorder(model, passes="all") as rec:
        with pytest.raises(KeyboardInterrupt), model.second.register_forward_pre_hook(interrupt):
            model(torch.randn(2, 7, 24))
        for _ in range(2):
            model(torch.randn(2, 7, 24))
    assert [list(maps) for maps in rec.passes] == [["first"], ["first", "second"], ["first", "second"]]
    assert torch.overrides._get_current_function_mode_stack() == modes


class Turned(nn.Module):
    """A model with a stem, inside one that turns the image first."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patch_embed, self.mix = nn.Conv2d(3, 24, 16, 16), Mixer()

        def forward(self, x: Tensor) -> Tensor:
            return self.mix(self.patch_embed(x).flatten(2).transpose(1, 2))

    def __init__(self) -> None:
        super().__init__()
        self.net = self.Net()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.transpose(-1, -2))


def test_images_are_those_that_reach_the_stem_in_the_first_forward_too() -> None:
    model = Turned().eval()
    with AttentionRecorder(model) as rec, torch.no_grad():
        for _ in range(2):
            model(torch.randn(2, 3, 48, 96))
            assert rec.maps[0].tokens.grid_size == (6, 3)
