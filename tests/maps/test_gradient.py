"""Gradients of attention maps with the fused kernel on are those that autograd gives on the unfused path."""

from __future__ import annotations

import gc
import weakref
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from einops import rearrange
from support.inside import find_recipe
from support.mechanisms import MODELS, lively
from support.models import ANY_DTYPE, randomise, tiny, tiny_double
from support.modes import Largest
from support.oracle import as_read, loss_of, own_gradients, unfused
from support.reading import backward_of, compare_gradients
from timm.layers import Attention
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from hookattn import AttentionRecorder, NoGradientError, RecorderError, StaleMapError, UnreadableError
from hookattn.analysis import relevance


def first(output: Any) -> Any:
    """What a module returns, without what it says of its size."""
    return output[0] if isinstance(output, tuple) else output


@pytest.mark.parametrize("keep", ["inputs", "maps"])
@pytest.mark.parametrize("name", ANY_DTYPE)
def test_the_gradient_is_that_of_the_unfused_path(name: str, keep: Any) -> None:
    model, x = tiny_double(name)
    compare_gradients(backward_of(model, x, keep=keep), own_gradients(model, x))


@pytest.mark.parametrize("name", MODELS)
def test_the_gradient_is_that_of_the_unfused_path_for_every_mechanism(name: str) -> None:
    model, x = lively(name)
    outputs: dict[nn.Module, Tensor] = {}

    def keep_gradient(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        outputs[module] = first(output)
        outputs[module].retain_grad()

    modules = {name: m for name, m in model.named_modules() if find_recipe(m) is not None}
    handles = [module.register_forward_hook(keep_gradient) for module in modules.values()]
    rec = backward_of(model, x, layers=list(modules))
    expected = {}
    for handle in handles:
        handle.remove()
    for m in rec.maps.values():  # from the output of the module on; before it, gradients of such networks are ill-conditioned
        module = modules[m.name]
        with unfused(module) as maps:
            output = first(module.forward(m.x.clone().requires_grad_(), *m.call.args[1:], **m.call.kwargs))
        grads = torch.autograd.grad(output, maps, outputs[module].grad, materialize_grads=True)
        expected[m.name] = as_read(module, list(grads))
    compare_gradients(rec, expected)


@pytest.mark.parametrize("frozen", [False, True])
def test_the_gradient_is_there_for_autograd_grad_and_for_frozen_models(frozen: bool) -> None:
    model, x = tiny_double("vit")
    expected = own_gradients(model, x)
    model.requires_grad_(not frozen)
    x.requires_grad_()
    with AttentionRecorder(model, gradients=True) as rec:
        torch.autograd.grad(loss_of(model(x)), x)
    assert x.grad is None
    compare_gradients(rec, expected)


@pytest.mark.parametrize("keep", ["inputs", "maps"])
def test_the_gradient_is_that_of_the_last_backward(keep: Any) -> None:
    model, x = tiny_double("vit")
    with AttentionRecorder(model, gradients=True, keep=keep) as rec:
        output = model(x)
    for which in (0, 1):
        loss_of(output, which).backward(retain_graph=True)
        compare_gradients(rec, own_gradients(model, x, partial(loss_of, which=which)))


def test_each_of_several_forwards_has_its_own_gradient() -> None:
    model, x = tiny_double("vit")
    images = [x, -x, x + 1]
    expected = [own_gradients(model, x) for x in images]
    model.blocks[0].forward = lambda x, own=model.blocks[0].forward, **_: checkpoint(own, x, use_reentrant=True)
    with AttentionRecorder(model, gradients=True, passes="all") as rec:
        first, second, third = [loss_of(model(x)) for x in images]
        (first + second).backward()
        third.backward()
    for maps, each in zip(rec.passes, expected):
        for name, m in maps.items():
            torch.testing.assert_close(m.gradient[...], each[name], rtol=1e-9, atol=1e-12)


def test_dropout_of_the_map_is_in_the_gradient_or_the_gradient_is_refused() -> None:
    model, x = tiny_double("vit", attn_drop_rate=0.3)
    model.train()
    rec, kept = backward_of(model, x), backward_of(model, x, keep="maps")
    with pytest.raises(UnreadableError, match=r"during backward: .*inside the fused kernel"):
        kept.maps[0].gradient[...]  # backward itself went on
    with pytest.raises(UnreadableError, match=r"drops out parts of its map inside the fused kernel.*attn_drop_rate=0"):
        rec.maps[0].gradient[...]
    for block in model.blocks:
        block.attn.fused_attn = False
    torch.manual_seed(1)
    expected = own_gradients(model, x)
    torch.manual_seed(1)
    compare_gradients(backward_of(model, x), expected)


@pytest.mark.parametrize("options", [{}, {"keep": "maps"}, {"detach": False}], ids=str)
@pytest.mark.parametrize("name", ["vit", "eva_split", "beit_shared", "parallel", "differential"])
def test_following_gradients_changes_neither_outputs_nor_gradients(name: str, options: dict[str, Any]) -> None:
    model, x = tiny(name, proj_drop_rate=0.3, drop_path_rate=0.3)
    model.train()
    results = []
    for recorder in (None, AttentionRecorder(model, gradients=True, **options)):
        torch.manual_seed(1)
        model.zero_grad()
        if recorder is None:
            output = model(x)
            loss_of(output).backward()
        else:
            with recorder:
                output = model(x)
                loss_of(output).backward()
        results.append([output, *[p.grad for p in model.parameters() if p.grad is not None], torch.get_rng_state()])
    assert len(results[0]) > 10
    assert all(map(torch.equal, *results))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_the_gradient_is_as_near_as_that_of_the_unfused_path(dtype: torch.dtype) -> None:
    attention, x, factor = Attention(48, 3, qkv_bias=True), torch.randn(2, 17, 48), torch.randn(2, 17, 48)
    randomise(attention)
    cast = torch.autocast("cpu", dtype=dtype)

    def own_gradient(module: nn.Module, x: Tensor) -> Tensor:
        with unfused(module) as maps:
            output = module(x)
        return torch.autograd.grad((output * factor.to(output)).sum(), maps)[0].double()

    with cast, AttentionRecorder(attention, gradients=True) as rec:
        output = attention(x)
        (output * factor.to(output)).sum().backward()
        eager = own_gradient(attention, x)
    got = rec.maps[0].gradient[...]
    assert got.dtype == torch.float32
    exact = own_gradient(attention.double(), x.double())
    ours, theirs = ((grad - exact).square().mean().sqrt() for grad in (got, eager))
    assert ours <= theirs


class Pair(nn.Module):
    """PyTorch's attention, asked for its weights or not, whose output and weights are both used."""

    def __init__(self, need_weights: bool) -> None:
        super().__init__()
        self.attn, self.need_weights = nn.MultiheadAttention(24, 3, batch_first=True), need_weights

    def forward(self, x: Tensor) -> Tensor:
        y = self.attn(x, x, x, need_weights=self.need_weights, average_attn_weights=False)[0]
        return torch.stack([y * 2, x]).sum(0)


@pytest.mark.parametrize("need_weights", [False, True])
def test_pytorch_s_own_attention_has_gradients(need_weights: bool) -> None:
    model, x = Pair(need_weights).double(), torch.randn(2, 7, 24, dtype=torch.float64)
    rec = backward_of(model, x)
    attention = model.attn
    q, k, v = torch.nn.functional.linear(x, attention.in_proj_weight, attention.in_proj_bias).chunk(3, -1)
    q, k, v = (rearrange(t, "b n (h d) -> b h n d", h=3) for t in (q, k, v))
    a = (q @ k.mT / 8**0.5).softmax(-1)
    y = x + 2 * attention.out_proj(rearrange(a @ v, "b h n d -> b n (h d)"))
    compare_gradients(rec, {"attn": torch.autograd.grad(loss_of(y), a)[0]})


class Grouped(nn.Module):
    """Attention whose keys and values are shared by groups of heads, with two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.num_heads, self.fused_attn = nn.Linear(32, 64), 4, True

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = rearrange(self.qkv(x), "b n (h d) -> b h n d", d=8).split([4, 2, 2], 1)
        if self.fused_attn:
            y = nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        else:
            k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
            y = (q @ k.mT / 8**0.5).softmax(-1) @ v
        return y[..., :3], y[..., 3:].sin()


@pytest.mark.parametrize("keep", ["inputs", "maps"])
def test_groups_of_heads_and_outputs_that_are_asked_one_by_one(keep: Any) -> None:
    model, x = Grouped().double(), torch.randn(2, 5, 32, dtype=torch.float64)
    with AttentionRecorder(model, gradients=True, keep=keep) as rec:
        outputs = model(x)
    with unfused(model) as maps:
        expected = model(x)
    for places in ([0], [1], [0, 1]):
        sum(loss_of(outputs[i]) for i in places).backward(retain_graph=True)
        end = sum(loss_of(expected[i]) for i in places)
        compare_gradients(rec, {rec.layers[0]: torch.autograd.grad(end, maps, retain_graph=True)[0]})


class Held(nn.Module):
    """Attention that returns its output in an object."""

    @dataclass
    class Output:
        y: Tensor

    def forward(self, x: Tensor) -> Output:
        return self.Output(nn.functional.scaled_dot_product_attention(x, x, x))


class Odd(nn.Module):
    """Attention under another name: found by watching the first forward."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.fused_attn, self.scale = 1, True, 0.3

    def forward(self, x: Tensor) -> Tensor:
        if self.fused_attn:
            return nn.functional.scaled_dot_product_attention(x, x, x, scale=self.scale)
        return (x @ x.mT * self.scale).softmax(-1) @ x


def test_what_is_found_by_watching_has_gradients_in_the_first_forward_and_later() -> None:
    model, x = (
        nn.Sequential(nn.Linear(4, 4), Odd(), nn.Linear(4, 4), Odd()).double(),
        torch.randn(2, 1, 5, 4).double(),
    )
    with unfused(model) as maps:
        expected = torch.autograd.grad(loss_of(model(x)), maps)
    with AttentionRecorder(model, gradients=True) as rec:
        for _ in range(2):
            loss_of(model(x)).backward()
            compare_gradients(rec, dict(zip("13", expected)))


def test_hooks_of_others_are_on_the_way() -> None:
    model, x = tiny_double("vit")
    attention = model.blocks[0].attn
    attention.register_forward_hook(lambda *made: made[2] + made[2].square())
    with AttentionRecorder(model, gradients=True) as rec:
        attention.register_forward_hook(lambda *made: made[2] * 3)
        attention.register_forward_pre_hook(lambda _, args: (args[0] * 0.5, *args[1:]))
        attention.register_full_backward_hook(lambda _, inner, outer: (inner[0] * 5,))
        loss_of(model(x)).backward()
    compare_gradients(rec, own_gradients(model, x))


def test_a_row_of_a_gradient_is_read_without_forming_the_map() -> None:
    model, _ = tiny("vit", img_size=256)
    rec = backward_of(model, torch.randn(2, 3, 256, 256))
    gradient = rec.maps[0].gradient
    with Largest() as largest:
        gradient[:, :, 0]
    assert largest.elements < 2 * 3 * 257 * 257


def test_what_is_missing_is_said_with_what_to_type() -> None:
    model, x = tiny("vit")
    with AttentionRecorder(model) as rec:
        model(x).sum().backward()
    with pytest.raises(RecorderError, match=r"AttentionRecorder\(model, gradients=True\)"):
        rec.maps[0].gradient  # noqa: B018
    with AttentionRecorder(model, gradients=True) as rec:
        model(x)
    assert repr(rec.maps[0].gradient) == "Gradient('blocks.0.attn', not arrived)"
    with pytest.raises(NoGradientError, match=r"no gradient has reached 'blocks.0.attn'.*backward\(\)"):
        rec.maps[0].gradient[...]
    with AttentionRecorder(model, gradients=True) as rec, torch.no_grad():
        model(x)
    with pytest.raises(NoGradientError, match=r"without a graph: call the model without torch.no_grad\(\)"):
        rec.maps[0].gradient.shape  # noqa: B018
    holder = nn.Sequential(nn.Linear(4, 4), Held())
    with AttentionRecorder(holder, gradients=True) as rec:
        holder(torch.randn(2, 5, 4)).y.sum().backward()
    with pytest.raises(NoGradientError, match="returned no tensor"):
        rec.maps[0].gradient[...]


def test_a_gradient_that_the_last_backward_did_not_reach_is_not_mixed_with_those_it_did() -> None:
    model, x = tiny_double("vit", depth=4)
    with AttentionRecorder(model, gradients=True) as rec:
        _, (early, late) = model.forward_intermediates(x, indices=[1, 3])
    loss_of(late).backward(retain_graph=True)
    assert rec.maps[3].gradient[...].abs().max() > 0
    loss_of(early).backward()
    assert rec.maps[1].gradient[...].abs().max() > 0
    for ask in (lambda: rec.maps[3].gradient[...], lambda: relevance(rec)):
        with pytest.raises(NoGradientError, match=r"the last backward did not reach 'blocks.2.attn'|'blocks.3.attn'"):
            ask()


@pytest.mark.parametrize("keep", ["inputs", "maps"])
def test_a_gradient_of_a_gradient_is_refused(keep: Any) -> None:
    model, x = tiny_double("vit")
    expected = own_gradients(model, x)
    x.requires_grad_()
    with AttentionRecorder(model, gradients=True, keep=keep) as rec, sdpa_kernel(SDPBackend.MATH):
        end = loss_of(model(x))
        (first,) = torch.autograd.grad(end, x, create_graph=True)
        compare_gradients(rec, expected)
        (end + first.square().sum()).backward()
    with pytest.raises(UnreadableError, match="create_graph=True"):
        rec.maps[0].gradient[...]


def test_a_step_makes_gradients_stale_unless_they_are_kept() -> None:
    model, x = tiny_double("vit")
    expected = own_gradients(model, x)
    read, kept = backward_of(model, x), backward_of(model, x, keep="maps")
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    with pytest.raises(StaleMapError):
        read.maps[0].gradient[...]
    compare_gradients(kept, expected)


@pytest.mark.parametrize("options", [{}, {"keep": "maps"}, {"keep": "maps", "detach": False}], ids=str)
@pytest.mark.parametrize("name", ["vit", "relpos", "differential"])
def test_reading_gradients_leaves_no_tensor_for_the_garbage_collector(name: str, options: dict[str, Any]) -> None:
    model, x = tiny(name)
    if name == "relpos":
        for block in model.blocks:
            block.attn.fused_attn = False
    gc.collect()
    gc.disable()
    gc.freeze()  # what was there before is not counted
    try:
        counts = []
        for _ in range(4):
            rec = backward_of(model, x, **options)
            for m in rec.maps.values():
                m.gradient[:, 0], m.gradient.shape
            del rec, m
            model.zero_grad()
            counts.append(sum(type(thing) is Tensor for thing in gc.get_objects()))
        assert counts[1] == counts[3]
    finally:
        gc.enable()


@pytest.mark.parametrize("keep", ["inputs", "maps"])
def test_a_recorder_that_is_dropped_leaves_nothing_behind_and_one_that_keeps_maps_no_input(keep: Any) -> None:
    model, x = tiny("vit")
    storages: list[weakref.ref[Any]] = []
    handle = model.blocks[1].attn.register_forward_pre_hook(
        lambda _, args: storages.append(args[0].untyped_storage()._weak_ref())
    )
    gc.disable()
    try:
        rec = backward_of(model, x, keep=keep)
        alive = weakref.ref(rec)
        rec.maps[0].gradient[...]
        m = rec.maps[1]
        del rec
        assert alive() is None
        assert is_freed(storages[0]) == (keep == "maps")
        if keep == "maps":
            assert m.gradient[...].shape == m.shape
        del m
        assert is_freed(storages[0])
        with AttentionRecorder(model, gradients=True, keep=keep) as second:
            output = model(x)
        followed = weakref.ref(second.maps[0].gradient)
        del second
        assert followed() is None  # though the graph is there
        assert output.grad_fn is not None
        handle.remove()
    finally:
        gc.enable()


def is_freed(storage: Any) -> bool:
    """Whether a weak reference to a storage is that of memory given back."""
    return bool(torch.UntypedStorage._expired(storage))
