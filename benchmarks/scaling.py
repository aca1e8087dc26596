"""How time and memory of reading attention grow with tokens, layers, heads and batch, and how far that is from the limit.

usage: python benchmarks/scaling.py [--device cpu|cuda] [--quick] [--sweeps "tokens,layers,heads,batch"]
           [--dtypes float32,bfloat16] [--width 384] [--heads 6] [--memory 4] [--rounds 30] [--seconds 3] [--threads 2]
           [--append] [--out benchmarks/results/scaling-cpu.json]

Measured is one attention module of timm (for layers, a plain ViT at 224), captured once by a recorder, with random x and random
parameters. A reading is timed on its own, without the forward that was captured. All readings of one point run in turns, in
another order each round, and each is divided by the forward of the same round. Before that its row of the first token is
compared with the softmax written out in float64. Rounds end after --seconds, but not before the third; a reading that takes
many seconds is measured in fewer.

Work is counted from the shapes alone, as the least that any way needs (counted.py). With two peaks that are measured in the
same run and on the same device (`peaks`), before and after all points, the best of all, the limit is

    max(operations / peak operations per second, bytes / peak bytes per second)

and "of the limit" is that over the median time: 1.0 is the physical limit, 0.3 a third of its speed. The peaks are of matrix
products and of memory. A softmax counts as if it ran at the speed of products, so that some limits are out of reach; what lies
in a cache moves faster than memory, so that small ones could be passed.

A map that takes more than --memory (GB; a quarter of what is free) is not formed, and what is not measured is not estimated.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from counted import (
    IMAGE,
    PATCH,
    Sizes,
    bytes_forward,
    bytes_of_maps,
    bytes_reading,
    operations_forward,
    operations_reading,
    with_limit,
)
from throughput import (
    AT_LEAST,
    DTYPES,
    RESULTS,
    TOLERANCE,
    Case,
    NotHereError,
    Run,
    Setup,
    alive,
    attentions_of,
    begun,
    collect,
    globbed,
    judged,
    peak_of,
    say,
    spread,
    timed,
    visit,
)
from torch import Tensor

from hookattn import AttentionMap, AttentionRecorder

INDICES: dict[str, Any] = {"rows": (slice(None), slice(None), 0), "head": (slice(None), 0), "maps": ...}
BEGINS: dict[str, Callable[[Tensor], Tensor]] = {  # what is read begins with this, of the first token's rows in float64
    "rows": lambda rows: rows,
    "head": lambda rows: rows[:, :1],
    "maps": lambda rows: rows[:, :, None],
    "entropy": lambda rows: torch.special.entr(rows).sum(-1, keepdim=True),
}
LONG = 4  # a reading that has taken so many times --seconds gets no more rounds
MATRICES = {"cpu": (512, 1024, 2048), "cuda": (4096, 8192)}  # whose products are the peak of operations
TIMES = {"cpu": 1, "cuda": 10}  # calls of one such measurement
MEMORY = 2**29  # bytes of the tensor that is copied and summed for the peak of memory


def forward(s: Setup) -> Iterator[Run]:
    yield lambda x: (s.models["timm"](x), [])


def nothing_read(s: Setup) -> Iterator[Run]:
    with AttentionRecorder(s.models["timm"]):
        yield from forward(s)


def reading(of: Callable[[AttentionMap], Tensor]) -> Callable[[Setup], Iterator[Run]]:
    """A function of each map, long after the forward."""

    def read(s: Setup) -> Iterator[Run]:
        maps = captured(s)
        yield lambda _: (None, [of(m) for m in maps])

    return read


def statistic(name: str) -> Callable[[Setup], Iterator[Run]]:
    """One of hookattn.statistics, which are computed without forming maps."""

    def read(s: Setup) -> Iterator[Run]:
        try:
            function = getattr(importlib.import_module("hookattn.statistics"), name)
        except (ImportError, AttributeError) as error:
            raise NotHereError(f"there is no hookattn.statistics.{name}") from error
        yield from reading(function)(s)

    return read


def captured(s: Setup) -> list[AttentionMap]:
    """The maps of one forward, nothing computed yet."""

    def record() -> list[AttentionMap]:
        with AttentionRecorder(s.models["timm"]) as rec, torch.no_grad():
            s.models["timm"](s.images[0])
        return list(rec.maps.values())

    maps: list[AttentionMap] = s.once("captured", record)
    return maps


@dataclass(frozen=True)
class Reading:
    """One line of a point.

    Attributes:
        case: what is run.
        operations, moved: the least it needs, of `Sizes` and, for bytes, of those of one number of x.
        formed: bytes of the N x N maps it forms.
    """

    case: Case
    operations: Callable[[Sizes], int]
    moved: Callable[[Sizes, int], int]
    formed: Callable[[Sizes], int] = field(default=lambda _: 0)


def titled(key: str, title: str, run: Callable[[Setup], Iterator[Run]] | None = None, reads: str = "") -> Case:
    run = run or reading(lambda m: m[INDICES[reads]])
    return Case(key, title, "forward", reads, "timm", False, False, contextmanager(run))


READINGS = (
    Reading(titled("forward", "the fused forward", forward), operations_forward, bytes_forward),
    Reading(titled("nothing_read", "recorded, nothing read", nothing_read), operations_forward, bytes_forward),
    Reading(
        titled("class_rows", "row of the first token, m[:, :, 0]", reads="rows"),
        lambda s: operations_reading(s, s.heads, 1),
        lambda s, size: bytes_reading(s, s.heads, s.heads * s.tokens, size),
    ),
    Reading(
        titled("one_head", "one head, m[:, 0]", reads="head"),
        lambda s: operations_reading(s, 1, s.tokens),
        lambda s, size: bytes_reading(s, 1, s.tokens**2, size),
        lambda s: bytes_of_maps(s, 1),
    ),
    Reading(
        titled("all_maps", "all maps, m[...]", reads="maps"),
        lambda s: operations_reading(s, s.heads, s.tokens),
        lambda s, size: bytes_reading(s, s.heads, s.heads * s.tokens**2, size),
        lambda s: bytes_of_maps(s, s.heads),
    ),
    Reading(
        titled("entropy", "entropy(m), without maps", statistic("entropy"), reads="entropy"),
        lambda s: operations_reading(s, s.heads, s.tokens, after=2),  # the sum of p log p
        lambda s, size: bytes_reading(s, s.heads, s.heads * s.tokens, size),
    ),
    Reading(
        titled("received", "received(m), without maps", statistic("received")),
        lambda s: operations_reading(s, s.heads, s.tokens, after=1),  # the sum of columns
        lambda s, size: bytes_reading(s, s.heads, s.heads * s.tokens, size),
    ),
)


def sweeps(width: int, heads: int, quick: bool) -> dict[str, list[Sizes]]:
    """The points, by what is varied in them."""
    found = {
        "tokens": [Sizes(n, width, heads) for n in (196, 512, 1024, 2048, 4096, 8192, 16384)],
        "layers": [Sizes((IMAGE // PATCH) ** 2 + 1, width, heads, layers=n) for n in (1, 2, 4, 8, 12)],
        "heads": [Sizes(1024, width, h) for h in (1, 2, 3, 6, 12, 24) if width % h == 0],
        "batch": [Sizes(196, width, heads, batch=n) for n in (1, 2, 4, 8, 16, 32, 64)],
    }
    return {name: points[:2] for name, points in found.items()} if quick else found


def first_rows(s: Setup) -> list[Tensor]:
    """(batch, heads, tokens) of each layer: the first token's softmax, written out in float64."""
    found = []
    for module, m in zip(attentions_of(s.models["timm"]), captured(s)):
        w_q, w_k, _ = module.qkv.weight.double().chunk(3)
        b_q, b_k, _ = module.qkv.bias.double().chunk(3)
        x, heads = m.x.double(), (module.num_heads, -1)
        q, k = (x[:, 0] @ w_q.T + b_q).unflatten(-1, heads), (x @ w_k.T + b_k).unflatten(-1, heads)
        found.append((torch.einsum("b h d, b n h d -> b h n", q, k) * q.shape[-1] ** -0.5).softmax(-1))
    return found


def tried(s: Setup, r: Reading, sizes: Sizes, memory: int) -> dict[str, Any]:
    """What is to be said of a reading before it is timed, how far its rows of the first token are off, and its peak memory."""
    if r.formed(sizes) > memory:
        return {"verdict": f"not measured: N x N would take {r.formed(sizes) / 1e9:.2g} GB"}
    verdict, error = "ran", None
    try:
        if r.case.reads:
            with r.case.open(s) as run, torch.no_grad():
                right = [BEGINS[r.case.reads](rows) for rows in first_rows(s)]
                got = [t[tuple(map(slice, begin.shape))].clone() for t, begin in zip(run(s.images[0])[1], right)]
            verdict, error = judged(r.case.reads, got, right, TOLERANCE[s.images[0].dtype])
        return {"verdict": verdict, "error": error, "peak_bytes": peak_of(s, r.case)}
    except NotHereError as reason:
        return {"verdict": f"not here: {reason}"}
    except Exception as reason:  # whatever a user would see
        return {"verdict": f"raises {type(reason).__name__}: {str(reason)[:160]}"}


def measured(sizes: Sizes, dtype: torch.dtype, options: argparse.Namespace) -> list[dict[str, Any]]:
    """All readings of one point in turns."""
    s = prepared(sizes, dtype, options.device)
    rows: dict[str, dict[str, Any]] = {}
    for r in READINGS:
        found = {"reading": r.case.key, "title": r.case.title, **asdict(sizes), **tried(s, r, sizes, options.memory)}
        rows[r.case.key] = {**found, "operations": r.operations(sizes), "bytes": r.moved(sizes, dtype.itemsize)}
        collect(s)
    timing = [r.case for r in READINGS if rows[r.case.key]["verdict"] in ("ran", "right")]
    seconds = in_turns(s, timing, options)
    for key, values in seconds.items():
        rows[key] |= {"seconds": spread(values), "times": [float(f"{t:.6g}") for t in values]}
        if "forward" in seconds:
            rows[key]["over_forward"] = spread([t / base for t, base in zip(values, seconds["forward"])])
    return list(rows.values())


def in_turns(s: Setup, timing: Sequence[Case], options: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of each case, by round; each round in another order, so that none always follows the same."""
    at_least = AT_LEAST[options.device]
    times = {c.key: max(1, round(at_least / visit(s, c))) if at_least else 1 for c in timing}
    seconds: dict[str, list[float]] = {c.key: [] for c in timing}
    began, turn = time.perf_counter(), 0
    while turn < 3 or (turn < options.rounds and time.perf_counter() - began < options.seconds):
        for c in random.Random(turn).sample(timing, len(timing)):
            if not turn or sum(seconds[c.key]) < LONG * options.seconds:
                seconds[c.key].append(visit(s, c, turn, times[c.key]))
        turn += 1
    return seconds


def prepared(sizes: Sizes, dtype: torch.dtype, device: str) -> Setup:
    """A module, or for layers a ViT, with random parameters, and what goes into it."""
    shape = {"embed_dim": sizes.width, "num_heads": sizes.heads}
    if sizes.layers:
        model = timm.create_model("vit_small_patch16_224", depth=sizes.layers, **shape)
    else:
        model = timm.layers.Attention(sizes.width, num_heads=sizes.heads, qkv_bias=True)
    model = alive(model).to(device, dtype)
    given = (3, IMAGE, IMAGE) if sizes.layers else (sizes.tokens, sizes.width)
    return Setup("", {"timm": model}, [torch.randn(sizes.batch, *given).to(device, dtype)], False)


def peaks(device: str, dtype: torch.dtype) -> dict[str, float]:
    """The best that is seen in a second each, all into memory that is there already: operations per second of square matrix
    products x x^T, 2 n^3, in the dtype or in float32 (what has no units for a dtype is faster without it), and bytes per second
    of a copy (read and written) or a sum (read)."""

    def fastest(run: Run, x: Tensor) -> float:
        best, began = timed(run, [x], 1), time.perf_counter()
        while time.perf_counter() - began < 1:
            best = min(best, timed(run, [x], TIMES[device]))
        return best

    def product(n: int, dtype: torch.dtype) -> float:
        x, out = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        return 2 * n**3 / fastest(lambda x: (torch.mm(x, x.T, out=out), []), x)

    x, out = (torch.ones(MEMORY // 4, device=device) for _ in range(2))
    copied = 2 * MEMORY / fastest(lambda x: (out.copy_(x), []), x)
    summed = MEMORY / fastest(lambda x: (x.sum(), []), x)
    products = [product(n, kind) for n in MATRICES[device] for kind in {dtype, torch.float32}]
    return {"operations_per_second": max(products), "bytes_per_second": max(copied, summed)}


def stated(points: Sequence[dict[str, Any]], memory: int) -> str:
    """What rows of the first token held at most, at the largest number of tokens, beside maps that were never formed."""
    rows = [p for p in points if p["sweep"] == "tokens" and p["reading"] == "class_rows"]
    if not rows or "seconds" not in rows[-1]:
        return f"Rows of the first token were not read: {rows[-1]['verdict'] if rows else 'left out'}."
    row = rows[-1]
    sizes = Sizes(row["tokens"], row["width"], row["heads"])
    one, every, held = bytes_of_maps(sizes, 1), bytes_of_maps(sizes, sizes.heads), row["peak_bytes"]
    return (
        f"At {sizes.tokens:,} tokens the first token's rows of {sizes.heads} heads took {1e3 * row['seconds']['median']:.3g} ms"
        f" and held {held / 1e6:.3g} MB at most. The N x N map of one head is {one / 1e6:,.0f} MB, {one / held:,.0f} times"
        f" that, of all heads {every / 1e6:,.0f} MB, {every / held:,.0f} times; the limit for maps was {memory / 1e6:,.0f} MB."
    )


def run_so_far(dtype: str, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """All points in one dtype: what there is after each of them, and once more when the peaks have been measured again."""
    load, began, before = os.getloadavg(), time.time(), peaks(options.device, DTYPES[dtype])
    points: list[dict[str, Any]] = []

    def so_far(after: dict[str, float] | None) -> dict[str, Any]:
        best = before if after is None else {kind: max(before[kind], after[kind]) for kind in before}
        run: dict[str, Any] = {"dtype": dtype, "width": options.width, "heads": options.heads, "memory_limit": options.memory}
        run |= {
            "load_average": {"before": load[0], "after": os.getloadavg()[0]},
            "minutes": round((time.time() - began) / 60, 2),
        }
        run |= {"peaks": {**best, "before": before, "after": after}, "points": [with_limit(p, best) for p in points]}
        return {**run, "stated": stated(points, options.memory)}

    for name in options.sweeps:
        for sizes in sweeps(options.width, options.heads, options.quick)[name]:
            say(f"{name}, {dtype}: {sizes}")
            rows = measured(sizes, DTYPES[dtype], options)
            points += [{"sweep": name, **row} for row in rows]
            for row in rows:
                time_of = f"{1e3 * row['seconds']['median']:.4g} ms" if "seconds" in row else ""
                say(f"  {row['reading']}: {row['verdict']} {time_of}")
            yield so_far(None)
    yield so_far(peaks(options.device, DTYPES[dtype]))


def free(device: str) -> int:
    """Bytes that are free on the device."""
    if device == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def parsed() -> argparse.Namespace:
    """The command line, with defaults that fit the device."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="the first two points of each sweep, few rounds: does it run?")
    parser.add_argument("--sweeps", default="*", help="globs of tokens, layers, heads, batch")
    parser.add_argument("--dtypes", default="", help="float32, bfloat16, float16")
    parser.add_argument("--width", type=int, default=384, help="of x")
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--memory", type=float, default=0.0, help="GB that the maps of one reading may take")
    parser.add_argument("--rounds", type=int, default=0, help="at most")
    parser.add_argument("--seconds", type=float, default=3.0, help="after which a point gets no more rounds")
    parser.add_argument("--threads", type=int, default=0, help="of torch, on the CPU")
    parser.add_argument("--append", action="store_true", help="keep other dtypes of the file, if machine and versions agree")
    parser.add_argument("--out", type=Path)
    o = parser.parse_args()
    if o.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device here; nothing is measured or estimated without one.")
    o.sweeps = globbed(o.sweeps, sweeps(o.width, o.heads, o.quick))
    o.dtypes = (o.dtypes or ("float32" if o.quick or o.device == "cpu" else "float32,bfloat16")).split(",")
    o.rounds = o.rounds or (3 if o.quick else 30)
    o.memory = int(1e9 * o.memory) or free(o.device) // 4
    o.out = o.out or RESULTS / f"scaling-{o.device}.json"
    return o


def main() -> None:
    options = parsed()
    results = begun(options)
    for dtype in options.dtypes:
        for run in run_so_far(dtype, options):
            results["runs"] = [r for r in results["runs"] if r["dtype"] != dtype] + [run]
            options.out.write_text(json.dumps(results, indent=1) + "\n")
        say(run["stated"])
    say(f"wrote {options.out}")


if __name__ == "__main__":
    main()
