"""Maps that are put in place of a module's own: the logits are those of the unfused path with the same change."""

from __future__ import annotations

import gc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from einops import rearrange
from support.inside import edits_in_checkpoints, find_recipe
from support.mechanisms import MODELS, lively
from support.models import ANY_DTYPE, TINY, tiny
from support.oracle import unfused
from timm.layers import Attention
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hookattn import AttentionRecorder, LayerNotFoundError, RecorderError, UnreadableError


def without_head(attention: Tensor) -> Tensor:
    """Knock out a head."""
    attention[:, -1] = 0
    return attention


def without_edge(attention: Tensor) -> Tensor:
    """Let nothing look at token 3, and rows sum to 1 again."""
    return (attention * (torch.arange(attention.shape[-1]) != 3)).div(1 - attention[..., 3:4])


def uniform(attention: Tensor) -> Tensor:
    return torch.full_like(attention, 1 / attention.shape[-1])


def cubed(attention: Tensor) -> Tensor:
    """Something that is not linear in the map."""
    return attention**3


EDITS = [without_head, without_edge, uniform, cubed]


def edited(which: int, edit: Callable[[Tensor], Tensor]) -> Callable[[int, Tensor], Tensor | None]:
    """Change what the softmax of this number puts out."""
    return lambda number, a: edit(a.clone()) if number == which else None


def gradients(output: Tensor, model: nn.Module) -> list[Tensor]:
    return [g for g in torch.autograd.grad(output.square().sum(), list(model.parameters()), allow_unused=True) if g is not None]


def near(got: Tensor, expected: Tensor, tolerance: float = 1e-9) -> None:
    largest = expected.abs().max().clamp(min=1)
    torch.testing.assert_close(got / largest, expected / largest, rtol=0, atol=tolerance)


# putting a map in is verified for every mechanism in tests/recipes; here one for each way in which heads and windows are folded
FOLDED = ("vit", "rope_gqa", "beit_shared", "parallel", "differential", "swin", "hiera", "twins_svt", "halo", "convit", "cait")
FOLDED += ("latent", "levit_conv", "mqa", "xcit")


@pytest.mark.parametrize("name", [name for name in FOLDED if name in (*ANY_DTYPE, *MODELS)])
def test_maps_left_as_they_are_leave_the_output_as_it_was(name: str) -> None:
    model, x = lively(name) if name in MODELS else tiny(name)
    model, x = model.double(), x.double()
    layers = [n for n, m in model.named_modules() if find_recipe(m) is not None]
    seen: list[tuple[int, ...]] = []

    def same(attention: Tensor) -> Tensor:
        seen.append(tuple(attention.shape))
        return attention

    with torch.no_grad(), AttentionRecorder(model, layers=layers) as rec:
        expected = model(x)
        with rec.edit(dict.fromkeys(layers, same)):
            got = model(x)
        assert torch.equal(model(x), expected)
    near(got, expected)
    assert seen == [m.shape for m in rec.maps.values()]


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("name", [name for name in ("vit", "eva_split", "beit", "rope_gqa", "parallel") if name in TINY])
def test_logits_and_gradients_are_those_of_the_unfused_path_with_the_same_change(name: str, edit: Any) -> None:
    model, x = tiny(name, depth=3)
    model, x = model.double(), x.double()
    with AttentionRecorder(model) as rec:
        before = model(x)
        with rec.edit({1: edit}):
            output = model(x)
    with unfused(model, edited(1, edit)):
        expected = model(x)
    assert (before - output).abs().max() > 1e-3
    near(output, expected)
    for got, wanted in zip(gradients(output, model), gradients(expected, model)):
        near(got, wanted)


def test_an_edit_of_some_layers_leaves_the_maps_before_it_alone_and_moves_those_after_it() -> None:
    model, x = tiny("vit", depth=3)
    with torch.no_grad(), AttentionRecorder(model, passes="all") as rec:
        model(x)
        with rec.edit({"blocks.1.*": without_head}):
            model(x)
    own, edited = rec.passes
    assert torch.equal(own[0][...], edited[0][...])
    assert torch.equal(own[1][...], edited[1][...])  # what the module formed itself
    assert not torch.allclose(own[2][...], edited[2][...], atol=1e-4)
    rec.verify()


def test_globs_and_several_edits_of_one_layer_follow_each_other() -> None:
    model, x = tiny("vit")
    with torch.no_grad(), AttentionRecorder(model) as rec:
        with rec.edit({"blocks.*.attn": lambda a: a * 0.5, -1: lambda a: a * 2.0}):
            got = model(x)
        with rec.edit({0: lambda a: a * 0.5}):
            expected = model(x)
        with rec.edit({0: lambda a: a * 0.5}), rec.edit({0: lambda a: a * 0.25}):
            last = model(x)
        with rec.edit({0: lambda a: a * 0.125}):
            near(last, model(x), 1e-5)
    near(got, expected, 1e-5)
    with torch.no_grad(), rec:
        model.blocks[0].attn.mark = 5  # the module may be another one by then
        expected = model(x)
        with rec.edit({0: lambda a: a}):
            near(model(x), expected, 1e-5)


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_in_train_mode_randomness_is_that_of_the_forward_and_checkpoints_are_edited_too(reentrant: bool | None) -> None:
    model, x = tiny("vit", proj_drop_rate=0.3, drop_path_rate=0.3)
    model, x = model.double().train(), x.double().requires_grad_()
    torch.manual_seed(1)
    with unfused(model, edited(1, cubed)):
        expected = model(x)
        wanted, state = gradients(expected, model), torch.get_rng_state()
    if reentrant is not None:
        block = model.blocks[1]
        block.forward = lambda *args, own=block.forward, **_: checkpoint(own, *args, use_reentrant=reentrant)
    torch.manual_seed(1)
    with AttentionRecorder(model) as rec, rec.edit({1: cubed}):
        output = model(x)
        output.square().sum().backward()
    near(output, expected)
    assert torch.equal(torch.get_rng_state(), state)
    for got, want in zip([p.grad for p in model.parameters() if p.grad is not None], wanted):
        near(got, want)


def test_dropout_of_the_map_stays_on() -> None:
    model, x = Attention(48, 3, attn_drop=0.5).train(), torch.randn(1, 400, 48)
    with torch.no_grad(), AttentionRecorder(model) as rec, rec.edit({0: uniform}):
        model(x)
        spread = [model(x)[0].std(0).mean() for _ in range(2)]
        model.eval()
        still = model(x)[0].std(0).mean()
    assert min(spread) > 100 * still  # without dropout every query gets the same


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_and_in_inference_mode(dtype: torch.dtype) -> None:
    model, x = tiny("vit")
    with torch.autocast("cpu", dtype=dtype), torch.inference_mode(), AttentionRecorder(model) as rec:
        expected = model(x)
        with rec.edit({0: lambda a: a, 1: lambda a: a.half()}):
            got = model(x)
    assert got.dtype == expected.dtype
    near(got, expected, 3e-2)


@pytest.mark.parametrize("need_weights", [False, True])
def test_pytorch_s_own_attention_returns_the_weights_it_was_edited_to(need_weights: bool) -> None:
    model, x = nn.MultiheadAttention(24, 3, batch_first=True), torch.randn(2, 7, 24)
    with torch.no_grad(), AttentionRecorder(model) as rec, rec.edit({0: without_head}):
        output, weights = model(x, x, x, need_weights=need_weights, average_attn_weights=False)
        edited = without_head(rec.maps[0][...])
    v = rearrange(
        torch.nn.functional.linear(x, model.in_proj_weight[48:], model.in_proj_bias[48:]), "b n (h d) -> b h n d", h=3
    )
    near(output, model.out_proj(rearrange(edited @ v, "b h n d -> b n (h d)")), 1e-5)
    assert (weights is not None) == need_weights
    if need_weights:
        near(weights, edited, 1e-6)


def test_the_gradient_of_an_edited_map_is_that_of_the_map_that_was_used() -> None:
    model, x = tiny("vit")
    model, x = model.double(), x.double()
    used = []

    def edit(attention: Tensor) -> Tensor:
        used.append(without_edge(attention))
        return used[-1]

    with AttentionRecorder(model, gradients=True) as rec, rec.edit({0: edit}):
        end = model(x).square().sum()
        end.backward(retain_graph=True)
    near(rec.maps[0].gradient[...], torch.autograd.grad(end, used[0])[0])


def test_hooks_of_others_come_before_and_after_an_edit() -> None:
    model, x = tiny("vit")
    model, x = model.double(), x.double()
    attention = model.blocks[0].attn
    attention.register_forward_hook(lambda *made: made[2] * 3)
    with torch.no_grad(), AttentionRecorder(model) as rec, rec.edit({0: cubed}):
        attention.register_forward_pre_hook(lambda _, args: (args[0] * 0.5, *args[1:]))
        got = model(x)
    with torch.no_grad(), unfused(model, edited(0, cubed)):
        near(got, model(x))


@pytest.mark.parametrize("reentrant", [False, True])
def test_what_a_checkpoint_runs_again_is_edited_as_its_forward_was(reentrant: bool) -> None:
    """Wherever backward is called: after the edit, in another one, or in another thread."""
    model, x = tiny("vit")
    model, x = model.double(), x.double().requires_grad_()
    plain = gradients(model(x), model)
    with unfused(model, edited(1, cubed)):
        wanted = gradients(model(x), model)
    for block in model.blocks:
        block.forward = lambda x, own=block.forward, **_: checkpoint(own, x, use_reentrant=reentrant)

    def check(end: Tensor, expected: list[Tensor]) -> None:
        model.zero_grad()
        end.square().sum().backward()
        for got, want in zip([p.grad for p in model.parameters() if p.grad is not None], expected):
            near(got, want)

    with AttentionRecorder(model) as rec:
        before = model(x)
        with rec.edit({1: cubed}):
            output, other = model(x), model(x)
            with ThreadPoolExecutor(1) as pool:
                pool.submit(lambda: check(model(x), plain)).result()
            check(before, plain)
            check(other, wanted)
        after = model(x)
        with rec.edit({1: uniform}):
            check(output, wanted)
            check(after, plain)


def test_edits_of_two_recorders_follow_each_other_and_gradients_are_those_of_what_was_used() -> None:
    model, x = tiny("vit")
    model, x = model.double(), x.double()
    used: list[Tensor] = []

    def note(attention: Tensor) -> Tensor:
        used.append(attention)
        return attention

    with AttentionRecorder(model) as one, AttentionRecorder(model) as two:
        three = AttentionRecorder(model, gradients=True)
        with one.edit({1: cubed}), two.edit({1: lambda a: note(without_head(a))}), three:
            output = model(x)
        end = output.square().sum()
        end.backward(retain_graph=True)
        with two.edit({1: cubed}), one.edit({1: without_head}):
            near(model(x), output)
    near(three.maps[1].gradient[...], torch.autograd.grad(end, used[0])[0])


def test_positions_count_what_is_recorded() -> None:
    model, x = tiny("vit", depth=3)
    with torch.no_grad(), AttentionRecorder(model, layers=["blocks.2.*"]) as rec:
        with rec.edit({0: cubed}):
            got = model(x)
        with rec.edit({"blocks.2.attn": cubed}):
            assert torch.equal(model(x), got)
        with pytest.raises(LayerNotFoundError, match="no layer 1 to edit: 1 are recorded"), rec.edit({1: cubed}):
            pass


class Counts(Attention):
    calls = 0

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        self.calls += 1
        return super().forward(x, **options)


def test_a_module_that_counts_its_calls_is_edited_and_counts_them() -> None:
    module, x = Counts(48, 3), torch.randn(2, 7, 48, requires_grad=True)
    with AttentionRecorder(module, gradients=True, keep="maps") as rec:
        expected = module(x)
        with rec.edit({0: lambda a: a}):
            near(module(x), expected, 1e-6)
            expected.sum().backward()
    assert module.calls == 2


def test_a_forward_that_was_broken_off_leaves_no_edit_behind() -> None:
    model, x = tiny("vit")
    with torch.no_grad(), AttentionRecorder(model) as rec:
        expected = model(x)
        broken = model.blocks[0].attn.proj.register_forward_pre_hook(lambda *_: 1 / 0)
        with rec.edit({0: cubed}), broken, pytest.raises(ZeroDivisionError):
            model(x)
        assert torch.equal(model(x), expected)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_what_cannot_be_edited_is_refused_and_nothing_is_left() -> None:
    model, x = tiny("vit")
    rec = AttentionRecorder(model)
    with pytest.raises(RecorderError, match="edit inside its block"):
        rec.edit({0: without_head})
    with rec:
        with (
            pytest.raises(LayerNotFoundError, match=r"Did you mean 'blocks\.1\.attn'"),
            rec.edit({"blocks.1.atn": without_head}),
        ):
            pass
        with pytest.raises(ValueError, match=r"'blocks\.0\.attn' returned no map of shape \(2, 3, 17, 17\) but NoneType"):  # noqa: SIM117
            with rec.edit({0: lambda a: None}):  # type: ignore[arg-type, return-value]
                model(x)
        with pytest.raises(ValueError, match=r"but one of shape \(2, 17, 17\)"), rec.edit({0: lambda a: a[:, 0]}):
            model(x)
        with pytest.raises(UnreadableError, match="multiplies no two activations"), rec.edit({"norm": without_head}):
            model(x)
        with rec.edit({}):
            expected = model(x)
    assert torch.equal(model(x), expected)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("reentrant", [True, False])
def test_what_was_edited_in_checkpoints_is_forgotten_with_their_graph(reentrant: bool) -> None:
    model, x = tiny("vit", depth=1)
    block = model.blocks[0]
    block.forward = lambda x, own=block.forward, **_: checkpoint(own, x, use_reentrant=reentrant)
    with AttentionRecorder(model) as rec, rec.edit({0: without_head}):
        for _ in range(3):
            loss = model(x).sum()
            assert edits_in_checkpoints() == 1
            loss.backward()
            del loss
            gc.collect()
            assert edits_in_checkpoints() == 0


def test_edits_go_on_where_somebody_has_cleared_all_hooks() -> None:
    model, x = tiny("vit", depth=1)
    attn = model.blocks[0].attn
    with AttentionRecorder(model) as rec, torch.no_grad():
        plain = model(x)
        with rec.edit({0: without_head}):
            edited = model(x)
        attn._forward_hooks.clear()
        attn._forward_pre_hooks.clear()
        assert torch.equal(model(x), plain)
        with rec.edit({0: without_head}):
            assert torch.equal(model(x), edited)
        with AttentionRecorder(model) as other, other.edit({0: without_head}):
            assert torch.equal(model(x), edited)
    assert not attn._forward_hooks
    assert not attn._forward_pre_hooks


def test_an_edit_that_is_over_does_not_look_at_what_others_run_in_checkpoints() -> None:
    attn = Attention(16, 4).eval()
    nested = torch.nested.nested_tensor([torch.randn(3, 16), torch.randn(5, 16)], layout=torch.jagged)
    with AttentionRecorder(attn) as rec:
        with rec.edit({0: without_head}):
            pass
        try:
            expected: Any = type(checkpoint(attn.qkv, nested, use_reentrant=False))
            attn(nested)
        except Exception as error:
            expected = type(error)
        try:
            got: Any = type(checkpoint(attn, nested, use_reentrant=False))
        except Exception as error:
            got = type(error)
        assert got is expected
