"""Maps in a loss: gradients through maps are those of the unfused path, and training on maps moves maps."""

from __future__ import annotations

from typing import Any

import pytest
import timm.layers as layers
import timm.models.swin_transformer as swin
import torch
from support.models import randomise, tiny
from support.oracle import unfused
from torch import Tensor, nn

from hookattn import QK, AttentionRecorder
from hookattn.analysis import divergence_from_mean, entropy


def kinds() -> dict[str, nn.Module]:
    """Attention of a few mechanisms, small enough to be differentiated by differences."""
    return {
        "plain": layers.Attention(8, 2, qkv_bias=True, qk_norm=True, norm_layer=nn.LayerNorm),
        "windows": swin.WindowAttention(8, 2, window_size=2),
        "pooling": layers.AttentionPoolLatent(8, num_heads=2, qk_norm=True, norm_layer=nn.LayerNorm),
        "pytorch": nn.MultiheadAttention(8, 2, batch_first=True),
    }


@pytest.mark.parametrize("keep", ["inputs", "maps"])
@pytest.mark.parametrize("kind", kinds())
def test_derivatives_of_a_map_are_those_of_differences(kind: str, keep: Any) -> None:
    module = randomise(kinds()[kind]).double().train()
    names = [name for name, _ in module.named_parameters()]
    x = torch.randn(2, 4, 8, dtype=torch.float64, requires_grad=True)

    def map_of(x: Tensor, *parameters: Tensor) -> Tensor:
        args = (x, x, x) if kind == "pytorch" else (x,)
        with AttentionRecorder(module, keep=keep, detach=False) as rec:
            torch.func.functional_call(module, dict(zip(names, parameters)), args)
        m: Tensor = rec.maps[0][...]
        return m

    inputs = (x, *(p.detach().requires_grad_() for p in module.parameters()))
    assert torch.autograd.gradcheck(map_of, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(map_of, inputs, fast_mode=True)


READINGS = {
    "map": (lambda m: m[...], lambda rows: rows),
    "a head": (lambda m: m[:, 1:], lambda rows: rows[:, 1:]),
    "entropy": (entropy, lambda rows: entropy_of(rows)),
    "divergence": (divergence_from_mean, lambda rows: divergence_of(rows)),
}


def entropy_of(rows: Tensor) -> Tensor:
    return -(rows * rows.clamp_min(1e-300).log()).sum(-1)


def divergence_of(rows: Tensor) -> Tensor:
    mean = rows.mean(1, keepdim=True)
    return (entropy_of((rows + mean) / 2) - (entropy_of(rows) + entropy_of(mean)) / 2).sum(-1) / 4


@pytest.mark.parametrize("kind", ["bool", "float", "lowest"])
@pytest.mark.parametrize("name", READINGS)
def test_by_what_a_mask_closes_a_loss_has_no_slope(name: str, kind: str) -> None:
    (read, of_rows), attention = READINGS[name], randomise(layers.Attention(8, 2, qkv_bias=True)).double()
    x, mask = torch.randn(2, 4, 8, dtype=torch.float64), torch.ones(4, 4, dtype=torch.bool).tril()
    mask[2] = kind == "lowest"  # a whole row, which is even where it is no more than low
    bias = torch.zeros(4, 4, dtype=torch.float64) if kind == "bool" else torch.randn(4, 4, dtype=torch.float64)
    closed = torch.finfo(bias.dtype).min if kind == "lowest" else -torch.inf
    ours, theirs = (x.clone().requires_grad_() for _ in range(2))
    with AttentionRecorder(attention, detach=False) as rec:
        attention(ours, attn_mask=mask if kind == "bool" else bias.masked_fill(~mask, closed))
    read(rec.maps[0]).pow(2).mul(100).sum().backward()

    q, k, _ = attention.qkv(theirs).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
    opened = mask.any(-1)
    rows = (q[:, :, opened] @ k.mT / 2 + bias[opened]).masked_fill(~mask[opened], -torch.inf).softmax(-1)
    of_rows(rows).pow(2).mul(100).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dual_lambda", [False, True])
def test_what_weighs_two_maps_learns_of_a_loss_by_their_sum(dual_lambda: bool) -> None:
    """On the fused kernel the sum is never formed: its gradient is that of the sum of the maps that the unfused path forms."""
    attention = layers.DiffAttention(8, 2, qkv_bias=True, dual_lambda=dual_lambda)
    randomise(attention).double().eval()
    x, formed = torch.randn(2, 4, 8, dtype=torch.float64, requires_grad=True), []
    with AttentionRecorder(attention, detach=False) as rec:
        attention(x)
    attention.fused_attn = False
    with attention.attn_drop.register_forward_pre_hook(lambda _, args: formed.append(args[0])):
        attention(x)
    first, second = formed[0].unflatten(1, (2, 2)).unbind(2)
    attention.fused_attn = True

    def gradients(total: Tensor) -> list[Tensor]:
        loss = total[:, :, 1:3].square().sum()
        return [*torch.autograd.grad(loss, [*attention.parameters()], allow_unused=True, materialize_grads=True)]

    ours, theirs = gradients(rec.maps[0].effective[...]), gradients(first - attention._compute_lambda() * second)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)


def distance(ours: list[Tensor], theirs: list[Tensor]) -> Tensor:
    """Kullback-Leibler divergence of rows, mean over rows, sum over layers."""
    return torch.stack([(t * (t / s).log()).sum(-1).mean() for s, t in zip(ours, theirs)]).sum()


@pytest.mark.parametrize("keep", ["inputs", "maps"])
def test_distilling_maps_is_training_on_the_unfused_softmax(keep: Any) -> None:
    """Two students, one taught by recorded maps and one by the maps of its own unfused path, go the same way."""
    teacher, x = tiny("vit_registers")
    teacher, x = teacher.double(), x.double()
    students = [tiny("vit_registers")[0].double().train() for _ in range(2)]
    students[1].load_state_dict(students[0].state_dict())
    with AttentionRecorder(teacher) as rec, torch.no_grad():
        teacher(x)
    theirs = [m[...] for m in rec.maps.values()]
    optimizers = [torch.optim.SGD(student.parameters(), lr=0.05) for student in students]
    distances = []
    for _ in range(10):
        with AttentionRecorder(students[0], keep=keep, detach=False) as rec:
            students[0](x)
        with unfused(students[1]) as softmaxes:
            students[1](x)
        for optimizer, maps in zip(optimizers, ([m[...] for m in rec.maps.values()], softmaxes)):
            end = distance(maps, theirs)
            optimizer.zero_grad()
            end.backward()
            optimizer.step()
            distances.append(end.item())
    torch.testing.assert_close(torch.tensor(distances[::2]), torch.tensor(distances[1::2]), rtol=1e-6, atol=0)
    assert distances[-1] < 0.8 * distances[0]
    moved = 0
    for ours, others in zip(students[0].parameters(), students[1].parameters()):
        torch.testing.assert_close(ours, others, rtol=1e-7, atol=1e-9)
        moved += ours.grad is not None
    assert moved > 10


def test_an_entropy_and_the_logits_can_be_in_one_loss() -> None:
    model, x = tiny("eva_split")
    model, x = model.double().train(), x.double()

    def loss(logits: Tensor, maps: list[Tensor]) -> Tensor:
        return logits.square().mean() + torch.stack([-(a * a.log()).sum(-1).mean() for a in maps]).sum()

    with AttentionRecorder(model, detach=False) as rec:
        logits = model(x)
    got = torch.autograd.grad(loss(logits, [m[...] for m in rec.maps.values()]), list(model.parameters()), allow_unused=True)
    with unfused(model) as softmaxes:
        logits = model(x)
    expected = torch.autograd.grad(loss(logits, softmaxes), list(model.parameters()), allow_unused=True)
    for a, b in zip(got, expected):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-10)


def test_a_bias_and_a_mask_are_in_a_map_that_autograd_follows() -> None:
    q, k = torch.randn(2, 3, 5, 4).double(), torch.randn(2, 3, 5, 4).double()
    bias, mask = torch.randn(3, 5, 5).double().requires_grad_(), torch.randn(2, 1, 1, 5) > -1
    mask[..., 0] = True
    expected = (q @ k.mT * 0.5 + bias).masked_fill(~mask, -torch.inf).softmax(-1)
    weight = torch.randn_like(expected)
    got = QK(q, k, scale=0.5, bias=bias, mask=mask).values()
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    gradients = [torch.autograd.grad((a * weight).sum(), bias)[0] for a in (got, expected)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-12)
