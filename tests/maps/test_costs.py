"""What is read is what is paid for, in operations and elements counted; and what is cut short is still right."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support.inside import Projected
from support.models import SCORES, B, C, D, H, N, plain, randomise
from support.modes import Largest, operations_of
from support.oracle import unfused
from torch import Tensor, nn
from torch.autograd import forward_ad

from hookattn import AttentionRecorder

READINGS: dict[str, tuple[Any, int]] = {
    "the row of one token": ((slice(None), slice(None), 0), B * H * 2 * (C * D + D * C + C * N)),
    "that of one head": ((slice(None), 1, 0), B * 2 * (C * D + D * C + C * N)),
    "one head": ((slice(None), 1), B * (2 * 2 * N * C * D + SCORES)),
    "one image": (0, 2 * 2 * N * C * C + H * SCORES),
    "all rows": (..., B * (2 * 2 * N * C * C + H * SCORES)),
}


@pytest.mark.parametrize("reading", READINGS)
def test_operations_are_those_of_what_is_read(reading: str) -> None:
    index, expected = READINGS[reading]
    with AttentionRecorder(model := plain()) as rec, torch.no_grad():
        model(torch.randn(B, N, C).double())
    assert operations_of(lambda: rec.maps[0][index]) == expected


def test_a_row_of_many_tokens_forms_nothing_larger_than_x() -> None:
    tokens = 4_096
    with AttentionRecorder(model := plain().float()) as rec, torch.no_grad():
        model(torch.randn(1, tokens, C))
    with Largest() as seen, torch.no_grad():
        row = rec.maps[0][:, :, 0]
    assert seen.elements <= H * tokens
    torch.testing.assert_close(row.sum(-1), torch.ones(1, H))


def test_scores_are_formed_once_and_written_over() -> None:
    with AttentionRecorder(model := plain()) as rec, torch.no_grad():
        model(torch.randn(B, N, C).double())
    m = rec.maps[0]
    with torch.profiler.profile(profile_memory=True) as profile, torch.no_grad():
        m[...]
    assert profile.profiler is not None
    sizes = [e.nbytes() for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    assert sum(size >= B * H * N * N * 8 for size in sizes) == 1


# And still right


def test_a_constant_that_all_keys_of_a_query_have_drops_out() -> None:
    model, x = plain().float(), torch.randn(B, N, C)
    with torch.no_grad():
        model[0].qkv.bias[C : 2 * C] = 100.0  # type: ignore[index,union-attr]
        with AttentionRecorder(model) as rec:
            model(x)
        exact = copy.deepcopy(model).double()
        q, k, _ = exact[0].qkv(x.double()).unflatten(-1, (3, H, D)).permute(2, 0, 3, 1, 4)  # type: ignore[index,operator]
    expected = (q @ k.mT * D**-0.5).softmax(-1)[:, :, 0]
    torch.testing.assert_close(rec.maps[0][:, :, 0].double(), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("index", [(slice(None), slice(None), 0), ...], ids=["a row", "all rows"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_in_half_precision_what_is_read_is_no_further_from_float64_than_eager(
    dtype: torch.dtype, index: Any, autocast: bool
) -> None:
    model, x = plain().float(), torch.randn(B, N, C)
    if not autocast:
        model, x = model.to(dtype), x.to(dtype)
    exact = copy.deepcopy(model).double()
    with torch.no_grad(), AttentionRecorder(exact) as right:
        exact(x.double())
    with torch.no_grad(), torch.autocast("cpu", dtype, enabled=autocast), AttentionRecorder(model) as rec:
        model(x)
        with unfused(model[0]) as maps:  # type: ignore[index]
            model(x)
    expected = right.maps[0][index]
    ours, eager = ((m.double() - expected).pow(2).mean().sqrt() for m in (rec.maps[0][index], maps[0][index]))
    assert ours <= 1.02 * eager


@pytest.mark.parametrize("index", [(slice(None), slice(None), 0), ...], ids=["a row", "all rows"])
def test_gradients_through_what_is_read_are_those_of_the_formula(index: Any) -> None:
    model, x = plain(), torch.randn(B, N, C).double().requires_grad_()
    with AttentionRecorder(model, detach=False) as rec:
        model(x)
    parameters = [x, *model[0].qkv.parameters()]  # type: ignore[index,union-attr]
    weight = torch.randn_like(rec.maps[0][index])
    got = torch.autograd.grad((rec.maps[0][index] * weight).sum(), parameters)
    q, k, _ = model[0].qkv(x).unflatten(-1, (3, H, D)).permute(2, 0, 3, 1, 4)  # type: ignore[index,operator]
    expected = torch.autograd.grad(((q @ k.mT * D**-0.5).softmax(-1)[index] * weight).sum(), parameters)
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e, rtol=0, atol=1e-12)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")  # of torch's own formulas
def test_tangents_go_through_what_is_read() -> None:
    model, x, t = plain(), torch.randn(B, N, C).double(), torch.randn(B, N, C).double()
    model[0].fused_attn = False  # type: ignore[index,union-attr]  # the fused kernel has no tangents on the CPU

    def read(x: Tensor) -> Tensor:
        with AttentionRecorder(model, detach=False) as rec:
            model(x)
        read: Tensor = rec.maps[0][...]
        return read

    step = 1e-6
    with torch.no_grad():
        expected = (read(x + step * t) - read(x - step * t)) / (2 * step)
    torch.testing.assert_close(torch.func.jvp(read, (x,), (t,))[1], expected, rtol=0, atol=1e-7)
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(read(forward_ad.make_dual(x, t))).tangent
    assert tangent is not None
    torch.testing.assert_close(tangent, expected, rtol=0, atol=1e-7)


def test_a_projection_is_a_tensor_to_whoever_computes_with_it() -> None:
    x, weight, bias = torch.randn(2, 5, 6), torch.randn(3, 4, 6, requires_grad=True), torch.randn(3, 4)
    expected = torch.einsum("b n c, h d c -> b h n d", x, weight) + bias[:, None]
    projected = Projected(x, weight, bias)
    assert (projected.shape, projected.dtype, len(projected), projected.dim()) == ((2, 3, 5, 4), torch.float32, 2, 4)
    torch.testing.assert_close(torch.cat([projected * 1, projected]), torch.cat([expected, expected]))
    part = slice(1, 2), torch.tensor([2, 0])
    torch.testing.assert_close(projected.compute_part(*part, slice(3)), expected[1:, [2, 0], :3])
    torch.testing.assert_close(projected.narrowed(*part) * 1, expected[1:, [2, 0]])
    assert projected.requires_grad
    assert Projected(torch.randn(0, 5, 6), weight, None).sum() == 0


def test_a_projection_in_float64_stays_what_it_is_under_autocast_and_when_it_is_formed_outside() -> None:
    x, weight = torch.randn(2, 5, 6).double(), torch.randn(3, 4, 6).double()
    with torch.autocast("cpu", torch.bfloat16):
        inside, outside = Projected(x, weight), Projected(x, weight)
        inside.compute()
    for projected in (inside, outside):
        assert projected.dtype == projected.compute().dtype == torch.float64
        torch.testing.assert_close(projected * 1, torch.einsum("b n c, h d c -> b h n d", x, weight))


def large() -> dict[str, tuple[nn.Module, tuple[Any, ...]]]:
    """Modules on so many tokens that the map is larger than all else."""
    from timm.layers import attention2d, bottleneck_attn
    from timm.models import cait, levit, mvitv2, pvt_v2, twins
    from timm.models import vision_transformer_sam as sam

    tokens = torch.randn(1, 400, 16)
    image = torch.randn(1, 16, 20, 20)
    return {
        "sam": (sam.Attention(16, 4, use_rel_pos=True, input_size=(20, 20)), (torch.randn(1, 20, 20, 16),)),
        "mvit": (mvitv2.MultiScaleAttention(16, 16, (20, 20), 4, has_cls_token=False), (tokens, [20, 20])),
        "bottleneck": (bottleneck_attn.BottleneckAttn(16, num_heads=4, feat_size=(20, 20)), (image,)),
        "cait": (cait.TalkingHeadAttn(16, 4), (tokens,)),
        "levit": (levit.Attention(16, 4, 4, attn_ratio=1, resolution=20), (tokens,)),
        "pvt": (pvt_v2.Attention(16, 4, sr_ratio=2), (tokens, [20, 20])),
        "twins": (twins.GlobalSubSampleAttn(16, 4, sr_ratio=2), (tokens, (20, 20))),
        "multi_query": (attention2d.MultiQueryAttention2d(16, num_heads=4), (image,)),
    }


@pytest.mark.parametrize("name", large())
def test_a_row_never_forms_the_map(name: str) -> None:
    module, args = large()[name]
    randomise(module).eval()
    with torch.no_grad():
        module(*args)  # LeViT looks its biases up once
        with AttentionRecorder(module) as rec:
            module(*args)
    (m,) = rec.maps.values()
    queries, keys = m.shape[2:]
    with Largest() as row:
        m[:, :, 0]
    with Largest() as head:
        m[:, 0]
    with Largest() as whole:
        m[...]
    assert row.elements < queries * keys
    assert queries * keys <= head.elements < whole.elements == 4 * queries * keys or name == "cait"
