"""Threads and tasks: a recorder sees the forwards of its own, and says where others ran."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from support.inside import restoring, sweep_modes
from support.models import by_hand, randomise, tiny
from support.oracle import unfused
from support.reading import NAMES, at_once, attention_after, elsewhere, furthest, maps_of, own_softmaxes, read, same
from torch import Tensor, nn

from hookattn import AttentionRecorder, NoMapError

CALLS: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "call": lambda model, x: model(x),
    "method": lambda model, x: model.forward_features(x),
    "by hand": lambda model, x: by_hand(x, model),
}


# Threads


@contextmanager
def in_lockstep(modules: Iterable[nn.Module], threads: int = 2) -> Iterator[None]:
    """Forwards in several threads wait for each other in front of each of these modules."""
    barrier = threading.Barrier(threads, timeout=10)

    def wait(*_: Any) -> None:
        barrier.wait()

    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(module.register_forward_pre_hook(wait))
        yield


def recorded(model: nn.Module, x: Tensor, call: str, **options: Any) -> list[dict[str, Tensor]]:
    """Maps of three forwards, read after them."""
    with AttentionRecorder(model, passes="all", **options) as rec, torch.no_grad():
        for factor in (1, 2, -1):
            CALLS[call](model, factor * x)
    return [{name: m[...] for name, m in maps.items()} for maps in rec.passes]


@pytest.mark.parametrize("keep", ["inputs", "maps"])
@pytest.mark.parametrize("call", CALLS)
def test_threads_that_record_one_model_see_their_own_forwards(call: str, keep: Any) -> None:
    model, x = tiny("vit")
    theirs = x.flip(0)
    expected = own_softmaxes(model, x), own_softmaxes(model, theirs)
    with in_lockstep(model.blocks):
        got = at_once(lambda: recorded(model, x, call, keep=keep), lambda: recorded(model, theirs, call, keep=keep))
    for maps, own in zip(got, expected):
        assert [list(each) for each in maps] == [NAMES] * 3
        assert furthest(maps[0], own) < 1e-5
    assert not any(model._forward_pre_hooks or block.attn._forward_pre_hooks for block in model.blocks)


@pytest.mark.parametrize("call", CALLS)
def test_threads_that_record_a_model_each_do_not_disturb_each_other(call: str) -> None:
    (one, x), (two, y) = tiny("vit"), tiny("vit", num_heads=4)
    expected = own_softmaxes(one, x), own_softmaxes(two, y)
    got = at_once(lambda: recorded(one, x, call), lambda: recorded(two, y, call))
    for maps, own in zip(got, expected):
        assert [list(each) for each in maps] == [NAMES] * 3
        assert furthest(maps[0], own) < 1e-5


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("options", [{}, {"keep": "maps"}, {"called_from": True}], ids=str)
def test_a_forward_in_another_thread_is_not_recorded_and_computes_the_same(options: dict[str, Any], call: str) -> None:
    model, x = tiny("vit")
    expected = own_softmaxes(model, x)
    with torch.no_grad():
        out = CALLS[call](model, -x)

    def run() -> Tensor:
        with torch.no_grad():
            return CALLS[call](model, -x)

    recorder, pool = AttentionRecorder(model, passes="all", **options), ThreadPoolExecutor(1)
    with in_lockstep(model.blocks), recorder as rec, torch.no_grad(), pool:
        other = pool.submit(run)
        CALLS[call](model, x)
        assert torch.equal(other.result(timeout=60), out)
    assert len(rec.passes) == 1
    assert furthest(read(rec), expected) < 1e-5


@pytest.mark.parametrize("call", CALLS)
def test_a_forward_in_another_thread_alone_is_told(call: str) -> None:
    model, x = tiny("vit")
    with AttentionRecorder(model) as rec, torch.no_grad():
        elsewhere(lambda: CALLS[call](model, x))
    message = (
        r"ran in thread 'worker_0', but this recorder was opened in thread 'MainThread'.*Open it where the model is called"
    )
    for asked in (lambda: rec.maps, lambda: rec.passes):
        with pytest.raises(NoMapError, match=message):
            asked()


@contextmanager
def interrupted(module: nn.Module, run: Callable[[], Any]) -> Iterator[None]:
    """A forward of this thread waits in front of `module` until another thread has done `run`."""
    ours = threading.get_ident()

    def wait(*_: Any) -> None:
        if threading.get_ident() == ours:
            elsewhere(run)

    with module.register_forward_pre_hook(wait):
        yield


def test_a_call_that_a_hook_may_still_change_is_not_mistaken_for_that_of_another_thread() -> None:
    model, x = tiny("vit", depth=1)
    with AttentionRecorder(model) as rec, interrupted(model.blocks[0].attn, lambda: model(-x)), torch.no_grad():
        model(x)
    with unfused(model) as softmaxes, torch.no_grad():
        model(x)
    assert furthest(read(rec), {"blocks.0.attn": softmaxes[0]}) < 1e-5


class Unnamed(nn.Module):
    """Attention whose classes have no such name, so that the first forward is watched."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Mixer(), Mixer()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


class Mixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.qkv = 2, nn.Linear(8, 24)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        return nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def test_a_forward_that_is_watched_is_not_confused_by_another_thread() -> None:
    model, x = randomise(Unnamed()), torch.randn(2, 5, 8)
    with AttentionRecorder(model) as rec, interrupted(model.first.qkv, lambda: model(-x)), torch.no_grad():
        model(x)
    assert rec.layers == list(rec.maps) == ["first", "second"]
    assert all(torch.equal(m.x, own) for m, own in zip(rec.maps.values(), (x, model.first(x))))


@pytest.mark.parametrize("first_to_close", [0, 1])
def test_compilation_is_off_while_a_block_is_open_in_any_thread_and_on_after(first_to_close: int) -> None:
    import torch._dynamo.eval_frame as frames

    recorders = [AttentionRecorder(tiny("vit")[0]) for _ in range(2)]

    def stance() -> str:
        return frames._stance.stance

    before = stance()
    opened = [threading.Event() for _ in recorders]
    closing = [threading.Event() for _ in recorders]

    def hold(i: int) -> None:
        with recorders[i]:
            opened[i].set()
            assert closing[i].wait(30)

    threads = [threading.Thread(target=hold, args=(i,)) for i in range(2)]
    for thread, event in zip(threads, opened):
        thread.start()
        assert event.wait(30)
    assert stance() == "force_eager"
    for i in (first_to_close, 1 - first_to_close):
        assert stance() == "force_eager"
        closing[i].set()
        threads[i].join()
    assert stance() == before


def test_what_a_reading_puts_back_is_never_missing_on_the_way() -> None:
    """Another thread may be in a forward of the module meanwhile."""

    class Looks(dict[str, Any]):
        least = 99

        def __delitem__(self, key: str) -> None:
            super().__delitem__(key)
            self.least = min(self.least, len(self))

        def pop(self, *key: Any) -> Any:
            value = super().pop(*key)
            self.least = min(self.least, len(self))
            return value

        def clear(self) -> None:
            super().clear()
            self.least = 0

    module = nn.BatchNorm1d(3)
    module._buffers, module.cache = Looks(module._buffers), Looks(a=1)
    with restoring(module):
        module.cache["b"] = 2
        module._buffers["more"] = torch.zeros(1)
    assert (dict(module.cache), module.cache.least) == ({"a": 1}, 1)
    assert (list(module._buffers), module._buffers.least) == (["running_mean", "running_var", "num_batches_tracked"], 3)


# Tasks


async def in_a_task(model: nn.Module, x: Tensor, options: dict[str, Any]) -> dict[str, Tensor]:
    with AttentionRecorder(model, **options) as rec:
        await asyncio.sleep(0)
        with torch.no_grad():
            model(x)
        await asyncio.sleep(0)
    return read(rec)


@pytest.mark.parametrize("keep", ["inputs", "maps"])
def test_tasks_that_record_one_model_see_their_own_forwards(keep: Any) -> None:
    model, x = tiny("vit")

    async def both() -> list[dict[str, Tensor]]:
        return await asyncio.gather(*(in_a_task(model, y, {"keep": keep}) for y in (x, -x)))

    for got, y in zip(asyncio.run(both()), (x, -x)):
        assert furthest(got, own_softmaxes(model, y)) < 1e-5


def test_a_forward_handed_to_a_thread_is_recorded_where_the_recorder_is_opened_in_it() -> None:
    model, x = tiny("vit")

    async def outside() -> AttentionRecorder:
        with AttentionRecorder(model) as rec:
            await asyncio.to_thread(model, x)
        return rec

    with pytest.raises(
        NoMapError, match=r"ran in thread 'asyncio_\d', but .* opened in thread 'MainThread', task '[\w-]+' and"
    ):
        asyncio.run(outside()).maps  # noqa: B018

    async def inside() -> list[Any]:
        return await asyncio.gather(*(asyncio.to_thread(recorded, model, y, "call") for y in (x, -x)))

    for got, y in zip(asyncio.run(inside()), (x, -x)):
        assert furthest(got[0], own_softmaxes(model, y)) < 1e-5


def test_a_recorder_opened_in_a_task_that_is_over_goes_on_in_its_thread() -> None:
    model, x = tiny("vit")

    tasks = []

    async def opened() -> AttentionRecorder:
        tasks.append(asyncio.current_task())
        return AttentionRecorder(model).__enter__()

    rec = asyncio.run(opened())
    model(x)
    rec.__exit__(None, None, None)
    assert same(read(rec), maps_of(model, x))


# What threads change at once


@contextmanager
def switching_often() -> Iterator[None]:
    """Threads take turns every few instructions, so that what is not one step is seen half done."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        yield
    finally:
        sys.setswitchinterval(interval)


def test_edits_of_several_threads_are_each_done_in_their_own_forwards() -> None:
    model, x = tiny("vit")
    edits: list[Callable[[Tensor], Tensor]] = [torch.zeros_like, lambda a: a.flip(-1), torch.ones_like, lambda a: a * 2]

    def logits(edit: Callable[[Tensor], Tensor], times: int = 1) -> list[Tensor]:
        found = []
        for _ in range(times):
            with AttentionRecorder(model) as rec, torch.no_grad(), rec.edit({0: edit}):
                found.append(model(x))
        return found

    expected = [logits(edit)[0] for edit in edits]
    with switching_often():
        got = at_once(*[lambda edit=edit: logits(edit, times=10) for edit in edits])
    for mine, own in zip(got, expected):
        assert all(torch.allclose(each, own, atol=1e-6) for each in mine)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_recorders_of_several_threads_are_opened_and_closed_at_once() -> None:
    model, x = tiny("vit")
    expected = maps_of(model, x)
    options: list[dict[str, Any]] = [{}, {"keep": "maps"}, {"gradients": True}, {"called_from": True}]

    def maps(given: dict[str, Any]) -> list[dict[str, Tensor]]:
        found = []
        for _ in range(10):
            with AttentionRecorder(model, **given) as rec:
                model(x)
            found.append(read(rec))
        return found

    with switching_often():
        got = at_once(*[lambda given=given: maps(given) for given in options])
    assert all(furthest(each, expected) < 1e-6 for mine in got for each in mine)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("named", [True, False], ids=["named", "watched"])
def test_a_recorder_that_is_closed_in_another_thread_leaves_nothing_that_acts(named: bool) -> None:
    model, x = (nn.Sequential(Mixer()), torch.randn(2, 5, 8)) if named else (Unnamed(), torch.randn(2, 5, 8))
    recorder = AttentionRecorder(model, layers="0" if named else None, keep="maps")
    recorder.__enter__()
    out = model(x)
    elsewhere(lambda: recorder.__exit__(None, None, None))
    kept = recorder.maps[0][...]
    assert torch.equal(model(x), out)
    assert len(recorder.maps) == len(recorder.passes[-1])
    assert torch.allclose(attention_after(model, x, layers=recorder.layers)[...], kept, atol=1e-6)
    assert sweep_modes() == 0  # it goes with the next


def test_names_of_threads_that_are_not_recorded_do_not_pile_up() -> None:
    model, x = tiny("vit", depth=1)
    with AttentionRecorder(model) as rec, torch.no_grad():
        for _ in range(20):
            thread = threading.Thread(target=lambda: torch.no_grad()(model)(x))
            thread.start()
            thread.join()
    assert len(rec._passes.elsewhere) < 10
    with pytest.raises(NoMapError, match="a forward ran in thread 'Thread-"):
        rec.maps  # noqa: B018
