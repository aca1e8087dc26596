"""Compiled models: what was compiled runs eagerly inside the block, and is afterwards what it was."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from packaging.version import Version
from support.compiling import (
    WAYS,
    Counts,
    agree,
    attention_replaced,
    blocks_replaced,
    function_around,
    model_compile,
    nothing_set,
    softmaxes,
    the_compiled_model,
)
from support.models import tiny
from support.oracle import unfused
from support.reading import read, same
from support.untouched import untouched
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn.attention import flex_attention

from hookattn import AttentionRecorder, UnreadableError

pytestmark = pytest.mark.usefixtures("nothing_compiled_yet")
OPENED = ["before it is compiled", "after it was compiled"]


def check(way: Any, opened: str, name: str = "vit", **options: Any) -> None:
    """Recorded completely and exactly; whole graphs, none compiled in the block and none again; nothing left."""
    model, x = tiny(name)
    expected, counts = softmaxes(model, model, x), Counts()
    recorded, call = way(model, **{"backend": counts, **options})
    compiled_here = options.get("backend") is None
    with torch.no_grad():
        if opened == OPENED[1]:
            call(x)
            assert counts.graphs > 0 or not compiled_here
        graphs = counts.graphs
        with nothing_set(), untouched(model), AttentionRecorder(recorded) as rec:
            inside = call(x)
            assert counts.graphs == graphs
        agree(rec, expected)
        if opened == OPENED[1]:
            with torch.compiler.set_stance("fail_on_recompile"):
                after = call(x)
        else:
            after = call(x)
            assert counts.graphs > 0 or not compiled_here
        torch.testing.assert_close(inside, after, rtol=1e-4, atol=1e-4)
        torch.compiler.set_stance("force_eager")
        assert torch.equal(inside, call(x))
    assert not counters["graph_break"]


# Recorded whole, and not compiled again


@pytest.mark.parametrize("opened", OPENED)
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_a_compiled_model_is_recorded_whole_and_its_graphs_are_used_again(way: Any, opened: str) -> None:
    check(way, opened, fullgraph=True)


@pytest.mark.parametrize("options", [{"dynamic": True}, {"backend": "aot_eager"}], ids=str)
def test_so_is_one_compiled_with_other_options(options: dict[str, Any]) -> None:
    check(the_compiled_model, OPENED[1], **options)


@pytest.mark.parametrize("way", [blocks_replaced, attention_replaced], ids=lambda way: way.__name__)
def test_where_a_part_was_replaced_by_its_compiled_one_maps_lie_on_the_image_as_before(way: Any) -> None:
    model, x = tiny("vit_registers")
    with AttentionRecorder(model) as plain, torch.no_grad():
        model(x)
    recorded, call = way(model, backend=Counts())
    with AttentionRecorder(recorded, ["blocks.1.*"]) as rec, torch.no_grad():
        call(x)
    assert len(rec.maps) == 1
    assert torch.equal(rec.maps[0].image("cls"), plain.maps[1].image("cls"))
    assert rec.verify() < 1e-4


def test_maps_of_a_module_that_is_compiled_later_are_still_there() -> None:
    model, x = tiny("vit")
    expected = softmaxes(model, model, x)
    with torch.no_grad():
        with AttentionRecorder(model) as rec:
            model(x)
        for way in (attention_replaced, model_compile, function_around):
            way(model, backend=Counts())[1](x)
    for m, softmax in zip(rec.maps.values(), expected, strict=True):
        torch.testing.assert_close(m[...], softmax, rtol=0, atol=1e-6)


def test_where_nothing_is_named_like_attention_a_compiled_model_is_watched() -> None:
    class Mixer(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.softmax(x @ x.transpose(-2, -1), dim=-1) @ x

    model, x = nn.Sequential(nn.Linear(8, 8), Mixer()), torch.randn(2, 5, 8)
    counts = Counts()
    compiled = torch.compile(model, backend=counts, fullgraph=True)
    expected = softmaxes(model, model, x)
    compiled(x)
    for _ in range(2):
        with untouched(model), AttentionRecorder(compiled) as rec:
            compiled(x)
            compiled(x)
        torch.testing.assert_close(rec.maps["1"][:, 0], expected[0], rtol=0, atol=1e-6)
    compiled(x)
    assert counts.graphs == 1


# Nothing of ours in a graph


@pytest.mark.parametrize("options", [{}, {"keep": "maps", "detach": False, "called_from": True}], ids=str)
def test_what_is_compiled_with_the_hooks_on_has_nothing_of_a_recorder_in_it(options: dict[str, Any]) -> None:
    model, x = tiny("vit")
    with torch.no_grad():
        expected, counts = model(x), Counts()
        compiled = torch.compile(model, backend=counts, fullgraph=True)
        seen: list[weakref.ref[Any]] = []
        watching = model.blocks[0].attn.register_forward_pre_hook(lambda _, args: seen.append(weakref.ref(args[0])))
        rec = AttentionRecorder(model, **options)
        with rec:
            compiled(x)
            maps = read(rec)
            watching.remove()
            with torch.compiler.set_stance("default"):  # the user's own affair: compiled code goes around the hooks
                assert torch.equal(compiled(x), expected)
            assert same(read(rec), maps)
        assert not counters["graph_break"]
        held = [weakref.ref(rec), weakref.ref(rec.maps[0]), *seen]
        assert len(held) > 2
        del rec
        gc.collect()
        assert [reference() for reference in held] == [None] * len(held)
        assert torch.equal(compiled(x), expected)
    assert not counters["graph_break"]


# Modes


@pytest.mark.parametrize(("keep", "backend"), [("inputs", "eager"), ("maps", "aot_eager")])
def test_a_compiled_training_step_in_the_block_has_the_gradients_it_had(keep: Any, backend: str) -> None:
    model, x = tiny("vit")
    parameters = list(model.train().parameters())

    def gradients(call: Any) -> list[Tensor]:
        return list(torch.autograd.grad(call(x).square().sum(), parameters, allow_unused=True))

    with unfused(model) as expected:
        plain = model(x)
    of_maps = torch.autograd.grad(expected[1].square().sum(), parameters[1])[0]
    own, compiled = gradients(model), torch.compile(model, backend=backend)
    gradients(compiled)
    with AttentionRecorder(compiled, keep=keep, detach=False) as rec:
        assert all(a is b or torch.equal(a, b) for a, b in zip(gradients(compiled), own))
        compiled(x)
    agree(rec, expected)
    got = torch.autograd.grad(rec.maps[1][...].square().sum(), parameters[1])[0]
    torch.testing.assert_close(got, of_maps, rtol=1e-4, atol=1e-5)
    assert plain.requires_grad
    gradients(compiled)
    assert not counters["graph_break"]


@pytest.mark.parametrize("mode", ["autocast", "inference_mode"])
def test_under_the_modes_of_a_call_a_compiled_model_has_the_maps_of_the_bare_one(mode: str) -> None:
    model, x = tiny("vit")
    context: Any = {"autocast": lambda: torch.autocast("cpu", torch.bfloat16), "inference_mode": torch.inference_mode}[mode]
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad(), context():
        compiled(x)
    with torch.no_grad(), context():
        with AttentionRecorder(model) as plain:
            model(x)
        with AttentionRecorder(compiled) as rec:
            compiled(x)
        with torch.compiler.set_stance("fail_on_recompile"):
            compiled(x)
    assert same(read(rec), read(plain))


@pytest.mark.parametrize("compiled_autograd", [False, True])
def test_a_checkpoint_run_again_by_a_compiled_backward_is_no_forward(compiled_autograd: bool) -> None:
    model, x = tiny("vit")
    expected = softmaxes(model, model, x)
    model.set_grad_checkpointing()
    model.train()
    run = torch.compile(lambda x: model(x).square().sum().backward(), backend="eager")
    with torch._dynamo.config.patch(compiled_autograd=compiled_autograd), AttentionRecorder(model, passes="all") as rec:
        run(x)
    agree(rec, expected)
    assert len(rec.passes) == 1


@pytest.mark.skipif(Version(torch.__version__).release < (2, 7), reason="flex attention of this torch runs under no mode")
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_compiled_flex_attention_runs_in_the_block_and_is_refused_when_it_is_read() -> None:
    class FlexAttention(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            q = x.unflatten(-1, (2, 16)).transpose(1, 2)
            out: Tensor = flex_attention.flex_attention(q, q, q, score_mod=lambda s, b, h, i, j: s + 0.1 * (i - j))
            return out.transpose(1, 2).flatten(2)

    model, x = FlexAttention(), torch.randn(2, 16, 32)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    expected = compiled(x)
    with AttentionRecorder(compiled) as rec:
        torch.testing.assert_close(compiled(x), expected)
    with pytest.raises(UnreadableError, match=r"FlexAttention.*cannot be taken apart.*@hookattn\.recipe"):
        rec.maps[0][...]
