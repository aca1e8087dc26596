"""The recorder touches a model between `with` and the end of the block, and the model does not notice."""

from __future__ import annotations

import copy
import gc
import io
import itertools
import linecache
import pdb
import pickle
import sys
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import timm.layers
import torch
from support.models import TINY, Raises, by_hand, tiny
from support.oracle import own_map
from support.reading import NAMES, maps_of, read, same
from support.untouched import untouched
from timm.layers import Attention, Attention2d
from torch import Tensor, nn

from hookattn import AttentionMap, AttentionRecorder, LayerNotFoundError, NoMapError, RecorderError, TokenError

DROPOUT = {"proj_drop_rate": 0.3, "attn_drop_rate": 0.3, "drop_path_rate": 0.3}


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


class Reversed(nn.Module):
    """Attention modules that run in another order than they stand in."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (Attention(48, num_heads=3) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.a(self.b(self.c(x)))


# The model does not notice


@pytest.mark.parametrize("name", TINY)
def test_outputs_are_bit_identical_and_nothing_is_left_on_the_model(name: str) -> None:
    model, x = tiny(name)
    with torch.no_grad():
        expected = model(x)
        with untouched(model):
            with AttentionRecorder(model, called_from=True) as rec, AttentionRecorder(model, keep="maps"):
                assert torch.equal(model(x), expected)
            assert torch.equal(model(x), expected)
    assert len(rec.maps) > 0


@pytest.mark.parametrize("options", [{}, {"keep": "maps"}, {"keep": "maps", "detach": False}], ids=str)
@pytest.mark.parametrize("name", ["vit", "eva_split", "beit_shared", "parallel", "differential"])
def test_outputs_and_gradients_in_train_mode_are_bit_identical(name: str, options: dict[str, Any]) -> None:
    model, x = tiny(name, **DROPOUT)
    model.train()
    results = []
    for recorded in (False, True):
        torch.manual_seed(1)
        with untouched(model):
            if recorded:
                with AttentionRecorder(model, **options):
                    loss = model(x).square().sum()
            else:
                loss = model(x).square().sum()
        results.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("name", ["vit", "eva_split", "beit", "relpos"])
def test_outputs_and_gradients_under_autocast_are_bit_identical(name: str) -> None:
    """The recorder computes maps in between; what autocast remembers of that must not reach the model."""
    model, x = tiny(name)
    results = []
    for recorded in (False, True):
        with torch.autocast("cpu", torch.bfloat16):
            if recorded:
                with AttentionRecorder(model, keep="maps"):
                    output = model(x)
            else:
                output = model(x)
        results.append([output, *torch.autograd.grad(output.float().square().sum(), list(model.parameters()))])
    assert all(type(t) is Tensor for t in results[1])
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_nothing_is_left_when_the_body_raises(error: type[BaseException]) -> None:
    model, x = tiny("vit")
    expected = maps_of(model, x)
    rec = AttentionRecorder(model, called_from=True)

    def body() -> None:
        with rec, torch.no_grad():
            model(x)
            raise error("mine")

    with untouched(model), pytest.raises(error, match="mine"):
        body()
    assert same(read(rec), expected)


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


def test_hooks_that_could_not_all_be_put_on_are_taken_off_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = tiny("vit")
    rec = AttentionRecorder(model)
    with monkeypatch.context() as patch, untouched(model):
        patch.setattr(nn.Module, "register_forward_hook", Raises.forward)
        with pytest.raises(TypeError), rec:
            raise AssertionError("the block was entered")
    with rec:
        model(x)
    assert list(rec.maps) == NAMES


def saved_and_loaded(model: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[nn.Module], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": saved_and_loaded,
}


class Copied(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        copy.deepcopy(self)
        return x


@pytest.mark.parametrize("call", ["__call__", "forward_features"])
@pytest.mark.parametrize("made", COPIES)
@pytest.mark.parametrize("options", [{}, {"called_from": True}], ids=str)
def test_a_copy_made_inside_the_block_works_is_not_recorded_and_carries_nothing_of_ours(
    call: str, made: str, options: dict[str, Any]
) -> None:
    model, x = tiny("vit")
    expected = maps_of(model, x)
    with AttentionRecorder(model, passes="all", **options) as rec, torch.no_grad():
        output = getattr(model, call)(x)
        twin = COPIES[made](model)
        assert torch.equal(getattr(twin, call)(x), output)
        getattr(twin, call)(-x)
    assert len(rec.passes) == 1
    assert same(read(rec), expected)
    assert torch.equal(getattr(twin, call)(x), output)
    hooks = [hook for m in twin.modules() for hook in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    assert "hookattn" not in {str(getattr(hook, "__module__", None)).split(".")[0] for hook in hooks}
    with AttentionRecorder(twin) as rec, torch.no_grad():
        twin(x)
    assert same(read(rec), expected)


def test_a_file_written_inside_the_block_does_not_need_hookattn() -> None:
    file = io.BytesIO()
    model, x = tiny("vit")
    with AttentionRecorder(model, called_from=True), torch.no_grad():
        model(x)
        torch.save(model, file)
    assert b"hookattn" not in file.getvalue()


def test_a_model_that_is_watched_can_be_copied_in_the_middle_of_it() -> None:
    model = nn.Sequential(nn.Linear(3, 3), Copied())
    with AttentionRecorder(model):
        model(torch.randn(2, 3))


# Which modules

CHOICES: list[tuple[Any, list[int]]] = [
    (None, [0, 1, 2]),
    ("blocks.1.attn", [1]),
    ("blocks.*.attn", [0, 1, 2]),
    ("blocks.[02].attn", [0, 2]),
    ("*2*", [2]),
    ("blocks.0", [0]),
    ("blocks", [0, 1, 2]),
    (0, [0]),
    (-1, [2]),
    (-3, [0]),
    ([-1, "blocks.0"], [0, 2]),
    ((1,), [1]),
    (["blocks.1", "blocks.1.attn", 1], [1]),
    (lambda name, _: name.startswith("blocks.1."), [1]),
    (lambda _, module: isinstance(module, Attention), [0, 1, 2]),
]


@pytest.mark.parametrize(("layers", "expected"), CHOICES, ids=str)
def test_layers_narrows_by_name_glob_container_index_list_and_predicate(layers: Any, expected: list[int]) -> None:
    model, x = tiny("vit", depth=3)
    names = [f"blocks.{i}.attn" for i in expected]
    with AttentionRecorder(model, layers) as rec, torch.no_grad():
        model(x)
    assert rec.layers == names
    assert list(rec.maps) == names


def test_a_container_is_not_taken_for_another_whose_name_begins_alike() -> None:
    model, _ = tiny("vit", depth=11)
    assert AttentionRecorder(model, "blocks.1").layers == ["blocks.1.attn"]


def test_a_module_that_is_not_known_as_attention_is_recorded_when_it_is_called_by_its_name() -> None:
    model, x = tiny("vit")
    with AttentionRecorder(model, ["blocks.1.attn", "blocks.0.mlp"]) as rec, torch.no_grad():
        model(x)
    assert set(rec.layers) == {"blocks.0.mlp", "blocks.1.attn"}
    assert list(rec.maps) == ["blocks.0.mlp", "blocks.1.attn"]


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("blocks.0.atn", r"'blocks\.0\.atn'.*Did you mean 'blocks\.0\.attn'"),
        ("block.1.attn", r"Did you mean .*'blocks\.1\.attn'"),
        ("zzz", r"There is: blocks\.0\.attn, blocks\.1\.attn"),
        ("blocks.7*", r"no attention module is called 'blocks\.7\*'"),
        (["blocks.0.attn", "blocks.9.attn"], r"'blocks\.9\.attn'"),
        (2, r"no layer 2: the model has 2 attention modules, 0 to 1"),
        (-3, r"no layer -3"),
        (lambda *_: False, r"accepts none of blocks\.0\.attn, blocks\.1\.attn"),
        ([], r"layers"),
    ],
    ids=str,
)
def test_layers_that_name_nothing_are_refused_with_near_misses(layers: Any, message: str) -> None:
    model, _ = tiny("vit")
    with untouched(model), pytest.raises(LayerNotFoundError, match=message):
        AttentionRecorder(model, layers)


def test_an_attention_module_alone_can_be_recorded() -> None:
    attn, x = Attention(48, num_heads=3), torch.randn(2, 5, 48)
    with untouched(attn), AttentionRecorder(attn) as rec, torch.no_grad():
        attn(x)
        attn(-x)
    assert [m.shape for m in rec.maps.values()] == [(2, 3, 5, 5)]
    assert torch.equal(rec.maps[0].x, -x)


# The maps of a forward


def test_maps_stand_in_the_order_of_execution_and_answer_to_name_position_and_slice() -> None:
    model, x = Reversed(), torch.randn(2, 5, 48)
    with AttentionRecorder(model) as rec, torch.no_grad():
        model(x)
    maps = rec.maps
    assert rec.layers == ["a", "b", "c"]
    assert list(maps) == ["c", "b", "a"]
    assert [m.name for m in maps.values()] == ["c", "b", "a"]
    assert len(maps) == 3
    assert maps[-1] is maps[2] is maps["a"]
    assert maps[:2] == [maps[0], maps[1]]
    assert maps[::-1] == [maps[2], maps[1], maps[0]]
    assert all(repr(m) in repr(maps) for m in maps.values())


def test_maps_tell_whether_a_name_is_among_them() -> None:
    model, x = tiny("vit")
    with AttentionRecorder(model) as rec, torch.no_grad():
        model(x)
    assert "blocks.1.attn" in rec.maps
    assert "blocks.1" not in rec.maps
    assert rec.maps.get("blocks.1") is None


def test_maps_that_are_not_there_are_refused_with_near_misses() -> None:
    model, x = tiny("vit")
    with AttentionRecorder(model) as rec, torch.no_grad():
        model(x)
    with pytest.raises(LayerNotFoundError, match=r"'blocks\.1\.atn'.*Did you mean 'blocks\.1\.attn'"):
        rec.maps["blocks.1.atn"]
    for position in (2, -3):
        with pytest.raises(LayerNotFoundError, match=f"no map {position}: 2 were recorded"):
            rec.maps[position]


def test_passes_last_keeps_one_forward_and_passes_all_keeps_each() -> None:
    model, x = tiny("vit")
    first, second = maps_of(model, x), maps_of(model, 2 * x)
    for passes in ("last", "all"):
        with AttentionRecorder(model, passes=passes) as rec, torch.no_grad():
            model(x)
            model(2 * x)
        kept = [{name: m[...] for name, m in maps.items()} for maps in rec.passes]
        assert len(kept) == (2 if passes == "all" else 1)
        assert same(kept[-1], second)
        assert same(kept[0], first if passes == "all" else second)
        assert same(read(rec), second)


@pytest.mark.parametrize("passes", ["last", "all"])
def test_maps_are_never_those_of_an_earlier_forward(passes: Any) -> None:
    model, x = tiny("vit")
    with AttentionRecorder(model, passes=passes) as rec, torch.no_grad():
        model(x)
        model.blocks, blocks = nn.Sequential(), model.blocks
        model(x)
        model.blocks = blocks
    with pytest.raises(NoMapError, match="called none of"):
        rec.maps  # noqa: B018


# What counts as one forward

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
    with AttentionRecorder(model, "trunk.blocks.0", passes="all") as rec, torch.no_grad():
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


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("options", [{}, {"keep": "maps"}, {"detach": False}, {"keep": "maps", "detach": False}], ids=str)
def test_gradient_checkpointing_records_each_forward_once(
    monkeypatch: pytest.MonkeyPatch, reentrant: bool, options: dict[str, Any]
) -> None:
    monkeypatch.setattr(timm.layers.config, "_USE_REENTRANT_CKPT", reentrant)
    model, x = tiny("vit")
    expected = maps_of(model, x)
    model.train()
    model.set_grad_checkpointing()
    gradients = []
    for recorded in (False, True):
        model.zero_grad()
        with untouched(model):
            if recorded:
                with AttentionRecorder(model, passes="all", **options) as rec:
                    model(x).square().sum().backward()
            else:
                model(x).square().sum().backward()
            gradients.append([p.grad for p in model.parameters()])
            model.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(*gradients))
    assert [list(maps) for maps in rec.passes] == [NAMES]
    assert same({name: m.detach() for name, m in read(rec).items()}, expected)


def test_a_map_that_is_read_inside_the_block_starts_no_forward() -> None:
    attn, x = Attention2d(16, 16, num_heads=2).eval(), torch.randn(1, 16, 4, 4)  # no recipe: it is run again to be read
    with AttentionRecorder(attn, passes="all") as rec, torch.no_grad():
        attn(x)
        inside = rec.maps[0][...]
        rec.verify()
        assert len(rec.passes) == 1
    assert torch.equal(rec.maps[0][...], inside)


# What is kept


@pytest.mark.parametrize("name", TINY)
def test_maps_that_are_kept_are_those_computed_from_the_inputs(name: str) -> None:
    model, x = tiny(name)
    with AttentionRecorder(model) as late, AttentionRecorder(model, keep="maps") as kept, torch.no_grad():
        model(x)
    assert same(read(kept), read(late))
    for a, b in zip(kept.maps.values(), late.maps.values()):
        assert (a.name, a.shape, a.dtype, a.device) == (b.name, b.shape, b.dtype, b.device)
        assert repr(a) == repr(b)


@pytest.mark.parametrize("keep", ["inputs", "maps"])
def test_keep_maps_lets_the_input_go_and_keep_inputs_holds_it(keep: Any) -> None:
    model, x = tiny("vit")
    seen: list[weakref.ref[Tensor]] = []

    def watch(module: nn.Module, args: tuple[Any, ...]) -> None:
        seen.append(weakref.ref(args[0]))

    gc.disable()
    try:
        with AttentionRecorder(model, keep=keep) as rec, torch.no_grad():
            with model.blocks[0].attn.register_forward_pre_hook(watch):
                model(x)
            inside = seen[0]() is not None
        after = seen[0]() is not None
    finally:
        gc.enable()
    assert inside == after == (keep == "inputs")
    if keep == "inputs":
        assert rec.maps[0].x is seen[0]()
    else:
        for forbidden in (lambda m: m.x, lambda m: m.call, lambda m: m.verify()):
            with pytest.raises(RecorderError, match=r"let go.*keep=\"inputs\""):
                forbidden(rec.maps[0])


@pytest.mark.parametrize("keep", ["inputs", "maps"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtype_is_what_slices_come_in(keep: Any, dtype: torch.dtype) -> None:
    model, x = tiny("vit")
    expected = maps_of(model, x)
    with AttentionRecorder(model, keep=keep, dtype=dtype) as rec, torch.no_grad():
        model(x)
    for name, m in rec.maps.items():
        assert m.dtype == m[...].dtype == m[0, 0, 0].dtype == m.image().dtype == dtype
        assert torch.equal(m[...], expected[name].to(dtype))


@pytest.mark.parametrize("keep", ["inputs", "maps"])
def test_device_is_where_slices_go(keep: Any) -> None:
    model, x = tiny("vit")
    with AttentionRecorder(model, keep=keep, device="meta") as rec, torch.no_grad():
        model(x)
    for m in rec.maps.values():
        assert m.device == m[...].device == m[0, 0, 0].device == m.image().device == torch.device("meta")
        assert m.shape == m[...].shape == (2, 3, 17, 17)


@pytest.mark.parametrize("keep", ["inputs", "maps"])
def test_detach_false_leaves_maps_in_the_graph_with_the_gradient_of_the_unfused_computation(keep: Any) -> None:
    model, x = tiny("vit")
    model.double()
    images = x.double().requires_grad_()
    with AttentionRecorder(model, keep=keep, detach=False) as rec:
        model(images)
    m = rec.maps["blocks.1.attn"]
    net: Any = model
    features = net.blocks[0](net.norm_pre(net._pos_embed(net.patch_embed(images))))
    expected = own_map(net.blocks[1].attn, net.blocks[1].norm1(features))
    wanted = [images, *model.parameters()]
    for index in (..., (0, slice(None), 0)):
        got, own = (
            torch.autograd.grad(
                attention[index].square().sum(), wanted, retain_graph=True, allow_unused=True, materialize_grads=True
            )
            for attention in (m, expected)
        )
        torch.testing.assert_close(got, own, rtol=1e-9, atol=1e-12)
        assert got[0].abs().max() > 0


@pytest.mark.parametrize("keep", ["inputs", "maps"])
@pytest.mark.parametrize("detach", [True, False])
def test_detach_decides_whether_anything_of_a_map_requires_grad(keep: Any, detach: bool) -> None:
    model, x = tiny("vit")
    with AttentionRecorder(model, keep=keep, detach=detach) as rec:
        model(x)
    m = rec.maps[1]
    assert m[...].requires_grad is m[0, 0].requires_grad is m.image().requires_grad is not detach
    if keep == "inputs":
        assert m.x.requires_grad is not detach


# Several recorders, several blocks


def test_two_recorders_on_one_model_do_not_see_each_other() -> None:
    model, x = tiny("vit")
    expected, other = maps_of(model, x), maps_of(model, -x)
    outer, inner = AttentionRecorder(model, called_from=True), AttentionRecorder(model, -1, keep="maps")
    with untouched(model), torch.no_grad(), outer:
        with inner:
            model(x)
        assert same(read(outer), expected)
        model(-x)
    assert same(read(outer), other)
    assert same(read(inner), {NAMES[1]: expected[NAMES[1]]})


def test_two_recorders_can_close_in_the_order_they_were_opened() -> None:
    model, x = tiny("vit")
    first, second = AttentionRecorder(model), AttentionRecorder(model)
    with untouched(model), torch.no_grad():
        first.__enter__()
        second.__enter__()
        model(x)
        first.__exit__(None, None, None)
        model(-x)
        second.__exit__(None, None, None)
    assert same(read(first), maps_of(model, x))
    assert same(read(second), maps_of(model, -x))


def test_a_recorder_can_be_used_again_and_begins_anew() -> None:
    model, x = tiny("vit")
    rec = AttentionRecorder(model, passes="all")
    assert "closed" in repr(rec)
    with untouched(model), torch.no_grad():
        with rec:
            assert "open" in repr(rec)
            model(x)
        before = rec.maps
        with rec:
            with pytest.raises(NoMapError):
                rec.maps  # noqa: B018
            model(-x)
    assert len(rec.passes) == 1
    assert same(read(rec), maps_of(model, -x))
    assert same({name: m[...] for name, m in before.items()}, maps_of(model, x))


def test_what_is_changed_on_the_model_before_the_block_is_not_stale_in_it() -> None:
    model, x = tiny("vit")
    rec = AttentionRecorder(model)
    attn: Any = model.blocks[0].attn
    attn.qkv.weight.data.mul_(2)
    attn.qkv = nn.Linear(48, 144)
    with rec, torch.no_grad():
        model(x)
    torch.testing.assert_close(rec.maps[0][...], own_map(attn, rec.maps[0].x))


# Who called


def test_called_from_tells_the_line_and_what_x_is() -> None:
    model, x = tiny("vit")
    with AttentionRecorder(model, called_from=True) as rec, torch.no_grad():
        model(x)
    site = rec.maps["blocks.1.attn"].called_from
    assert site.file.endswith("vision_transformer.py")
    assert site.function.endswith("forward")
    assert "self.attn(" in site.code
    assert linecache.getline(site.file, site.line).strip() == site.code
    assert site.x == "what blocks.1.norm1 made of the output of blocks.0"
    assert f"{site.file}:{site.line}" in str(site)
    assert site.code in str(site)


def test_called_from_tells_a_call_by_hand_from_one_of_the_models() -> None:
    model: Any = tiny("vit")[0]
    y = torch.randn(1, 17, 48)
    with AttentionRecorder(model, called_from=True) as rec, torch.no_grad():
        model.blocks[0].attn(y)
        model.blocks[1].attn(model.blocks[1].norm1(y))
    first, second = (m.called_from for m in rec.maps.values())
    assert first.file == second.file == __file__
    assert first.code == "model.blocks[0].attn(y)"
    assert "between modules" in first.x
    assert second.line == first.line + 1
    assert second.x == "what blocks.1.norm1 put out"


def test_called_from_names_the_innermost_module_that_made_x() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(48, 48), nn.Identity()), Attention(48, num_heads=3))
    with AttentionRecorder(model, called_from=True) as rec, torch.no_grad():
        model(torch.randn(1, 5, 48))
    site = rec.maps[0].called_from
    assert site.x == "what 0.0 put out"
    assert site.code == "model(torch.randn(1, 5, 48))"


@pytest.mark.parametrize("keep", ["inputs", "maps"])
def test_called_from_is_refused_where_it_was_not_asked_for(keep: Any) -> None:
    model, x = tiny("vit")
    with AttentionRecorder(model, keep=keep) as rec, torch.no_grad():
        model(x)
    with pytest.raises(RecorderError, match="called_from=True"):
        rec.maps[0].called_from  # noqa: B018


@pytest.mark.parametrize("keep", ["inputs", "maps"])
def test_a_repr_never_raises(keep: Any) -> None:
    model, x = tiny("vit")
    with AttentionRecorder(model, ["blocks.0.mlp", "blocks.1.attn"], keep=keep) as rec, torch.no_grad():
        model(x)
    model.double()  # the maps are stale now, and one was never readable
    assert "blocks.0.mlp" in repr(rec.maps)
    assert "blocks.1.attn" in repr(rec.maps["blocks.1.attn"])


def test_a_map_is_an_attention_map_and_tells_name_shape_dtype_and_device() -> None:
    model, x = tiny("vit")
    with AttentionRecorder(model) as rec, torch.no_grad():
        model(x)
    m = rec.maps[0]
    assert isinstance(m, AttentionMap)
    assert repr(m) == "AttentionMap('blocks.0.attn', shape=(2, 3, 17, 17), dtype=float32, device=cpu)"
