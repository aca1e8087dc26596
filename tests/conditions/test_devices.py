"""The same on a CPU and on a GPU: what reading is worth is measured on the one and used on the other."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support.models import TINY, tiny
from support.oracle import unfused
from timm.models.swin_transformer import SwinTransformerBlock
from torch import Tensor, nn

from hookattn import AttentionRecorder
from hookattn.analysis import compute_statistics, entropy, received
from hookattn.testing import check_recipe

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=needs_cuda)]
NAMES = [name for name in ("vit", "rope_axial", "beit", "parallel", "differential") if name in TINY]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def on(device: str, name: str, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model, x = tiny(name, **options)
    return model.to(device, dtype), x.to(device, dtype)


def first_map(model: nn.Module, x: Tensor) -> Tensor:
    """What the unfused path of the first layer makes."""
    with unfused(model) as softmaxes, torch.no_grad():
        model(x)
    return softmaxes[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("device", DEVICES)
def test_outputs_stay_what_they_are_and_maps_are_as_exact_as_the_unfused_path(
    device: str, name: str, dtype: torch.dtype
) -> None:
    model, x = on(device, name, dtype)
    with torch.no_grad():
        expected = model(x)
        with AttentionRecorder(model) as late, AttentionRecorder(model, keep="maps") as kept:
            assert torch.equal(model(x), expected)
    unfused, exact = first_map(model, x), first_map(copy.deepcopy(model).double(), x.double())
    for m in (late.maps[0], kept.maps[0]):
        assert (m.device.type, m.dtype) == (device, torch.float32)
        error, allowed = (float((found - exact).pow(2).mean().sqrt()) for found in (m[...], unfused))
        assert error <= 1.02 * allowed + 1e-8
        assert (m[...].sum(-1) - 1).abs().max() < 2e-6
    late.verify()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("device", DEVICES)
def test_what_is_read_in_part_is_what_is_read_in_whole(device: str, dtype: torch.dtype) -> None:
    """A row may absorb the projection of the keys, which rounds in other places."""
    model, x = on(device, "vit", dtype)
    with AttentionRecorder(model) as rec, torch.no_grad():
        model(x)
    m, close = rec.maps[-1], {torch.float32: 1e-5}.get(dtype, 5e-2)
    whole = m[...]
    for index in [(slice(None), slice(None), 0), (slice(None), 1), 0, (-1, -1, -1)]:
        assert m[index].device.type == device
        torch.testing.assert_close(m[index], whole[index], rtol=0, atol=close)
    for found, expected in zip(compute_statistics(m, entropy, received), (torch.special.entr(whole).sum(-1), whole.mean(2))):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("device", DEVICES)
def test_a_map_is_that_of_the_forward_under_autocast_and_in_train_mode(device: str) -> None:
    model, x = on(device, "vit")
    with AttentionRecorder(model) as rec, torch.no_grad(), torch.autocast(device, torch.bfloat16):
        model(x)
        inside = rec.maps[0][...]
    assert torch.equal(rec.maps[0][...], inside)
    model, x = on(device, "vit", proj_drop_rate=0.3, pos_drop_rate=0.3)
    model.train()
    torch.manual_seed(1)
    expected = model(x)
    torch.manual_seed(1)
    with AttentionRecorder(model) as late, AttentionRecorder(model, keep="maps") as kept:
        assert torch.equal(model(x), expected)
    assert all(torch.equal(late.maps[name][...], kept.maps[name][...]) for name in late.maps)


@pytest.mark.parametrize("device", DEVICES)
def test_maps_of_a_compiled_model_are_brought_to_the_cpu(device: str) -> None:
    model, x = on(device, "vit")
    compiled: Any = torch.compile(model)
    with AttentionRecorder(compiled, keep="maps", device="cpu", dtype=torch.float16) as rec, torch.no_grad():
        compiled(x)
    m = rec.maps[-1]
    assert (m.device.type, m.dtype, m[...].device.type) == ("cpu", torch.float16, "cpu")
    torch.testing.assert_close(m[...].sum(-1), torch.ones(m.shape[:3]).half(), rtol=0, atol=1e-2)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("device", DEVICES)
def test_gradients_of_maps_are_those_of_the_unfused_path(device: str, name: str) -> None:
    model, x = on(device, name)
    with AttentionRecorder(model, gradients=True) as rec:
        model(x)[:, 0].sum().backward()
    with unfused(model) as softmaxes:
        output = model(x)[:, 0].sum()
        gradients = torch.autograd.grad(output, softmaxes)
    assert len(gradients) == len(rec.maps)
    for m, expected in zip(rec.maps.values(), gradients):
        torch.testing.assert_close(m.gradient[...], expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("device", DEVICES)
def test_recipes_and_partitions_are_checked_where_the_module_lies(device: str) -> None:
    block = SwinTransformerBlock(24, (8, 12), num_heads=4, window_size=4, shift_size=2).to(device)
    check_recipe(block, torch.randn(2, 8, 12, 24, device=device))
    check_recipe(block.attn, torch.randn(4, 16, 24, device=device))


@needs_cuda
def test_with_nothing_read_a_gpu_holds_the_inputs_and_nothing_else() -> None:
    model, x = on("cuda", "vit")
    with torch.no_grad():
        expected = model(x)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        with AttentionRecorder(model) as rec:
            output = model(x)
        assert torch.equal(output, expected)
        del output
        held = torch.cuda.memory_allocated() - before
    inputs = sum(-(-m.x.untyped_storage().nbytes() // 512) * 512 for m in rec.maps.values())
    assert held <= inputs + 512 * (1 + 2 * len(rec.maps))  # and what tells whether a parameter has changed
