"""What a call costs that nobody reads: no operator, no tensor, no copy; and still the map of that call, or a refusal."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.inside import sample_by_kernel
from support.models import TINY, tiny
from support.modes import operators_of
from support.oracle import own_map, unfused
from timm.layers import Attention
from torch import Tensor, nn

from hookattn import AttentionRecorder, StaleMapError

# one for each kind of state: parameters alone, buffers, rope, an empty cache, norms with statistics, windows
MODELS = [name for name in ("vit", "beit", "rope_mixed", "rope_gqa", "relpos", "differential") if name in TINY]


@pytest.mark.parametrize("name", MODELS)
def test_recording_calls_no_operator_and_makes_no_tensor(name: str) -> None:
    model, x = tiny(name)
    with torch.no_grad():
        alone = operators_of(lambda: model(x))
        with AttentionRecorder(model) as rec:
            assert operators_of(lambda: model(x)) == alone
    assert len(rec.maps) == len(rec.layers)


def test_with_a_graph_recording_cuts_x_off_from_it_and_that_is_all() -> None:
    model, x = tiny("vit")
    alone = operators_of(lambda: model(x))
    with AttentionRecorder(model):
        recorded = operators_of(lambda: model(x))
    detached = "aten.detach.default"
    assert [name for name in recorded if name != detached] == [name for name in alone if name != detached]
    assert recorded.count(detached) - alone.count(detached) in (2, 4)  # PyTorch 2.6 shows each twice


def test_what_is_kept_with_nothing_read_is_the_inputs_themselves() -> None:
    model, x = tiny("vit")
    seen: list[Tensor] = []
    for block in model.blocks:  # type: ignore[union-attr]
        block.attn.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with AttentionRecorder(model) as rec, torch.no_grad():
        model(x)
    assert all(m.x is own for m, own in zip(rec.maps.values(), seen, strict=True))


# And still the map of that call


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


class Unevenly(nn.Module):
    """Calls one attention from another depth of the stack each time, and one from a method called by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = Attention(16, 4)

    def forward(self, x: Tensor, depths: list[int]) -> Tensor:
        for depth in depths:
            x = self.deeper(x, depth)
        return x

    def deeper(self, x: Tensor, depth: int) -> Tensor:
        out: Tensor = self.deeper(x, depth - 1) if depth else self.attn(x)
        return out


@pytest.mark.parametrize("call", ["__call__", "forward"])
def test_calls_from_any_depth_of_the_stack_belong_to_the_forward_that_runs(call: str) -> None:
    model, x = Unevenly(), torch.randn(1, 3, 16)
    depths = [3, 0, 25, 1, 1, 0, 60]
    with AttentionRecorder(model, passes="all") as rec, torch.no_grad():
        getattr(model, call)(x, depths)
        getattr(model, call)(x, depths[::-1])
        model.attn(x)
    assert [len(maps) for maps in rec.passes] == [len(depths), len(depths), 1]


def test_what_runs_where_an_interrupted_forward_ran_is_no_part_of_it() -> None:
    model, x = Unevenly(), torch.randn(1, 3, 16)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    def run(interrupted: bool) -> None:
        if interrupted:
            with model.attn.register_forward_hook(interrupt):
                model(x, [0])
        else:
            model.attn(x)

    with AttentionRecorder(model, passes="all") as rec, torch.no_grad():
        with pytest.raises(KeyboardInterrupt):
            run(True)
        run(False)
        run(False)
    assert [list(maps) for maps in rec.passes] == [["attn"]] * 3


class Cached(Attention):  # type: ignore[misc]
    """Adds what it has in a cache to its input."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        return super().forward(x + self.cache["offset"])  # type: ignore[no-any-return]


def test_a_cache_that_is_written_into_after_the_call_makes_its_map_stale() -> None:
    attn, x = Cached(16, 4), torch.randn(2, 5, 16)
    attn.cache = {"offset": torch.randn(5, 16)}
    with AttentionRecorder(attn) as rec, torch.no_grad():
        attn(x)
    attn.cache = {**attn.cache, "another": torch.zeros(1)}  # what was in it is held
    torch.testing.assert_close(rec.maps[0][...], own_map(attn, x + attn.cache["offset"]), rtol=0, atol=1e-6)
    attn.cache["offset"].add_(1)
    with pytest.raises(StaleMapError, match="a cache inside the module changed"):
        rec.maps[0][0]


def test_arguments_are_those_of_the_call_whatever_a_hook_makes_of_their_dict_later() -> None:
    attn, x = Attention(16, 4).eval(), torch.randn(2, 5, 16)
    mask = torch.zeros(5, 5).masked_fill(torch.rand(5, 5) > 0.7, -3.0)
    attn.register_forward_hook(lambda _module, _args, given, _output: given.clear(), with_kwargs=True)
    with AttentionRecorder(attn) as rec, torch.no_grad(), unfused(attn) as maps:
        attn(x, attn_mask=mask)
    torch.testing.assert_close(rec.maps[0][...], maps[0], rtol=0, atol=1e-6)


def test_maps_that_are_kept_let_go_of_all_tensors_of_the_call_however_they_were_given() -> None:
    attn, given = Attention(16, 4), {"x": torch.randn(2, 5, 16), "attn_mask": torch.zeros(5, 5)}
    held = [weakref.ref(tensor) for tensor in given.values()]
    with AttentionRecorder(attn, keep="maps") as rec, torch.no_grad():
        attn(**given)
    given.clear()
    assert [tensor() for tensor in held] == [None, None]
    assert rec.maps[0].shape == (2, 4, 5, 5)


class Outer(Attention):  # type: ignore[misc]
    """Leaves its work to another attention inside, which is run again when the map of either is read."""

    def __init__(self) -> None:
        super().__init__(16, 4)
        self.inner = Attention(16, 4)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        return self.inner(x)  # type: ignore[no-any-return]


def test_reading_inside_the_block_records_nothing() -> None:
    model, x = nn.Sequential(Outer()), torch.randn(2, 5, 16)
    with AttentionRecorder(model, passes="all") as rec, torch.no_grad():
        model(x)
        outer, inner = rec.maps
        torch.testing.assert_close(rec.maps[outer][...], rec.maps[inner][...], rtol=0, atol=1e-6)
        assert [list(maps) for maps in rec.passes] == [["0", "0.inner"]]
