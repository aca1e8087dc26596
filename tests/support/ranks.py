"""What each of two processes does under `DistributedDataParallel` and FSDP; tests look at what came back."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from datetime import timedelta
from functools import partial
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from hookattn import AttentionRecorder, StaleMapError, UnreadableError
from support.models import tiny
from support.oracle import loss_of, own_gradients
from support.reading import furthest, maps_of, own_softmaxes, read, same


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
        if reasons := list(recorder.skipped.values()):
            return f"UnreadableError: {reasons[0]}"
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
