"""What is heard in compiled graphs is of one call, and an error of a hook ends no forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from packaging.version import Version
from support.heard import Model, break_off, breaking, crossed
from support.inside import Listener
from support.models import B, C, H, N, randomise
from support.reduced import alike
from timm.layers import Attention
from torch import Tensor, nn

from hookattn import AttentionRecorder, UnreadableError

pytestmark = [
    pytest.mark.usefixtures("nothing_compiled_yet", "quickly"),
    pytest.mark.skipif(Version(torch.__version__).release < (2, 11), reason="graphs of this torch do not outlive a hook"),
]
KEPT: dict[str, Any] = {"maps": "maps", "a function": lambda m: m[...]}


def kept(model: nn.Module, *given: Tensor, keep: str) -> list[Tensor]:
    with torch.no_grad(), AttentionRecorder(model, keep=KEPT[keep]) as rec:
        model(*given)
    return [m[...] for m in rec.maps.values()] if keep == "maps" else [*rec.reduced.values()]


def eagerly(model: nn.Module, *given: Tensor) -> list[Tensor]:
    with torch.compiler.set_stance("force_eager"):
        return kept(model, *given, keep="maps")


class Both(Model):
    """Calls one module twice, the second time with what it was given in another order."""

    def forward(self, x: Tensor, context: Tensor) -> Any:  # type: ignore[override]
        x, context = x + 0, context + 0
        return self.attn(x, context), self.attn(context, x)


class Thrice(Model):
    """Calls one module with something new in the second place, each time."""

    def forward(self, x: Tensor, context: Tensor) -> Any:  # type: ignore[override]
        x, context = x + 0, context + 0
        return [self.attn(x, context), self.attn(x * 2, x), self.attn(context, x * 2)]


@pytest.mark.parametrize("keep", KEPT)
@pytest.mark.parametrize("kind", [Both, Thrice])
def test_each_call_hears_what_it_was_given(kind: type[Model], keep: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, context, _ = crossed(monkeypatch)
    compiled: nn.Module = torch.compile(kind(model.attn).eval())  # type: ignore[arg-type,assignment]
    for found, wanted in zip(kept(compiled, x, context, keep=keep), eagerly(compiled, x, context), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)


class Quantised(nn.Linear):
    """A layer that keeps no weight by this name."""

    def __init__(self) -> None:
        super().__init__(C, C)
        self.integers = nn.Parameter(self.weight.detach())
        del self.weight

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.integers, self.bias)


def without_a_weight(attn: Any) -> None:
    attn.proj = Quantised()


def weight_of_none(attn: Any) -> None:
    attn.proj = Quantised()
    attn.proj.weight = None


def without_a_bias(attn: Any) -> None:
    attn.proj = Quantised()
    attn.proj.weight = attn.qkv.weight
    del attn.proj.bias
    attn.proj.forward = lambda x: F.linear(x, attn.proj.integers)


@pytest.mark.parametrize("keep", KEPT)
@pytest.mark.parametrize("meddle", [without_a_weight, weight_of_none, without_a_bias])
def test_layers_beside_may_lack_what_others_have(meddle: Callable[[Any], None], keep: str) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(randomise(Attention(C, H, qkv_bias=True))), torch.randn(B, N, C)
    meddle(model[0])
    compiled: nn.Module = torch.compile(model.eval())  # type: ignore[assignment]
    for found, wanted in zip(kept(compiled, x, keep=keep), eagerly(compiled, x), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("keep", KEPT)
def test_an_error_of_a_hook_that_hears_does_not_end_the_forward(keep: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise MemoryError("no room")

    torch.manual_seed(0)
    model, x = nn.Sequential(randomise(Attention(C, H, qkv_bias=True))).eval(), torch.randn(B, N, C)
    compiled: Any = torch.compile(model)
    with torch.no_grad():
        alone = compiled(x)
        monkeypatch.setattr(Listener, "_note_in_graph", fail)
        with AttentionRecorder(compiled, keep=KEPT[keep]) as rec:
            assert alike(compiled(x), alone)
    if keep == "maps":
        with pytest.raises(UnreadableError, match="no room"):
            _ = rec.maps["0"][...]
    else:
        assert alike([*rec.reduced.values()], eagerly(compiled, x))


@pytest.mark.parametrize("keep", KEPT)
def test_weights_may_be_no_inputs_of_a_graph(keep: str) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(randomise(Attention(C, H, qkv_bias=True))).eval(), torch.randn(B, N, C)
    compiled: nn.Module = torch.compile(model)  # type: ignore[assignment]
    with torch._inductor.config.patch(freezing=True):
        for found, wanted in zip(kept(compiled, x, keep=keep), eagerly(compiled, x), strict=True):
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)


def test_what_was_broken_off_hears_nothing_of_a_call_that_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, context, expected = crossed(monkeypatch, break_off)
    compiled = torch.compile(model.eval())
    with torch.no_grad(), AttentionRecorder(compiled, keep="maps", passes="all") as rec:
        breaking.append("broken off")
        with pytest.raises(ArithmeticError, match="broken off"):
            compiled(x, context)
        model.train()
        compiled(context, x)
    torch.testing.assert_close(rec.passes[0][0][...], expected, rtol=0, atol=1e-6)
    with pytest.raises(UnreadableError, match="train mode"):
        _ = rec.passes[1]["attn"][...]
