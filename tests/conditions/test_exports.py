"""Exports and traces: inside the block they see the bare model; what comes out of them is refused."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from packaging.version import Version
from support.models import tiny
from support.untouched import untouched
from timm.layers import Attention
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from hookattn import AttentionRecorder, ModelError, NoMapError


def exported(strict: bool) -> Callable[[nn.Module, Tensor], Any]:
    return lambda model, x: torch.export.export(model, (x,), strict=strict)


def faked(model: nn.Module, x: Tensor) -> Any:
    return make_fx(model, tracing_mode="fake", _allow_non_fake_inputs=True)(x)


TRACES: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "torch.export": exported(strict=False),
    "torch.export, strict": exported(strict=True),
    "torch.jit.trace": lambda model, x: torch.jit.trace(model, x, check_trace=False),
    "torch.fx": lambda model, x: torch.fx.symbolic_trace(model),
    "make_fx": lambda model, x: make_fx(model)(x),
    "make_fx, fake": faked,
}


OLD = Version(torch.__version__).release < (2, 7)


if OLD:  # whose strict export takes no hook of anybody's on the model, and whose fx does not get through timm
    TRACES = {how: trace for how, trace in TRACES.items() if how not in ("torch.export, strict", "torch.fx")}


@pytest.mark.filterwarnings("ignore")  # each of them warns of something
@pytest.mark.parametrize("how", TRACES)
def test_a_trace_inside_the_block_is_that_of_the_bare_model_and_no_forward(how: str) -> None:
    model, x = tiny("vit", depth=1, batch=1)
    recorders = [AttentionRecorder(model), AttentionRecorder(model, keep="maps", passes="all", called_from=True)]
    with torch.no_grad():
        nodes = str(TRACES[how](model, x).graph).count("\n")
        with recorders[0], recorders[1]:
            model(x)
            maps = [list(rec.maps.values()) for rec in recorders]
            traced = TRACES[how](model, x)
            assert [list(rec.maps.values()) for rec in recorders] == maps
            assert [len(rec.passes) for rec in recorders] == [1, 1]
    assert str(traced.graph).count("\n") == nodes
    held = [weakref.ref(rec) for rec in recorders]
    del recorders, maps
    gc.collect()
    assert [rec() for rec in held] == [None, None]


@torch.no_grad()
def on_fakes(model: nn.Module, x: Tensor) -> Any:
    with FakeTensorMode(allow_non_fake_inputs=True):
        return model(x)


@pytest.mark.parametrize("run", [exported(strict=False), on_fakes], ids=["torch.export", "fake tensors"])
@pytest.mark.parametrize("keep", ["inputs", "maps"])
def test_a_trace_alone_is_told_to_be_no_forward(run: Any, keep: Any) -> None:
    model, x = tiny("vit")
    with AttentionRecorder(model, keep=keep) as rec:
        run(model, x)
    with pytest.raises(NoMapError, match=r"no forward of the VisionTransformer has run.*An export or a trace of it is none"):
        rec.maps  # noqa: B018


NO_MODEL: dict[str, tuple[Callable[[nn.Module, Tensor], Any], str]] = {
    "exported": (exported(strict=False), r"not ExportedProgram: what was exported.*record the eager model"),
    "exported, as a module": (lambda m, x: exported(False)(m, x).module(), r"exported or traced graph.*record the eager model"),
    "exported, unflattened": (lambda m, x: torch.export.unflatten(exported(False)(m, x)), r"exported.*record the eager model"),
    "exported, compiled": (
        lambda m, x: torch.compile(exported(False)(m, x).module(), backend="eager"),
        r"exported or traced graph.*record the eager model",
    ),
    "compiled method": (lambda m, x: torch.compile(m.forward_features, backend="eager"), r"compiled.*record the model"),
    "compiled function": (lambda m, x: torch.compile(lambda x: m(x), backend="eager"), r"compiled.*record the model"),
}


@pytest.mark.parametrize("what", NO_MODEL)
def test_what_has_no_modules_left_is_refused_and_the_eager_model_asked_for(what: str) -> None:
    make, message = NO_MODEL[what]
    with pytest.raises(ModelError, match=message):
        AttentionRecorder(make(*tiny("vit")))


@pytest.mark.filterwarnings("ignore")  # torch.jit warns of its age, and of what it traces
@pytest.mark.parametrize(
    "how", [torch.jit.script, lambda model: torch.jit.trace(model, torch.randn(1, 3, 4))], ids=["script", "trace"]
)
def test_scripted_and_traced_models_are_refused(how: Callable[[nn.Module], Any]) -> None:
    class Scores(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.softmax(x @ x.transpose(-2, -1), dim=-1) @ x

    scripted = how(Scores())
    with pytest.raises(ModelError, match=r"scripted or traced model runs no Python hooks.*record the eager model"):
        AttentionRecorder(scripted)
    with pytest.raises(ModelError, match=r"scripted or traced model \(its module '0'\)"):
        AttentionRecorder(nn.Sequential(scripted, Attention(4, num_heads=1)))


@pytest.mark.parametrize("how", ["torch.fx", "torch.export"])
def test_graphs_are_refused(how: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    exported = (
        torch.export.export(model, (torch.randn(1, 4),)).module() if how == "torch.export" else torch.fx.symbolic_trace(model)
    )
    with untouched(exported), pytest.raises(ModelError, match=r"exported or traced graph.*record the eager model"):
        AttentionRecorder(exported)
