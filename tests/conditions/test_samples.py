"""Writes that count no version, by `.data`: some values of parameters tell of them, wherever those lie."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.inside import sample_by_kernel
from support.models import tiny
from support.modes import operators_of
from support.oracle import own_map

from hookattn import AttentionRecorder, StaleMapError
from hookattn.analysis import compute_statistics, entropy, received


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


def test_parameters_of_all_layers_are_looked_at_together(monkeypatch: pytest.MonkeyPatch) -> None:
    sample_by_kernel(monkeypatch)
    model: Any
    model, x = tiny("vit", depth=4)
    model.blocks[2].register_forward_pre_hook(lambda _, given: (given[0].double(),))
    model.blocks[2].double()  # of another width: in a kernel of its own
    model.blocks[3].register_forward_pre_hook(lambda _, given: (given[0].float(),))
    with AttentionRecorder(model) as rec, torch.no_grad():
        model(x)
    rec.rows("cls")
    cat, joined = torch.cat, list[int]()

    def note(tensors: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        joined.append(len(tensors))
        return cat(tensors, *args, **kwargs)

    monkeypatch.setattr(torch, "cat", note)
    rec.rows("cls")
    assert joined == [12, 4, 3]  # four parameters of each of three layers, those of one; and what they were before
