"""Steps of optimizers, and writes that count no version: what was written before a map is read is noticed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.inside import forget_steps, sample_by_kernel
from support.models import tiny
from support.modes import operators_of
from support.oracle import own_map
from support.reading import read, same
from timm.utils import ModelEmaV3
from torch.optim import optimizer as torch_optimizer

from hookattn import AttentionRecorder, StaleMapError
from hookattn.analysis import compute_statistics, entropy, received


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


def one_weight(qkv: Any) -> None:
    qkv.weight.grad = torch.zeros_like(qkv.weight)
    qkv.weight.grad[77, 5] = 1


def one_bias(qkv: Any) -> None:
    qkv.bias.grad = torch.zeros_like(qkv.bias)
    qkv.bias.grad[5] = 1


def compiled(step: Callable[[], Any]) -> Any:
    return torch.compile(step, backend="aot_eager")()


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.inference_mode])
@pytest.mark.parametrize("run", [lambda step: step(), compiled], ids=["eager", "compiled"])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("touch", [one_weight, one_bias])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adagrad])
@pytest.mark.filterwarnings("ignore")  # of the compiler, about profilers
def test_a_step_on_a_single_value_makes_the_maps_of_its_module_stale(
    kind: Any, touch: Any, fused: bool, run: Any, mode: Any
) -> None:
    model: Any
    model, x = tiny("vit")
    optimizer = kind(model.parameters(), lr=0.1, fused=fused)
    with AttentionRecorder(model) as rec, AttentionRecorder(model, keep="maps") as kept, mode():
        model(x)
    before = read(rec)
    touch(model.blocks[0].attn.qkv)
    run(optimizer.step)
    name = "qkv.weight" if touch is one_weight else "qkv.bias"
    with pytest.raises(StaleMapError, match=f"'{name}' changed in place"):
        rec.maps[0][0, 0]
    assert torch.equal(rec.maps[1][...], before["blocks.1.attn"])  # nothing stepped on that
    assert same(read(kept), before)


def test_a_step_on_others_leaves_maps_readable() -> None:
    model: Any
    model, x = tiny("vit")
    model.blocks.requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
    with AttentionRecorder(model) as rec:
        model(x).sum().backward()
    before = read(rec)
    optimizer.step()
    assert same(read(rec), before)


def test_steps_are_counted_only_while_there_are_maps(monkeypatch: pytest.MonkeyPatch) -> None:
    forget_steps(monkeypatch)
    hooks = torch_optimizer._global_optimizer_post_hooks
    before = len(hooks)
    model, x = tiny("vit")
    with AttentionRecorder(model) as rec, AttentionRecorder(model) as other:
        model(x)
    m = other.maps[0]
    del rec, other
    assert len(hooks) == before + 1
    del m
    assert len(hooks) == before


@pytest.mark.parametrize("fused", [True, False])
def test_scaled_steps_make_maps_stale(fused: bool) -> None:
    model, x = tiny("vit")
    optimizer = torch.optim.AdamW(model.parameters(), fused=fused)
    scaler = torch.amp.GradScaler("cpu")
    with AttentionRecorder(model) as rec, torch.autocast("cpu", torch.float16):
        loss = model(x).float().square().mean()
    scaler.scale(loss).backward()
    rec.maps[0][0]
    scaler.step(optimizer)
    with pytest.raises(StaleMapError, match=r"'qkv\.weight'"):
        rec.maps[0][0]


def test_maps_of_an_averaged_model_outlive_a_step_but_not_the_next_average() -> None:
    model, x = tiny("vit")
    average, optimizer = ModelEmaV3(model), torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    with AttentionRecorder(average.module) as rec, torch.no_grad():
        average.module(x)
    before = read(rec)
    model(x).sum().backward()
    optimizer.step()
    assert same(read(rec), before)
    average.update(model)
    with pytest.raises(StaleMapError):
        rec.maps[0][0]


def test_weights_that_are_swapped_through_data_and_back_give_the_map_again() -> None:
    model: Any
    model, x = tiny("vit")
    with AttentionRecorder(model) as rec, torch.no_grad():
        model(x)
    before, weight = rec.maps[0][...], model.blocks[0].attn.qkv.weight
    kept = weight.detach().clone()
    weight.data[:, 1:] = 2 * kept[:, 1:]  # the first column stays
    with pytest.raises(StaleMapError, match="values of parameters"):
        rec.maps[0][0]
    weight.data.copy_(kept)
    assert torch.equal(rec.maps[0][...], before)


@pytest.fixture(params=["read at once", "gathered by a kernel"])
def samples(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values of parameters as they are sampled on the CPU, and as they are on other devices."""
    if request.param != "read at once":
        sample_by_kernel(monkeypatch)


def double(attn: Any) -> None:
    """Write in a way that counts no version."""
    attn.qkv.weight.data.mul_(2)


def halve(attn: Any) -> None:
    attn.qkv.weight.data.mul_(0.5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("samples")
def test_a_write_that_counts_no_version_is_noticed_and_undone_forgotten(dtype: torch.dtype) -> None:
    model, x = tiny("vit")
    attn: Any = model.to(dtype).blocks[0].attn  # type: ignore[index,union-attr]
    attn.qkv.weight.data[0, 0] = torch.nan  # which is not equal to itself
    with AttentionRecorder(model) as rec, torch.no_grad():
        model(x.to(dtype))
    before, kept = rec.maps[0][:, 1:], attn.qkv.weight.detach().clone()
    double(attn)
    with pytest.raises(StaleMapError, match="values of parameters changed"):
        rec.maps[0][0]
    rec.maps[1][0]
    attn.qkv.weight.data.copy_(kept)
    torch.testing.assert_close(rec.maps[0][:, 1:], before, rtol=0, atol=0, equal_nan=True)


@pytest.mark.usefixtures("samples")
def test_a_write_between_two_calls_of_one_forward_is_before_the_one_and_after_the_other() -> None:
    model: Any
    model, x = tiny("vit")
    first, second = (block.attn for block in model.blocks)

    def write(*_: Any) -> None:
        double(first)
        double(second)

    with AttentionRecorder(model) as rec, torch.no_grad(), first.register_forward_hook(write):
        model(x)
    with pytest.raises(StaleMapError, match="values of parameters changed"):
        rec.maps[0][0]
    with torch.no_grad():
        torch.testing.assert_close(rec.maps[1][...], own_map(second, rec.maps[1].x), rtol=0, atol=1e-6)


@pytest.mark.usefixtures("samples")
def test_a_write_for_one_call_alone_that_is_undone_after_it_makes_its_map_stale() -> None:
    model: Any
    model, x = tiny("vit")
    block = model.blocks[1]
    before, after = lambda *_: double(block.attn), lambda *_: halve(block.attn)
    with AttentionRecorder(model) as rec, torch.no_grad(), block.register_forward_pre_hook(before):
        block.register_forward_hook(after)
        model(x)
    rec.maps[0][0]
    with pytest.raises(StaleMapError, match="values of parameters changed"):
        rec.maps[1][0]


@pytest.mark.usefixtures("samples")
def test_values_are_those_of_the_parameters_where_they_lie_after_a_move_inside_the_block() -> None:
    model, x = tiny("vit")
    with AttentionRecorder(model) as rec, torch.no_grad():
        model.double()(x.double())
    rec.maps[0][0]
    double(model.blocks[0].attn)  # type: ignore[index,union-attr]
    with pytest.raises(StaleMapError, match="values of parameters changed"):
        rec.maps[0][0]


LOOK = "aten.equal.default"  # where somebody waits for a device


def recorded_elsewhere(patch: pytest.MonkeyPatch) -> tuple[Any, AttentionRecorder]:
    """A model whose parameters are looked at as they are on a GPU, and its maps."""
    sample_by_kernel(patch)
    model, x = tiny("vit")
    with AttentionRecorder(model) as rec, torch.no_grad():
        model(x)
    return model, rec


READ: dict[str, Callable[[AttentionRecorder], Any]] = {
    "a row": lambda rec: rec.maps[1][:, :, 0],
    "rows of all layers": lambda rec: rec.rows("cls"),
    "a map": lambda rec: rec.maps[1][...],
    "a statistic": lambda rec: compute_statistics(rec.maps[1], entropy, received),
}


@pytest.mark.parametrize("what", READ)
def test_a_device_is_waited_for_once_and_when_all_that_is_read_is_under_way(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, rec = recorded_elsewhere(monkeypatch)
    found = [
        name for name in operators_of(lambda: READ[what](rec)) if name in (LOOK, "aten._softmax.default", "aten.bmm.default")
    ]
    assert found.count(LOOK) == 1
    assert found[-1] == LOOK


@pytest.mark.parametrize("what", READ)
def test_what_was_read_of_other_values_is_not_handed_out(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, rec = recorded_elsewhere(monkeypatch)
    before = READ[what](rec)
    double(model.blocks[1].attn)
    with pytest.raises(StaleMapError, match=r"the map of 'blocks.1.attn' \(Attention\) is stale: values of parameters changed"):
        READ[what](rec)
    halve(model.blocks[1].attn)
    torch.testing.assert_close(READ[what](rec), before, rtol=0, atol=0)


def test_what_else_is_wrong_with_a_reading_is_told_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    model, rec = recorded_elsewhere(monkeypatch)
    double(model.blocks[1].attn)
    with pytest.raises(IndexError, match="query 99"):
        rec.maps[1][:, :, 99]
    with torch.no_grad():
        model.blocks[1].attn.qkv.weight.mul_(2)
    with pytest.raises(StaleMapError, match=r"qkv\.weight' changed in place"):
        rec.rows("cls")


MADE_AT_ONCE: dict[str, Any] = {
    "maps": "maps",
    "a function": lambda m: (m[:, :, 0], m[...], m.k[...], compute_statistics(m, entropy, received)),
}


@pytest.mark.parametrize("keep", MADE_AT_ONCE)
def test_what_is_made_while_the_model_runs_looks_at_no_values_and_waits_for_nothing(
    keep: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample_by_kernel(monkeypatch)
    model, x = tiny("vit")
    with torch.no_grad(), AttentionRecorder(model, keep=MADE_AT_ONCE[keep]):
        model(x)
        found = operators_of(lambda: model(x))
    with torch.no_grad(), AttentionRecorder(model, keep=MADE_AT_ONCE[keep], verify=keep == "maps"):
        model(x)
        looked_at = operators_of(lambda: model(x))
    alone = operators_of(lambda: model(x))
    assert LOOK not in found
    assert found.count("aten.cat.default") == alone.count("aten.cat.default")
    assert keep != "maps" or looked_at.count("aten.cat.default") > alone.count("aten.cat.default")


def test_not_a_number_is_no_change() -> None:
    model, x = tiny("vit")
    with torch.inference_mode():  # whose tensors have no version: their values are compared
        x = x.clone()
        x[0, 0, 0, 0] = torch.nan
        with AttentionRecorder(model) as rec:
            model(x)
        assert rec.maps[0][0].isnan().any()
        assert rec.maps[0][1].isfinite().all()
