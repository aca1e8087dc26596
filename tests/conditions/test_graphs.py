"""Compiled models that stay compiled: graphs that call hooks, made once, and outputs that are bit by bit the model's own."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch._inductor.compile_fx as inductor
from packaging.version import Version
from support.compiling import (
    WAYS,
    Counts,
    agree,
    attention_compile,
    block_compile,
    function_around,
    method_of_the_model,
    model_compile,
    nothing_set,
    softmaxes,
    the_compiled_model,
    the_model,
)
from support.drawn import Drawn, small_vit
from support.models import TINY, tiny
from support.reading import NAMES, read
from support.stores import everything
from support.untouched import untouched
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager
from torch._dynamo.utils import counters
from torch.fx.experimental.proxy_tensor import make_fx

from hookattn import AttentionMap, AttentionRecorder, HookattnError, UnreadableError

pytestmark = [
    pytest.mark.usefixtures("nothing_compiled_yet"),
    pytest.mark.skipif(Version(torch.__version__).release < (2, 11), reason="graphs of this torch do not outlive a hook"),
]
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
SEEN = [way for way in WAYS if way not in (the_model, function_around, method_of_the_model)]
"""Those of which the recorder is given what is compiled."""


def graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


def check(way: Any, model: Any, x: Tensor, **options: Any) -> AttentionRecorder:
    """Compiled once more, the first time; the same output, bit by bit; exact maps; nothing left."""
    expected = softmaxes(model, model, x)
    recorded, call = way(model)
    with torch.no_grad():
        alone, before = call(x), graphs()
        for again in (False, True):
            with nothing_set(), untouched(model), AttentionRecorder(recorded, **options) as rec:
                assert torch.equal(call(x), alone)
            assert (graphs() > before) is not again
            before = graphs()
            assert [name.replace("._orig_mod", "") for name in rec.maps] == NAMES
            agree(rec, expected)
        with torch.compiler.set_stance("fail_on_recompile"):
            assert torch.equal(call(x), alone)
    assert not counters["graph_break"]
    return rec


# With kernels of Inductor's, which write into the memory of what they have used


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_cuda)])
@pytest.mark.parametrize("options", [{}, {"keep": "maps"}], ids=str)
def test_a_compiled_model_stays_compiled_while_it_is_recorded(options: dict[str, Any], device: str) -> None:
    model, x = tiny("vit")
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        check(the_compiled_model, model.to(device), x.to(device), **options)


@pytest.mark.parametrize("what", ["x", "q", "k", "v"])
def test_what_a_function_keeps_of_a_call_is_not_written_over(what: str) -> None:
    model, x = tiny("vit")
    with torch.no_grad():
        with AttentionRecorder(model, keep=lambda m: getattr(m, what)[...].clone()) as expected:
            model(x)
        compiled, kept = torch.compile(model), list[Tensor]()
        with AttentionRecorder(compiled, keep=lambda m: kept.append(getattr(m, what)[...])) as rec:
            compiled(x)
    assert rec.reduced
    for mine, given in zip(kept, expected.reduced.values(), strict=True):
        torch.testing.assert_close(mine, given, rtol=0, atol=1e-5)


def test_modules_of_a_kind_share_a_graph() -> None:
    model, x = tiny("vit", depth=4)
    block_compile(model)
    with torch.no_grad():
        model(x)
        alone = graphs()
        with AttentionRecorder(model) as rec:
            model(x)
    assert graphs() == 2 * alone
    torch.testing.assert_close(read(rec), read(recorded(model, x)), rtol=0, atol=1e-6)


def recorded(model: nn.Module, x: Tensor, **options: Any) -> AttentionRecorder:
    """Recorded eagerly."""
    with torch.compiler.set_stance("force_eager"), torch.no_grad(), AttentionRecorder(model, **options) as rec:
        model(x)
    return rec


# However and whatever is compiled


@pytest.mark.usefixtures("quickly")
@pytest.mark.parametrize("way", SEEN, ids=lambda way: way.__name__)
@pytest.mark.parametrize("keep", ["inputs", "maps"])
def test_however_it_is_compiled(way: Any, keep: str) -> None:
    check(way, *tiny("vit"), keep=keep)


@pytest.mark.usefixtures("quickly")
@pytest.mark.parametrize("name", TINY)
def test_of_each_kind_maps_are_those_of_the_eager_model(name: str) -> None:
    model, x = tiny(name)
    expected, compiled = recorded(model, x), torch.compile(model)
    with torch.no_grad():
        alone = compiled(x)
        with AttentionRecorder(compiled) as late:
            assert torch.equal(compiled(x), alone)
        with AttentionRecorder(compiled, keep=lambda m: (m[:, :, 0], m.tokens)) as reduced:
            compiled(x)
    torch.testing.assert_close(read(late), read(expected), rtol=0, atol=1e-6)
    assert [str(m.tokens) for m in late.maps.values()] == [str(m.tokens) for m in expected.maps.values()]
    for name, m in expected.maps.items():
        rows, tokens = reduced.reduced[name]
        torch.testing.assert_close(rows, m[:, :, 0], rtol=0, atol=1e-6)
        assert str(tokens) == str(m.tokens)


@pytest.mark.usefixtures("quickly")
def test_each_forward_has_its_own_maps_and_images_of_other_sizes_are_compiled_anew() -> None:
    model, x = tiny("vit", dynamic_img_size=True)
    compiled = torch.compile(model)
    sizes = [x, x[..., :48], x[:1]]
    with AttentionRecorder(compiled, passes="all") as rec, torch.no_grad():
        for images in sizes:
            compiled(images)
        compiled.forward_features(x)
    assert len(rec.passes) == 4
    for maps, images in zip(rec.passes, [*sizes, x]):
        agreed = recorded(model, images)
        for name, m in agreed.maps.items():
            torch.testing.assert_close(maps[name][...], m[...], rtol=0, atol=1e-6)
            assert maps[name].image("cls").shape == m.image("cls").shape


@pytest.mark.usefixtures("quickly")
def test_layers_that_are_chosen_later_are_recorded_though_graphs_without_them_are_there() -> None:
    model, x = tiny("vit", depth=3)
    compiled = torch.compile(model)
    with torch.no_grad():
        for layers in ([0], [0, 1], None, [0]):
            before = graphs()
            with AttentionRecorder(compiled, layers) as rec:
                compiled(x)
            assert list(rec.maps) == list(AttentionRecorder(model, layers).layers)
        assert graphs() == before


@pytest.mark.usefixtures("quickly")
def test_a_layer_that_was_replaced_is_recorded_as_it_is_now() -> None:
    model: Any
    model, x = tiny("vit")
    compiled = torch.compile(model)
    other: Any = tiny("vit")[0]
    with torch.no_grad():
        with AttentionRecorder(compiled):
            compiled(x)
        nn.init.normal_(other.blocks[1].attn.qkv.weight)
        model.blocks[1].attn = other.blocks[1].attn
        with AttentionRecorder(compiled) as rec:
            compiled(x)
    torch.testing.assert_close(read(rec), read(recorded(model, x)), rtol=0, atol=1e-6)


def test_graphs_call_hooks_in_the_order_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing comes out of the operators, so nothing but what they write into keeps a compiler from another order."""
    compiled_graphs: list[torch.fx.GraphModule] = []

    def note(graph: torch.fx.GraphModule, inputs: Any, **_: Any) -> Any:
        compiled_graphs.append(graph)
        return aot_eager(graph, inputs)

    monkeypatch.setattr(inductor, "compile_fx", note)
    model, x = tiny("vit")
    compiled = torch.compile(model)
    with AttentionRecorder(compiled), torch.no_grad():
        compiled(x)
    whole = max(compiled_graphs, key=lambda graph: len(graph.graph.nodes))
    calls = [node for node in whole.graph.nodes if node.target is torch.ops.hookattn.call_hook]
    assert len(calls) == 3  # the stem, and two layers
    assert len({node.args[0] for node in calls}) == 1
    assert len({node.args[1] for node in calls}) == 3


# Modes


@pytest.mark.usefixtures("quickly")
@pytest.mark.parametrize("keep", ["inputs", "maps"])
@pytest.mark.parametrize(
    "mode",
    [
        partial(torch.autocast, "cpu", torch.bfloat16),
        torch.inference_mode,
        torch.enable_grad,
        partial(torch.device, "meta"),
    ],
    ids=["autocast", "inference_mode", "enable_grad", "default device"],
)
def test_under_the_modes_of_a_call_maps_are_those_of_the_eager_model(keep: Any, mode: Callable[[], Any]) -> None:
    model, x = tiny("vit")
    expected, compiled = AttentionRecorder(model, keep=keep), torch.compile(model)
    with torch.no_grad(), mode():
        with torch.compiler.set_stance("force_eager"), expected:
            model(x)
        alone = compiled(x)
        with AttentionRecorder(compiled, keep=keep) as rec:
            assert torch.equal(compiled(x), alone)
    for name, m in expected.maps.items():
        torch.testing.assert_close(rec.maps[name][...], m[...], rtol=0, atol=1e-6)


@pytest.mark.usefixtures("quickly")
def test_gradients_of_the_model_are_those_of_its_own_graphs() -> None:
    model, x = tiny("vit")
    compiled, parameters = torch.compile(model), list(model.parameters())

    def gradients() -> tuple[Tensor, ...]:
        return torch.autograd.grad(compiled(x).square().sum(), parameters, allow_unused=True)

    alone = gradients()
    with AttentionRecorder(compiled) as rec:
        inside = gradients()
    assert all(a is b or torch.equal(a, b) for a, b in zip(inside, alone))
    torch.testing.assert_close(read(rec), read(recorded(model, x)), rtol=0, atol=1e-6)


@pytest.mark.usefixtures("quickly")
@pytest.mark.parametrize("way", [the_compiled_model, model_compile], ids=lambda way: way.__name__)
def test_a_layer_that_is_replaced_inside_the_block_is_told_when_the_forward_ends(way: Any) -> None:
    model: Any
    model, x = tiny("vit")
    given, call = way(model)
    with torch.no_grad(), AttentionRecorder(given) as rec:
        call(x)
        model.blocks[1].attn = copy.deepcopy(model.blocks[1].attn)
        call(x)
    with pytest.raises(UnreadableError, match="was replaced by another module"):
        rec.maps[NAMES[1]][...]


@pytest.mark.usefixtures("quickly")
def test_a_map_whose_arguments_a_later_hook_changes_is_refused() -> None:
    model: Any
    model, x = tiny("vit")
    compiled = torch.compile(model)
    twice = model.blocks[1].attn.register_forward_pre_hook
    with torch.no_grad(), AttentionRecorder(compiled) as rec, twice(lambda _, args: (args[0] * 2,)):
        compiled(x)
    with pytest.raises(UnreadableError, match="hook that was put on inside the block"):
        rec.maps[1][...]
    torch.testing.assert_close(rec.maps[0][...], recorded(model, x).maps[0][...], rtol=0, atol=1e-6)


@pytest.mark.usefixtures("quickly")
@pytest.mark.parametrize("way", [attention_compile, block_compile], ids=lambda way: way.__name__)
def test_what_runs_for_a_reading_is_no_call_of_the_model(way: Any) -> None:
    model, x = tiny("vit")
    given, call = way(model)
    with torch.no_grad(), AttentionRecorder(given, passes="all") as rec:
        call(x)
        rec.verify()
        read(rec)
        assert list(rec.maps) == NAMES
    assert len(rec.passes) == 1


@pytest.mark.usefixtures("quickly")
def test_graphs_hold_no_recorder_and_no_model() -> None:
    model, x = tiny("vit")
    compiled = torch.compile(model)
    with torch.no_grad(), AttentionRecorder(compiled) as rec:
        compiled(x)
    held = [weakref.ref(rec), weakref.ref(rec.maps[0])]
    del rec
    gc.collect()
    assert [each() for each in held] == [None, None]
    of_model = weakref.ref(model)
    torch._dynamo.reset()
    del model, compiled
    gc.collect()
    assert of_model() is None


TRACED: dict[str, Callable[[Any, Tensor], Any]] = {
    "export": lambda model, x: torch.export.export(model, (x,), strict=False).graph,
    "strict export": lambda model, x: torch.export.export(model, (x,), strict=True).graph,
    "jit": lambda model, x: torch.jit.trace(model, x, check_trace=False).inlined_graph,  # type: ignore[no-untyped-call]
    "make_fx": lambda model, x: make_fx(model)(x).graph,
}


@pytest.mark.usefixtures("quickly")
@pytest.mark.filterwarnings("ignore")  # some warn of what they are
@pytest.mark.parametrize("how", TRACED)
def test_what_is_exported_or_traced_inside_the_block_has_no_operators_of_ours(how: str) -> None:
    model, x = tiny("vit")
    compiled = torch.compile(model)
    with torch.no_grad(), AttentionRecorder(compiled) as rec:
        compiled(x)
        assert graphs()
        maps = read(rec)
        assert "hookattn" not in str(TRACED[how](model, x))
        torch.testing.assert_close(read(rec), maps, rtol=0, atol=0)


# Where that cannot be


def training(model: nn.Module) -> Any:
    model.train()


def hooked(model: Any) -> None:
    model.blocks[0].attn.register_forward_pre_hook(lambda *_: None)


EAGER: dict[str, tuple[dict[str, Any], Callable[[Any], Any]]] = {
    "gradients": ({"gradients": True}, lambda _: None),
    "verify": ({"verify": True}, lambda _: None),
    "detach": ({"detach": False}, lambda _: None),
    "called_from": ({"called_from": True}, lambda _: None),
    "train mode": ({}, training),
    "others": ({}, hooked),
}


@pytest.mark.usefixtures("quickly")
@pytest.mark.parametrize("why", EAGER)
def test_where_that_cannot_be_it_runs_eagerly_and_says_why(why: str) -> None:
    model, x = tiny("vit")
    options, prepare = EAGER[why]
    prepare(model)
    compiled = torch.compile(model)
    with (
        pytest.warns(UserWarning, match=f"eagerly while this recorder is open.*{why}"),
        AttentionRecorder(compiled, **options) as rec,
    ):
        compiled(x)
    assert not graphs()
    assert list(rec.maps) == NAMES


@pytest.mark.usefixtures("quickly")
@pytest.mark.parametrize("other", [{"backend": Counts()}, {"mode": "max-autotune-no-cudagraphs"}], ids=["backend", "mode"])
def test_what_is_compiled_otherwise_or_not_only_so_runs_eagerly(other: dict[str, Any]) -> None:
    model: Any
    model, x = tiny("vit")
    model.blocks[0].compile(**other)
    model.blocks[1].compile()
    with AttentionRecorder(model) as rec, torch.no_grad():
        model(x)
    assert not graphs()
    assert list(rec.maps) == NAMES


@pytest.mark.usefixtures("quickly")
def test_from_the_second_recorder_on_it_runs_eagerly() -> None:
    model, x = tiny("vit")
    expected, compiled = softmaxes(model, model, x), torch.compile(model)
    with torch.no_grad(), AttentionRecorder(compiled) as first:
        compiled(x)
        agree(first, expected)
        before = graphs()
        with pytest.warns(UserWarning, match="another recorder"), AttentionRecorder(compiled, [1]) as second:
            compiled(x)
        compiled(x)
        assert graphs() == before
    agree(first, expected)
    assert list(second.maps) == NAMES[1:]


@pytest.mark.usefixtures("quickly")
@pytest.mark.parametrize("stance", ["fail_on_recompile", "force_eager"])
def test_the_stance_of_a_user_is_kept_to(stance: Any) -> None:
    model, x = tiny("vit")
    compiled = torch.compile(model)
    with torch.no_grad(), torch.compiler.set_stance(stance), nothing_set(), AttentionRecorder(compiled) as rec:
        compiled(x)
    assert not graphs()
    assert list(rec.maps) == NAMES


@pytest.mark.usefixtures("quickly")
def test_an_edit_is_made_in_an_eager_forward() -> None:
    model, x = tiny("vit")
    compiled = torch.compile(model)
    flat = {"blocks.0.attn": lambda a: torch.full_like(a, 1 / a.shape[-1])}
    with torch.no_grad():
        with AttentionRecorder(model) as rec, rec.edit(flat):
            expected = model(x)
        with AttentionRecorder(compiled) as rec:
            compiled(x)
            with rec.edit(flat):
                assert torch.equal(compiled(x), expected)


class Attention(nn.Module):
    def __init__(self, how: Any) -> None:
        super().__init__()
        self.how = how

    def forward(self, x: Tensor, how: Any = None) -> Tensor:
        scale = how[0] if isinstance(how, (tuple, list)) else how["a"][1] if isinstance(how, dict) else 1.0
        return torch.softmax(x @ x.transpose(-2, -1) * scale, -1) @ x


class Called(nn.Module):
    """Calls its attention with something."""

    def __init__(self, how: Any) -> None:
        super().__init__()
        self.attn, self.how = Attention(how), how

    def forward(self, x: Tensor) -> Tensor:
        how: Any = x.shape if self.how is torch.Size else self.how
        out: Tensor = self.attn(x, how=how)
        return out


@pytest.mark.usefixtures("quickly")
@pytest.mark.parametrize("how", [(2.0, None), [0.5, "x"], {"a": (True, 3.0)}, torch.Size, torch.tensor(2.0)], ids=repr)
def test_arguments_are_handed_on_as_they_are(how: Any) -> None:
    model, x = Called(how).eval(), torch.randn(2, 5, 8)
    with torch.no_grad():
        (expected,) = softmaxes(model, model, x)
        compiled = torch.compile(model)
        with AttentionRecorder(compiled) as rec:
            compiled(x)
    before = graphs()
    assert before > 0
    torch.testing.assert_close(rec.maps[0][:, 0], expected, rtol=0, atol=1e-6)


@pytest.mark.usefixtures("quickly")
def test_what_an_operator_cannot_be_given_is_told_where_the_map_is_read() -> None:
    model, x = Called(slice(2)).eval(), torch.randn(2, 5, 8)
    compiled = torch.compile(model)
    with torch.no_grad():
        alone = compiled(x)
        with AttentionRecorder(compiled) as rec:
            assert torch.equal(compiled(x), alone)
    with pytest.raises(UnreadableError, match=r"an argument of type slice, .*set_stance\("):
        rec.maps[0][...]


@pytest.mark.usefixtures("quickly")
def test_an_error_of_a_function_that_reduces_is_told_as_in_an_eager_forward() -> None:
    def fail(m: AttentionMap) -> Tensor:
        raise HookattnError("no more")

    model, x = tiny("vit")
    told = []
    for call in (model, torch.compile(model)):
        with AttentionRecorder(call, keep=fail) as rec, torch.no_grad():
            call(x)
        with pytest.raises(HookattnError) as error:
            rec.reduced[NAMES[0]]
        told.append(str(error.value))
    assert told[0] == told[1]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.usefixtures("quickly")
def test_a_store_of_a_compiled_model_is_that_of_the_eager_one(tmp_path: Path) -> None:
    extraction = pytest.importorskip("hookattn.extraction", exc_type=ImportError)
    pytest.importorskip("zarr")
    model, images = small_vit().eval(), Drawn(7)
    how: dict[str, Any] = {"batch_size": 3, "block": 5, "dtype": "float32"}
    what = "cls,rollout,entropy,distance,received,keys,maps"
    extraction.extract(model, images, tmp_path / "a.zarr", what, **how)
    extraction.extract(torch.compile(model), images, tmp_path / "b.zarr", what, **how)
    assert graphs()
    a, b = (everything(tmp_path / f"{name}.zarr") for name in "ab")
    for name, array in a.items():
        if array.dtype.kind == "f":
            np.testing.assert_allclose(
                b[name], array, rtol=2e-3 if array.dtype == np.float16 else 1e-4, atol=1e-4, err_msg=name
            )
        else:
            assert (b[name] == array).all(), name
