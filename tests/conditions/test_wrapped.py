"""Whatever somebody has put on or around a layer, the map is the one the module really used."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import timm.utils
import torch
import torch.nn.functional as F
from support.models import tiny
from support.oracle import unfused
from support.untouched import hooks_of_ours, untouched
from timm.layers import Attention
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from hookattn import AttentionRecorder


class LowRank(nn.Module):
    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer, self.drop = layer, nn.Dropout(0.3)
        self.down, self.up = nn.Linear(layer.in_features, 2), nn.Linear(2, layer.out_features)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x) + self.up(self.down(self.drop(x)))
        return y


class Int8(nn.Module):
    """A layer that keeps its weight in eight bits."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        weight = layer.weight.detach()
        scale = weight.abs().amax(1, keepdim=True) / 127
        self.register_buffer("weight", (weight / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.scale, self.bias)  # type: ignore[operator]


class Sine(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight.sin()


def dynamic(attn: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is on its way out
        torch.ao.quantization.quantize_dynamic(attn, {"qkv"}, dtype=torch.qint8, inplace=True)


def another_forward(attn: Any) -> None:
    plain = attn.forward
    attn.forward = functools.wraps(plain)(lambda x, *args, **kwargs: plain(2 * x, *args, **kwargs))


def masking(module: nn.Module, args: Any, kwargs: Any) -> Any:
    tokens = args[0].shape[1]
    return (args[0] * 2,), {**kwargs, "attn_mask": torch.linspace(-2, 2, tokens).expand(tokens, tokens)}


def another_class(attn: Any) -> None:
    class Cubed(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) ** 3

    attn.qkv.__class__ = Cubed


def another_forward_of_the_layer(attn: Any) -> None:
    plain = attn.qkv.forward
    attn.qkv.forward = lambda x: plain(x) ** 2


WRAPS: dict[str, Callable[[Any], object]] = {
    "low rank": lambda attn: setattr(attn, "qkv", LowRank(attn.qkv)),
    "int8": lambda attn: setattr(attn, "qkv", Int8(attn.qkv)),
    "dynamically quantised": dynamic,
    "parametrised weight": lambda attn: parametrize.register_parametrization(attn.qkv, "weight", Sine()),
    "parametrised bias": lambda attn: parametrize.register_parametrization(attn.qkv, "bias", Sine()),
    "parametrised norm": lambda attn: parametrize.register_parametrization(attn.q_norm, "weight", Sine()),
    "weight norm": lambda attn: parametrizations.weight_norm(attn.qkv),
    "spectral norm": lambda attn: parametrizations.spectral_norm(attn.qkv),
    "older spectral norm": lambda attn: nn.utils.spectral_norm(attn.qkv),
    "pruned": lambda attn: prune.random_unstructured(attn.qkv, "weight", 0.5),
    "pruned by rows": lambda attn: prune.ln_structured(attn.qkv, "weight", 0.5, n=2, dim=0),
    "forward replaced": another_forward,
    "layer's class set": another_class,
    "layer's forward replaced": another_forward_of_the_layer,
    "number set": lambda attn: (setattr(attn, "scale", 0.7), setattr(attn, "fused_attn", False)),
    "hook on the module": lambda attn: attn.register_forward_pre_hook(lambda _, args: (args[0] * 2,)),
    "hook with arguments": lambda attn: attn.register_forward_pre_hook(masking, with_kwargs=True),
    "hook on what comes out": lambda attn: attn.register_forward_hook(lambda *given: given[-1] * 2),
    "hook on the norm": lambda attn: attn.q_norm.register_forward_hook(lambda *given: given[-1] * 1.5 + 0.1),
    "hook on the layer": lambda attn: attn.qkv.register_forward_hook(lambda m, a, k, y: y.sin() * 3, with_kwargs=True),
    "hook before the layer": lambda attn: attn.qkv.register_forward_pre_hook(lambda _, args: (args[0].tanh() * 3,)),
}


def made(wrap: str | None, training: bool) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model, x = tiny("vit_qk_norm", attn_drop_rate=0.2)
    if wrap is not None:
        put_on(model, wrap)
    return model.train(training), x


def put_on(model: Any, wrap: str) -> None:
    torch.manual_seed(5)
    for block in model.blocks:
        WRAPS[wrap](block.attn)


@pytest.mark.parametrize("inside", [False, True], ids=["put on before", "put on inside the block"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("wrap", WRAPS)
def test_the_map_is_what_the_wrapped_module_used(wrap: str, training: bool, inside: bool) -> None:
    model, x = made(None if inside else wrap, training)
    twin, _ = made(None if inside else wrap, training)
    if inside:
        put_on(twin, wrap)
    torch.manual_seed(3)
    with torch.no_grad(), unfused(twin) as expected:
        twin(x)
    with AttentionRecorder(model) as rec, AttentionRecorder(model, keep="maps") as kept, torch.no_grad():
        if inside:
            put_on(model, wrap)
        torch.manual_seed(3)
        model(x)
    assert not hooks_of_ours(model)
    plain, _ = made(None, training)
    with torch.no_grad(), unfused(plain) as unwrapped:
        plain(x)
    alike = ("hook on what comes out", "weight norm", "dynamically quantised", "int8")  # in the first layer
    assert wrap in alike or (expected[0] - unwrapped[0]).abs().max() > 1e-3  # or the test would prove nothing
    with untouched(model):
        first = [m[...] for m in rec.maps.values()]
        for got, m, wanted in zip(first, rec.maps.values(), expected):
            torch.testing.assert_close(got, wanted, rtol=0, atol=2e-6)
            torch.testing.assert_close(kept.maps[m.name][...], wanted, rtol=0, atol=2e-6)
            assert torch.equal(m[...], got)
        rec.verify()


def test_a_spectral_norm_that_moves_on_leaves_earlier_maps_as_they_were() -> None:
    model, x = made("spectral norm", training=True)
    with AttentionRecorder(model, passes="all") as rec, AttentionRecorder(model, passes="all", keep="maps") as kept:
        for _ in range(3):
            with torch.no_grad():
                model(x)
    each = [p[0][...] for p in kept.passes]
    assert (each[0] - each[2]).abs().max() > 1e-5
    for late, at_once in zip(rec.passes, each):
        assert torch.equal(late[0][...], at_once)


@pytest.mark.parametrize("method", ["fx", "hook"])
def test_timm_s_own_extraction_sees_the_same_maps_and_is_not_disturbed(method: str) -> None:
    model: Any
    model, x = tiny("vit")
    for block in model.blocks:
        block.attn.fused_attn = False  # what it needs, and this package does not
    extract = timm.utils.AttentionExtract(model, method=method)
    with AttentionRecorder(model) as rec, torch.no_grad():
        theirs = list(extract(x).values())
        model(x)
    assert len(theirs) == len(rec.maps) == 2
    for m, expected in zip(rec.maps.values(), theirs):
        torch.testing.assert_close(m[...], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("keep", ["inputs", "maps"])
def test_parameters_that_are_swapped_for_one_call_are_not_mixed_up_with_the_module_s_own(keep: Any) -> None:
    model, x = tiny("vit")
    others = {name: p + torch.randn_like(p) for name, p in model.named_parameters()}
    with AttentionRecorder(model, keep=keep) as rec, torch.no_grad():
        torch.func.functional_call(model, others, (x,))
    with torch.no_grad(), unfused(model) as maps:
        torch.func.functional_call(model, others, (x,))
    torch.testing.assert_close(rec.maps[0][...], maps[0], rtol=0, atol=1e-6)


def numbers_set(attn: Any) -> None:
    attn.num_heads, attn.head_dim, attn.scale = 1, 48, 48**-0.5


def forward_set(attn: Any) -> None:
    attn.forward = lambda x, **given: type(attn).forward(attn, 2 * x, **given)


def forward_taken_away(attn: Any) -> None:
    del attn.forward


def attribute_taken_away(attn: Any) -> None:
    del attn.mine


def layer_wrapped(attn: Any) -> None:
    attn.qkv = nn.Sequential(attn.qkv, nn.Tanh())


def parameter_replaced(attn: Any) -> None:
    attn.qkv.weight = nn.Parameter(attn.qkv.weight * 2)


CHANGES: list[Callable[[Any], None]] = [
    numbers_set,
    forward_set,
    forward_taken_away,
    attribute_taken_away,
    layer_wrapped,
    parameter_replaced,
]


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_changed_inside_the_block_before_a_forward_is_what_its_map_is_read_with(change: Any) -> None:
    model: Any
    model, x = tiny("vit")
    attn = model.blocks[0].attn
    attn.mine = 3
    if change is forward_taken_away:
        forward_set(attn)
    with AttentionRecorder(model) as rec, torch.no_grad():
        change(attn)
        model(x)
    with torch.no_grad(), unfused(model) as maps:
        model(x)
    torch.testing.assert_close(rec.maps[0][...], maps[0], rtol=0, atol=1e-6)


def test_arguments_are_those_of_the_call_whatever_a_hook_makes_of_their_dict_later() -> None:
    attn, x = Attention(16, 4).eval(), torch.randn(2, 5, 16)
    mask = torch.zeros(5, 5).masked_fill(torch.rand(5, 5) > 0.7, -3.0)
    attn.register_forward_hook(lambda _module, _args, given, _output: given.clear(), with_kwargs=True)
    with AttentionRecorder(attn) as rec, torch.no_grad(), unfused(attn) as maps:
        attn(x, attn_mask=mask)
    torch.testing.assert_close(rec.maps[0][...], maps[0], rtol=0, atol=1e-6)
