"""What is set for everybody while a recorder is open is the user's again after it; inside compiled code it is refused."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from support.compiling import Counts, agree, nothing_set, softmaxes, stance
from support.models import Raises, tiny
from support.untouched import untouched
from torch import Tensor, nn
from torch._dynamo.exc import Unsupported

from hookattn import AttentionRecorder, RecorderError

pytestmark = pytest.mark.usefixtures("nothing_compiled_yet")


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
@pytest.mark.parametrize("own", ["default", "eager_on_recompile", "fail_on_recompile", "force_eager"])
def test_the_users_stance_is_back_when_the_last_recorder_has_closed(own: Any, order: tuple[int, ...]) -> None:
    model, other = tiny("vit")[0], tiny("vit")[0]
    torch.compiler.set_stance(own)
    with nothing_set():
        recorders = [AttentionRecorder(model), AttentionRecorder(other), AttentionRecorder(model)]
        for rec in recorders:
            rec.__enter__()
        for i in order:
            assert stance() == "force_eager"
            recorders[i].__exit__(None, None, None)
    assert stance() == own


@pytest.mark.parametrize("own", ["default", "eager_on_recompile"])
def test_the_users_stance_is_back_when_the_body_raises(own: Any) -> None:
    model, x = tiny("vit")
    with torch.compiler.set_stance(own):
        with nothing_set(), pytest.raises(ArithmeticError), AttentionRecorder(model), AttentionRecorder(model):
            nn.Sequential(model, Raises())(x)
        assert stance() == own
        with nothing_set(), pytest.raises(RecorderError), AttentionRecorder(model) as rec, rec:
            pass
        assert stance() == own
    assert stance() == "default"


def test_a_block_that_overlaps_another_records_on_when_that_has_closed() -> None:
    model, x = tiny("vit")
    expected, counts = softmaxes(model, model, x), Counts()
    model.compile(backend=counts)
    first, second = AttentionRecorder(model), AttentionRecorder(model)
    with torch.no_grad():
        model(x)
        with ExitStack() as stack:
            stack.enter_context(first)
            second.__enter__()
        model(x)
        agree(second, expected)
        second.__exit__(None, None, None)
        model(x)
    assert counts.graphs == 1


def test_a_recorder_records_where_a_stance_was_set_since_another_was_opened() -> None:
    model, x = tiny("vit")
    expected, counts = softmaxes(model, model, x), Counts()
    model.compile(backend=counts)
    with torch.no_grad(), AttentionRecorder(model):
        torch.compiler.set_stance("default")
        with AttentionRecorder(model) as rec:
            model(x)
    agree(rec, expected)
    assert counts.graphs == 0


def step(model: nn.Module, rec: AttentionRecorder | None = None) -> Callable[[Tensor], Any]:
    def inner(x: Tensor) -> Any:
        with rec or AttentionRecorder(model) as opened, torch.no_grad():
            y = model(x * 2)
        return y + 1, opened

    return inner


@pytest.mark.parametrize("made", ["inside", "outside"])
def test_a_recorder_inside_compiled_code_is_refused(made: str) -> None:
    model, x = tiny("vit")
    rec = AttentionRecorder(model) if made == "outside" else None
    run = torch.compile(step(model, rec), backend=Counts())
    with (
        untouched(model),
        nothing_set(),
        pytest.raises(RecorderError, match=r"inside compiled code.*@torch\.compiler\.disable"),
    ):
        run(x)
    with AttentionRecorder(model) as around:
        run(x)  # eager by then
    assert len(around.maps) == 2


def test_a_recorder_inside_a_graph_that_must_be_whole_is_refused_by_dynamo_with_our_reason() -> None:
    model, x = tiny("vit")
    with untouched(model), nothing_set(), pytest.raises(Unsupported, match=r"@torch\.compiler\.disable"):
        torch.compile(step(model), backend=Counts(), fullgraph=True)(x)


def test_what_the_refusal_says_to_do_works() -> None:
    model, x = tiny("vit")
    expected, counts = softmaxes(model, model, 2 * x), Counts()
    look = torch.compiler.disable(step(model))

    @torch.compile(backend=counts)
    def run(x: Tensor) -> Any:
        y, rec = look(x + 0)
        return y.relu(), rec

    for _ in range(2):
        agree(run(x)[1], expected)
        assert stance() == "default"
    assert counts.graphs == 2  # what stands before it and what after
