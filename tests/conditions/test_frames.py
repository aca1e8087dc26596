"""What counts as one forward: calls, methods and loops by hand, from any depth of the stack, also when one was broken off."""

from __future__ import annotations

import io
import itertools
import pdb
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.models import Raises, by_hand, tiny
from support.reading import NAMES, maps_of, same
from support.untouched import untouched
from timm.layers import Attention, Attention2d
from torch import Tensor, nn

from hookattn import AttentionRecorder, TokenError


class Shared(nn.Module):
    """One attention module, used twice in a forward."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = Attention(48, num_heads=3)

    def forward(self, x: Tensor) -> Tensor:
        return self.attn(self.attn(x))

    def encode(self, x: Tensor) -> Tensor:
        return self.attn(self.attn(x))

    def ensemble(self, x: Tensor) -> Tensor:
        return self(x) + self(-x)


@pytest.mark.parametrize("error", [ArithmeticError, KeyboardInterrupt])
@pytest.mark.parametrize("call", ["__call__", "forward", "forward_features"])
@pytest.mark.parametrize("keep", ["inputs", "maps"])
def test_a_forward_that_raises_midway_leaves_nothing_and_the_next_one_counts_afresh(call: str, keep: Any, error: Any) -> None:
    model, x = tiny("vit", depth=3)
    expected = maps_of(model, x)
    whole = model.blocks[1].mlp
    with untouched(model), torch.no_grad(), AttentionRecorder(model, keep=keep, passes="all") as rec:
        model.blocks[1].mlp = Raises(error)
        with pytest.raises(error, match="midway"):
            getattr(model, call)(x)
        model.blocks[1].mlp = whole
        getattr(model, call)(x)
    broken, complete = rec.passes
    assert list(broken) == NAMES
    assert same({name: m[...] for name, m in complete.items()}, expected)


@pytest.mark.parametrize("error", [ArithmeticError, KeyboardInterrupt])
@pytest.mark.parametrize("call", ["__call__", "forward_features"])
def test_a_forward_that_raised_is_over_though_its_error_is_kept(call: str, error: type[BaseException]) -> None:
    model, x = tiny("vit")
    with AttentionRecorder(model, passes="all") as rec, torch.no_grad():
        with pytest.raises(error) as kept, model.norm.register_forward_pre_hook(Raises(error).forward):
            getattr(model, call)(x)
        getattr(model, call)(-x)
    assert kept.traceback  # it holds the frames of the forward
    assert [list(maps) for maps in rec.passes] == [NAMES, NAMES]


@pytest.mark.parametrize("call", ["__call__", "forward_features"])
def test_a_debugger_changes_nothing(call: str) -> None:
    model, x = tiny("vit")

    def trace(frame: Any, event: str, arg: Any) -> Any:
        return trace

    before = sys.gettrace()
    with AttentionRecorder(model, passes="all") as rec, torch.no_grad():
        sys.settrace(trace)
        try:
            getattr(model, call)(x)
            getattr(model, call)(-x)
        finally:
            sys.settrace(before)
    assert [list(maps) for maps in rec.passes] == [NAMES, NAMES]


def test_a_breakpoint_in_the_middle_of_a_forward_changes_nothing() -> None:
    model, x = tiny("vit")

    def stop(*_: Any) -> None:
        debugger = pdb.Pdb(stdin=io.StringIO("c\n"), stdout=io.StringIO(), nosigint=True, readrc=False)
        debugger.set_trace(sys._getframe())

    before = sys.gettrace()
    with AttentionRecorder(model, passes="all") as rec, torch.no_grad(), model.blocks[1].norm1.register_forward_hook(stop):
        for image in (x, -x):
            model(image)
    sys.settrace(before)
    assert [list(maps) for maps in rec.passes] == [NAMES, NAMES]


CALLS: dict[str, Callable[[Any, Any], Any]] = {
    "model(x)": lambda x, model: model(x),
    "forward": lambda x, model: model.forward(x),
    "forward_features": lambda x, model: model.forward_features(x),
    "forward_intermediates": lambda x, model: model.forward_intermediates(x),
    "get_intermediate_layers": lambda x, model: model.get_intermediate_layers(x, n=2),
    "by hand": by_hand,
}


@pytest.mark.parametrize("call", CALLS)
def test_a_call_a_method_and_a_loop_by_hand_each_count_as_one_forward(call: str) -> None:
    model, x = tiny("vit")
    first, second = maps_of(model, x), maps_of(model, -x)
    with untouched(model), AttentionRecorder(model, passes="all") as rec, torch.no_grad():
        CALLS[call](x, model)
        CALLS[call](-x, model)
    kept = [{name: m[...] for name, m in maps.items()} for maps in rec.passes]
    assert [same(got, expected) for got, expected in zip(kept, [first, second])] == [True, True]
    assert len(kept) == 2


def test_calls_methods_and_loops_by_hand_can_follow_each_other_in_any_order() -> None:
    model, _ = tiny("vit")
    images = [torch.full((1, 3, 64, 64), float(i)) for i in range(40)]
    orders = itertools.chain.from_iterable(itertools.product(["model(x)", "forward_features", "by hand"], repeat=2))
    called = list(zip(orders, images))
    with AttentionRecorder(model, "blocks.0.attn", passes="all") as rec, torch.no_grad():
        for call, x in called:
            CALLS[call](x, model)
    assert len(rec.passes) == len(called) == 18
    for maps, (_, x) in zip(rec.passes, called):
        assert torch.equal(maps[0].x, model.blocks[0].norm1(model._pos_embed(model.patch_embed(x))))


def test_a_function_of_the_users_that_takes_the_model_first_is_no_forward() -> None:
    net, images = tiny("vit")

    def extract(model: Any, x: Tensor) -> AttentionRecorder:
        with AttentionRecorder(model, passes="all") as rec, torch.no_grad():
            model.forward_features(x)
            model.forward_features(-x)
        return rec

    def run_twice(model: Any, x: Tensor) -> None:
        model.forward_features(x)
        model.forward_features(-x)

    rec = extract(net, images)
    with AttentionRecorder(net, passes="all") as other, torch.no_grad():
        run_twice(net, images)
    for recorded in (rec, other):
        assert [list(maps) for maps in recorded.passes] == [NAMES, NAMES]


def test_a_module_called_by_two_functions_of_the_user_is_called_by_hand() -> None:
    net, x = tiny("vit")
    features = torch.randn(1, 17, 48)

    def first_block(model: Any) -> None:
        model.blocks[0](features)

    with AttentionRecorder(net, passes="all") as rec, torch.no_grad():
        first_block(net)
        first_block(net)
        net(x)
    assert [list(maps) for maps in rec.passes] == [NAMES[:1], NAMES[:1], NAMES]


def test_a_model_inside_the_recorded_one_can_be_called_alone() -> None:
    model, x = tiny("vit")
    outer = nn.Sequential(model, nn.Identity())
    with AttentionRecorder(outer, passes="all") as rec, torch.no_grad():
        outer(x)
        model(x)
        model.forward_features(x)
        model.forward_features(x)
    names = [f"0.{name}" for name in NAMES]
    assert [list(maps) for maps in rec.passes] == [names] * 4


@pytest.mark.parametrize("method", ["__call__", "encode"])
def test_a_module_called_twice_in_one_forward_gives_two_maps(method: str) -> None:
    model, x = Shared(), torch.randn(2, 5, 48)
    with AttentionRecorder(model, passes="all") as rec, torch.no_grad():
        getattr(model, method)(x)
        getattr(model, method)(-x)
    assert [list(maps) for maps in rec.passes] == [["attn", "attn#1"]] * 2
    for maps, sign in zip(rec.passes, (1, -1)):
        assert torch.equal(maps["attn"].x, sign * x)
        assert torch.equal(maps["attn#1"].x, model.attn(sign * x))
        assert maps["attn#1"].name == "attn#1"


def test_a_method_that_calls_the_model_twice_makes_two_forwards() -> None:
    model, x = Shared(), torch.randn(2, 5, 48)
    with AttentionRecorder(model, passes="all") as rec, torch.no_grad():
        model.ensemble(x)
    assert [list(maps) for maps in rec.passes] == [["attn", "attn#1"]] * 2


@pytest.mark.parametrize("call", ["model(x)", "forward_features", "by hand"])
def test_the_size_of_the_image_is_that_of_its_own_forward(call: str) -> None:
    model, _ = tiny("vit", dynamic_img_size=True)
    sizes = [(64, 32), (32, 64), (48, 48)]
    with AttentionRecorder(model, passes="all") as rec, torch.no_grad():
        for size in sizes:
            CALLS[call](torch.randn(1, 3, *size), model)
    grids = [[m.tokens.grid_size for m in maps.values()] for maps in rec.passes]
    assert grids == [[(4, 2)] * 2, [(2, 4)] * 2, [(3, 3)] * 2]


def test_each_map_knows_the_size_of_its_own_image() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk, _ = tiny("vit", dynamic_img_size=True)

        def forward(self, first: Tensor, second: Tensor) -> Tensor:
            return self.trunk(first) + self.trunk(second)

        def compare(self, first: Tensor, second: Tensor) -> Tensor:
            return self.forward(first, second)

    model = Pair()
    with AttentionRecorder(model, "trunk.blocks.0.*", passes="all") as rec, torch.no_grad():
        model(torch.randn(1, 3, 64, 32), torch.randn(1, 3, 32, 64))
        model.compare(torch.randn(1, 3, 48, 48), torch.randn(1, 3, 16, 64))
    grids = [[m.tokens.grid_size for m in maps.values()] for maps in rec.passes]
    assert grids == [[(4, 2), (2, 4)], [(3, 3), (1, 4)]]


@pytest.mark.parametrize("call", ["model(x)", "forward_features", "by hand"])
def test_a_call_that_saw_no_image_is_not_one_of_the_last_image(call: str) -> None:
    model: Any = tiny("vit", dynamic_img_size=True)[0]
    with AttentionRecorder(model) as rec, torch.no_grad():
        CALLS[call](torch.randn(1, 3, 64, 32), model)
        model.blocks[0].attn(torch.randn(1, 9, 48))
    with pytest.raises(TokenError, match="9 tokens are no grid of patches over an image of unknown size"):
        rec.maps[0].tokens  # noqa: B018


def test_a_map_that_is_read_inside_the_block_starts_no_forward() -> None:
    attn, x = Attention2d(16, 16, num_heads=2).eval(), torch.randn(1, 16, 4, 4)  # no recipe: it is run again to be read
    with AttentionRecorder(attn, passes="all") as rec, torch.no_grad():
        attn(x)
        inside = rec.maps[0][...]
        rec.verify()
        assert len(rec.passes) == 1
    assert torch.equal(rec.maps[0][...], inside)


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
