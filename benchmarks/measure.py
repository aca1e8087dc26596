"""The one way of measuring: in turns, medians and their spread, the peak of what torch allocates.

Measurements take turns, round by round and each round in another order, so that a machine that is slower for a while is slower
for all of them. Time is taken by CUDA events on a GPU and by a clock on a CPU. Memory is the peak above what was held before,
of what torch allocates: `max_memory_allocated` on a GPU, the sum over the profiler's memory events on a CPU.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Returned = tuple[Any, list[Tensor]]
"""Output of a model (None where there is none), and what was read."""
Run = Callable[[Any], Returned]
AT_LEAST = {"cpu": 0.0, "cuda": 0.05}  # seconds of one measurement; a shorter forward is called several times
FEWEST = 3  # rounds, however long they take
LONG = 4  # what has taken so many times the seconds that are given gets no more rounds
MATRICES = {"cpu": (512, 1024, 2048), "cuda": (4096, 8192)}  # whose products are the peak of operations
TIMES = {"cpu": 1, "cuda": 10}  # calls of one such measurement
MEMORY = 2**29  # bytes of the tensor that is copied and summed for the peak of memory


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, median absolute deviation, quartiles."""
    middle = statistics.median(values)
    q1, _, q3 = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [middle] * 3
    mad = statistics.median(abs(v - middle) for v in values)
    found = {"median": middle, "mad": mad, "q1": q1, "q3": q3, "min": min(values)}
    return {"n": len(values), **{k: float(f"{v:.6g}") for k, v in found.items()}}


def timed(run: Callable[[Any], Any], inputs: Sequence[Tensor], times: int) -> float:
    """Seconds of one call of several; the device's own clock on a GPU."""
    if inputs[0].is_cuda:
        return timed_on_gpu(run, inputs, times)
    began = time.perf_counter()
    for i in range(times):
        run(inputs[i % len(inputs)])
    return (time.perf_counter() - began) / times


def timed_on_gpu(run: Callable[[Any], Any], inputs: Sequence[Tensor], times: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for i in range(times):
        run(inputs[i % len(inputs)])
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3 / times


def in_turns(
    measurements: Mapping[str, Callable[[int], float]],
    rounds: int,
    *,
    seconds: float = math.inf,
    every: Mapping[str, int] | None = None,
) -> dict[str, dict[int, float]]:
    """What each measurement gives, by round.

    Args:
        measurements: by name; called with the number of the round.
        rounds: at most.
        seconds: after which no more rounds begin, but for the first three.
        every: by name, measured in every so-manieth round only.
    """
    found: dict[str, dict[int, float]] = {name: {} for name in measurements}
    began = time.perf_counter()
    for turn in range(rounds):
        if turn >= FEWEST and time.perf_counter() - began > seconds:
            break
        for name in random.Random(turn).sample(list(measurements), len(measurements)):
            is_due = turn % (every or {}).get(name, 1) == 0 and sum(found[name].values()) < LONG * seconds
            if is_due or not turn:
                found[name][turn] = measurements[name](turn)
    return found


def peak_memory(run: Run, x: Tensor) -> int:
    """Bytes that torch allocates at the same time during one call, above what it held before."""
    if x.is_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(x)
        torch.cuda.synchronize()
        return int(torch.cuda.max_memory_allocated() - before)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as profile:
        run(x)
    assert profile.profiler is not None
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def peaks(device: str, dtype: torch.dtype) -> dict[str, float]:
    """The best that is seen in a second each, all into memory that is there already: operations per second of square matrix
    products x x^T, 2 n^3, in the dtype or in float32 (what has no units for a dtype is faster without it), and bytes per second
    of a copy (read and written) or a sum (read)."""

    def fastest(run: Callable[[Tensor], Any], x: Tensor) -> float:
        best, began = timed(run, [x], 1), time.perf_counter()
        while time.perf_counter() - began < 1:
            best = min(best, timed(run, [x], TIMES[device]))
        return best

    def product(n: int, dtype: torch.dtype) -> float:
        x, out = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        return 2 * n**3 / fastest(lambda x: torch.mm(x, x.T, out=out), x)

    x, out = (torch.ones(MEMORY // 4, device=device) for _ in range(2))
    copied = 2 * MEMORY / fastest(out.copy_, x)
    summed = MEMORY / fastest(Tensor.sum, x)
    products = [product(n, kind) for n in MATRICES[device] for kind in {dtype, torch.float32}]
    return {"operations_per_second": max(products), "bytes_per_second": max(copied, summed)}
