"""Processes, threads, tasks and function transforms: a recorder sees its own forwards, and says what it cannot read."""

from __future__ import annotations

import asyncio
import re
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.multiprocessing as mp
from support.inside import restoring
from support.models import by_hand, randomise, tiny
from support.oracle import loss_of, own_gradients, unfused
from support.reading import NAMES, maps_of, read, same
from torch import Tensor, distributed, nn
from torch.func import functional_call, grad, jacrev, vjp, vmap
from torch.nn.parallel import DistributedDataParallel

from hookattn import AttentionRecorder, NoMapError, StaleMapError, UnreadableError

CALLS: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "call": lambda model, x: model(x),
    "method": lambda model, x: model.forward_features(x),
    "by hand": lambda model, x: by_hand(x, model),
}


def own_softmaxes(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    with unfused(model) as outputs, torch.no_grad():
        model(x)
    return dict(zip(NAMES, outputs))


def furthest(got: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert list(got) == list(expected)
    return max(float((got[name] - expected[name]).abs().max()) for name in got)


# Processes: everything that needs two of them happens in one spawn, and the tests look at what came back


def model_of_all(dtype: torch.dtype = torch.float64) -> nn.Module:
    """The same parameters in every process."""
    torch.manual_seed(0)
    return tiny("vit")[0].to(dtype)


def gradients(model: nn.Module) -> list[Tensor]:
    whole = (p.grad for p in model.parameters() if p.grad is not None)
    return [(g.to_local() if hasattr(g, "to_local") else g).clone() for g in whole]


def distance(recorder: AttentionRecorder, expected: dict[str, Tensor]) -> Any:
    """How far maps are from the expected, or the error that says why there are none."""
    try:
        got = {name.replace("_fsdp_wrapped_module.", ""): m[...] for name, m in recorder.maps.items()}
        return furthest(got, expected)
    except (StaleMapError, UnreadableError) as error:
        return f"{type(error).__name__}: {error}"


def train(wrap: Callable[[nn.Module], nn.Module], x: Tensor, **options: Any) -> dict[str, Any]:
    """A step of training without a recorder and the same with one, and what could be read after the forward and in the end."""
    expected, facts = own_softmaxes(model_of_all(), x), dict[str, Any]()
    steps = []
    for recorded in (False, True):
        model = wrap(model_of_all())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        recorder = AttentionRecorder(model, **options) if recorded else None
        with recorder or nullcontext():
            out = model(x)
            out.square().sum().backward()
        if recorder is not None:
            facts["after the step's backward"] = distance(recorder, expected)
        steps.append([out.detach(), *gradients(model)])
        optimizer.step()
        model(x)  # parameters are gathered again, with other values
        if recorder is not None:
            facts["in the end"] = distance(recorder, expected)
    return {**facts, "identical": len(steps[0]) > 10 and all(map(torch.equal, *steps))}


def shard(model: nn.Module, what: str, **options: Any) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    options["mesh"] = distributed.init_device_mesh("cpu", (2,))
    for block in model.blocks:
        if what != "root":
            fully_shard({"blocks": block, "attention": block.attn, "layers": block.attn.qkv}[what], **options)
    return fully_shard(model, **options)


def wrap_in_fsdp1(model: nn.Module, original: bool) -> nn.Module:
    from torch.distributed.fsdp import FullyShardedDataParallel

    options: dict[str, Any] = {"use_orig_params": original, "device_id": torch.device("cpu")}
    for i, block in enumerate(model.blocks):
        model.blocks[i] = FullyShardedDataParallel(block, **options)
    return FullyShardedDataParallel(model, **options)


def checks_of_ddp(x: Tensor) -> Iterator[tuple[str, Any]]:
    expected = own_softmaxes(model_of_all(), x)
    ddp = DistributedDataParallel(model_of_all())
    for name, opened in (("wrapper", ddp), ("inside", ddp.module), ("compiled", torch.compile(ddp, backend="eager"))):
        with AttentionRecorder(opened) as rec:
            ddp(x)
        yield f"ddp {name}", furthest(read(rec), expected)
    for keep in ("inputs", "maps"):
        yield f"ddp train {keep}", train(DistributedDataParallel, x, keep=keep)


FULLY_SHARD = hasattr(torch.cpu.Stream, "record_event")  # in older torch it needs a GPU
on_the_cpu = pytest.mark.skipif(not FULLY_SHARD, reason="fully_shard of this torch does not run on the CPU")


def checks_of_fsdp(x: Tensor) -> Iterator[tuple[str, Any]]:
    if not FULLY_SHARD:
        return
    from torch.distributed.fsdp import MixedPrecisionPolicy

    expected = own_softmaxes(model_of_all(), x)
    for what in ("blocks", "attention", "root", "layers"):
        for keep in ("inputs", "maps"):
            model = model_of_all()
            before = AttentionRecorder(model, keep=keep)
            after = AttentionRecorder(shard(model, what), keep=keep)
            with before, after, torch.no_grad():
                model(x)
            alone = distributed.get_rank() == 0  # reads, and the other does not
            yield (
                f"fsdp {what} {keep}",
                alone and [distance(rec, expected) for rec in (before, after)],
            )
            if what != "layers":
                yield f"fsdp train {what} {keep}", train(lambda model, what=what: shard(model, what), x, keep=keep)
    yield "fsdp never sharded", train(lambda model: shard(model, "blocks", reshard_after_forward=False), x)
    half = shard(model_of_all(torch.float32), "blocks", mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    with AttentionRecorder(half, keep="maps") as rec, torch.no_grad():
        half(x.float())
    plain = maps_of(model_of_all(torch.float32).bfloat16(), x.bfloat16())
    yield "fsdp bfloat16", (same(read(rec), plain), furthest(read(rec), expected))


def checks_of_fsdp1(x: Tensor) -> Iterator[tuple[str, Any]]:
    expected = own_softmaxes(model_of_all(), x)
    for original in (False, True):
        for keep in ("inputs", "maps"):
            model = wrap_in_fsdp1(model_of_all(), original)
            with AttentionRecorder(model, keep=keep) as rec, torch.no_grad():
                model(x)
            yield f"fsdp1 {original} {keep}", distributed.get_rank() == 0 and distance(rec, expected)
            yield f"fsdp1 train {original} {keep}", train_fsdp1(original, keep, x)


def train_fsdp1(original: bool, keep: str, x: Tensor) -> Any:
    steps = []
    for recorded in (False, True):
        model = wrap_in_fsdp1(model_of_all(), original)
        with AttentionRecorder(model, keep=keep) if recorded else nullcontext():
            out = model(x)
            out.square().sum().backward()
        steps.append([out.detach(), *gradients(model)])
    return all(map(torch.equal, *steps))


def checks_of_gradients(x: Tensor) -> Iterator[tuple[str, Any]]:
    expected = own_gradients(model_of_all(), x)
    wraps: dict[str, Any] = {"ddp": DistributedDataParallel}
    if FULLY_SHARD:
        wraps |= {what: partial(shard, what=what) for what in ("blocks", "attention", "root")}
    for name, wrap in wraps.items():
        for keep in ("inputs", "maps"):
            model = wrap(model_of_all())
            with AttentionRecorder(model, gradients=True, keep=keep) as rec:
                loss_of(model(x)).backward()
            try:
                found: Any = furthest({name: m.gradient[...] for name, m in rec.maps.items()}, expected)
            except (StaleMapError, UnreadableError) as error:
                found = f"{type(error).__name__}: {error}"
            yield f"gradients {name} {keep}", found
        with AttentionRecorder(model) as rec, torch.no_grad():
            output = model(x)
            with rec.edit({0: lambda attention: attention}):
                yield f"edit {name}", float((model(x) - output).abs().max())


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(rank + 1))
    found: dict[str, Any] = {}
    for checks in CHECKS:
        try:
            found.update(checks(x))
        except Exception:
            found[checks.__name__] = traceback.format_exc()
        distributed.barrier()
    torch.save(found, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


CHECKS = (checks_of_ddp, checks_of_fsdp, checks_of_fsdp1, checks_of_gradients)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two processes found, by the name of a check."""
    if not distributed.is_available() or not distributed.is_gloo_available():
        pytest.skip("this torch has no gloo")
    folder: Path = tmp_path_factory.mktemp("ranks")
    context = mp.get_context("spawn")
    processes = [context.Process(target=work, args=(rank, str(folder))) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=180)
    hung = [process for process in processes if process.is_alive()]
    for process in hung:
        process.kill()
    assert not hung, "the processes wait for each other"
    assert [process.exitcode for process in processes] == [0, 0]
    found = [torch.load(folder / f"{rank}.pt") for rank in range(2)]
    for checks in CHECKS:
        assert checks.__name__ not in found[0], found[0].get(checks.__name__)
    return found


@on_the_cpu
def test_gradients_are_exact_under_ddp_and_fsdp_or_refused_and_edits_go_through(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        assert max(found[f"edit {name}"] for name in ("ddp", "blocks", "attention", "root")) < 1e-12
        exact = ("ddp inputs", "ddp maps", "blocks maps", "root maps")
        assert max(found[f"gradients {name}"] for name in exact) < 1e-12
        assert matches(SHARDED, found["gradients blocks inputs"])
        assert matches(SHARDED, found["gradients root inputs"])
        assert matches(
            "UnreadableError: .* its gradient could not be computed during backward: .* sharded again",
            found["gradients attention maps"],
        )


SHARDED = r"StaleMapError: the map of .* is stale: its parameters are sharded again, as FSDP .*keep=\"maps\""


@pytest.mark.parametrize("opened", ["wrapper", "inside", "compiled"])
def test_each_rank_of_a_ddp_records_its_own_forward_under_the_names_of_the_model(
    ranks: list[dict[str, Any]], opened: str
) -> None:
    assert all(found[f"ddp {opened}"] < 1e-12 for found in ranks)


def test_training_a_ddp_is_bit_identical_and_a_step_makes_maps_stale_that_were_not_kept(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        late, kept = found["ddp train inputs"], found["ddp train maps"]
        assert late["identical"]
        assert kept["identical"]
        assert max(late["after the step's backward"], kept["after the step's backward"], kept["in the end"]) < 1e-12
        assert late["in the end"].startswith("StaleMapError: the map of 'blocks.0.attn'")


@on_the_cpu
@pytest.mark.parametrize("what", ["blocks", "attention", "root"])
def test_maps_kept_under_fsdp_are_exact_and_late_ones_are_exact_or_refused(ranks: list[dict[str, Any]], what: str) -> None:
    assert max(ranks[0][f"fsdp {what} maps"]) < 1e-12
    late = ranks[0][f"fsdp {what} inputs"]
    if what == "root":  # what belongs to the root stays gathered until backward
        assert max(late) < 1e-12
    else:
        for told in late:
            assert matches(SHARDED, told)


@on_the_cpu
@pytest.mark.parametrize("what", ["blocks", "attention", "root"])
def test_training_under_fsdp_is_bit_identical_and_nothing_is_read_from_parameters_gathered_again(
    ranks: list[dict[str, Any]], what: str
) -> None:
    for found in ranks:
        late, kept = found[f"fsdp train {what} inputs"], found[f"fsdp train {what} maps"]
        assert late["identical"]
        assert kept["identical"]
        assert max(kept["after the step's backward"], kept["in the end"]) < 1e-12
        assert matches(SHARDED, late["after the step's backward"])
        assert "StaleMapError" in late["in the end"]


@on_the_cpu
def test_parameters_that_were_gathered_again_with_other_values_are_stale(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        assert found["fsdp never sharded"]["identical"]
        assert "StaleMapError" in found["fsdp never sharded"]["in the end"]


@on_the_cpu
def test_attention_whose_inner_layers_are_sharded_is_refused_since_reading_would_wait_for_others(
    ranks: list[dict[str, Any]],
) -> None:
    for told in (*ranks[0]["fsdp layers maps"], *ranks[0]["fsdp layers inputs"]):
        assert matches(r"UnreadableError: .*'blocks\.0\.attn'.*spread over several processes.*Give FSDP the attention", told)


@on_the_cpu
def test_maps_under_mixed_precision_of_fsdp_are_those_of_the_model_in_that_dtype(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        identical, distance = found["fsdp bfloat16"]
        assert identical
        assert 1e-4 < distance < 0.05


@pytest.mark.parametrize("original", [False, True])
def test_the_older_fsdp_is_read_and_refused_likewise(ranks: list[dict[str, Any]], original: bool) -> None:
    assert ranks[0][f"fsdp1 {original} maps"] < 1e-12
    assert matches(SHARDED, ranks[0][f"fsdp1 {original} inputs"])
    assert all(found[f"fsdp1 train {original} {keep}"] is True for found in ranks for keep in ("inputs", "maps"))


def matches(pattern: str, told: Any) -> bool:
    assert isinstance(told, str), told
    return re.match(pattern, told) is not None


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


def at_once(*jobs: Callable[[], Any]) -> list[Any]:
    """Run each job in a thread of its own; an error in one is raised here."""
    with ThreadPoolExecutor(len(jobs), thread_name_prefix="worker") as pool:
        return [future.result(timeout=60) for future in [pool.submit(job) for job in jobs]]


def elsewhere(job: Callable[[], Any]) -> Any:
    return at_once(job)[0]


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


@pytest.mark.parametrize("recorded_in", ["the thread of forward", "another"])
def test_checkpoints_run_again_in_another_thread_save_what_the_forward_saved(
    monkeypatch: pytest.MonkeyPatch, recorded_in: str
) -> None:
    monkeypatch.setattr(timm.layers.config, "_USE_REENTRANT_CKPT", False)
    model, x = tiny("vit")
    model.train()
    model.set_grad_checkpointing()

    def step() -> None:
        loss = model(x).square().sum()
        loss.backward() if recorded_in == "another" else elsewhere(loss.backward)

    found = []
    for context in (nullcontext(), AttentionRecorder(model, keep="maps", detach=False)):
        model.zero_grad()
        with context:
            elsewhere(step) if recorded_in == "another" else step()
        found.append([p.grad for p in model.parameters()])
    assert all(map(torch.equal, *found))


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


# Transforms


def transforms(model: nn.Module, x: Tensor, state: dict[str, Tensor]) -> dict[str, Callable[[], Any]]:
    def of_state(parameters: dict[str, Tensor], images: Tensor = x) -> Tensor:
        return functional_call(model, parameters, (images,)).sum()

    return {
        "functional_call": lambda: of_state(state),
        "grad": lambda: grad(of_state)(state),
        "vjp": lambda: vjp(of_state, state),
        "jacrev": lambda: jacrev(of_state)(state),
        "vmap": lambda: vmap(model)(torch.stack([x, -x])),
        "ensemble": lambda: vmap(of_state)({name: torch.stack([p, p]) for name, p in state.items()}),
        "gradients of each image": lambda: vmap(grad(of_state), (None, 0))(state, x[:, None]),
    }


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # a kernel that PyTorch has no batching rule for
@pytest.mark.parametrize("options", [{}, {"keep": "maps"}, {"detach": False}, {"keep": "maps", "detach": False}], ids=str)
@pytest.mark.parametrize("how", transforms(nn.Identity(), torch.zeros(2), {}))
def test_a_map_captured_under_a_transform_is_exact_or_refused_with_the_way_to_it(how: str, options: dict[str, Any]) -> None:
    model, x = tiny("vit")
    other, _ = tiny("vit")
    state = {name: p.detach() for name, p in other.named_parameters()}
    run = transforms(model, x, state)[how]
    with AttentionRecorder(model, **options) as rec:
        run()
    if "vmap" in how or how in ("ensemble", "gradients of each image"):
        with pytest.raises(UnreadableError, match=r"'blocks\.0\.attn'.* ran under torch\.vmap.*return .*m\[\.\.\.\]"):
            rec.maps[0][...]
    else:
        assert furthest({name: m.detach() for name, m in read(rec).items()}, own_softmaxes(other, x)) < 1e-5


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("keep", ["inputs", "maps"])
def test_a_recorder_opened_inside_what_vmap_maps_reads_each_slice(keep: Any) -> None:
    model, x = tiny("vit")

    def read(images: Tensor) -> dict[str, Tensor]:
        with AttentionRecorder(model, keep=keep) as rec:
            model(images)
        return read(rec)

    got = vmap(read)(torch.stack([x, -x]))
    for i, images in enumerate((x, -x)):
        assert furthest({name: m[i] for name, m in got.items()}, own_softmaxes(model, images)) < 1e-5
