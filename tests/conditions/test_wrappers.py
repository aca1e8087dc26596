"""What is no model, or no model any more, is refused, and what to record instead is said; DDP is looked through."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.models import exported, tiny
from support.untouched import untouched
from timm.layers import Attention
from torch import Tensor, nn

from hookattn import AttentionRecorder, ModelError

NEEDED = r"torch\.nn\.Module is needed, not \w+"
NO_MODEL: dict[str, tuple[Callable[[nn.Module, Tensor], Any], str]] = {
    "None": (lambda m, x: None, NEEDED),
    "a function": (lambda m, x: len, NEEDED),
    "a class": (lambda m, x: nn.Linear, NEEDED),
    "a state dict": (lambda m, x: m.state_dict(), NEEDED),
    "a graph": (lambda m, x: torch.fx.symbolic_trace(nn.Sequential(nn.Linear(4, 4))), r"exported or traced graph.*eager model"),
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
def test_what_is_no_model_is_refused_and_what_to_record_is_said(what: str) -> None:
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


def test_data_parallel_is_refused_and_the_model_inside_named() -> None:
    model, x = tiny("vit")
    parallel = nn.DataParallel(model)
    with untouched(parallel), pytest.raises(ModelError, match=r"DataParallel .*AttentionRecorder\(model\.module\)"):
        AttentionRecorder(parallel)
    with pytest.raises(ModelError, match=r"DataParallel \(its module 'trunk'\)"):
        AttentionRecorder(nn.ModuleDict({"trunk": parallel}))
    with AttentionRecorder(parallel.module) as rec, torch.no_grad():
        parallel.module(x)
    assert len(rec.maps) == 2
