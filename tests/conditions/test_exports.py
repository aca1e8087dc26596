"""Exports and traces inside the block see the bare model, and are no forward."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from packaging.version import Version
from support.models import exported, tiny
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from hookattn import AttentionRecorder, NoMapError


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
