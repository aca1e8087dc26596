"""How time and memory of reading attention grow with tokens, layers, heads and batch, and how far that is from the limit.

usage: python benchmarks/scaling.py [--device cpu|cuda] [--quick] [--sweeps "tokens,layers,heads,batch"]
           [--dtypes float32,bfloat16] [--width 384] [--heads 6] [--memory 4] [--rounds 30] [--seconds 3] [--threads 2]
           [--append] [--out benchmarks/results/scaling-cpu.json]

Measured is one attention module of timm (for layers, a plain ViT at 224), captured once by a recorder, with random x and random
parameters. A reading is timed on its own, without the forward that was captured. All readings of one point run in turns
(measure.py), and each is divided by the forward of the same round. Before that its row of the first token is compared with the
softmax written out in float64. Rounds end after --seconds, but not before the third; a reading that takes many seconds is
measured in fewer.

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
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import timm
import torch
from cases import Case, Setup, attentions_of, clear, memory_of, time_of
from command import DTYPES, begin_results, matching, measuring_parser, parsed, say, write_results
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
from measure import AT_LEAST, Run, in_turns, peaks, spread
from oracle import judge, randomise
from torch import Tensor

from hookattn import AttentionMap, AttentionRecorder
from hookattn.analysis import entropy, received

INDICES: dict[str, Any] = {"rows": (slice(None), slice(None), 0), "head": (slice(None), 0), "maps": ...}
BEGINS: dict[str, Callable[[Tensor], Tensor]] = {  # what is read begins with this, of the first token's rows in float64
    "rows": lambda rows: rows,
    "head": lambda rows: rows[:, :1],
    "maps": lambda rows: rows[:, :, None],
    "entropy": lambda rows: torch.special.entr(rows).sum(-1, keepdim=True),
}


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


def captured(s: Setup) -> list[AttentionMap]:
    """The maps of one forward, nothing computed yet."""

    def record() -> list[AttentionMap]:
        with AttentionRecorder(s.models["timm"]) as rec, torch.no_grad():
            s.models["timm"](s.inputs[0])
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
    return Case(key, title, contextmanager(run), base="forward", reads=reads)


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
        titled("entropy", "entropy(m), without maps", reading(entropy), reads="entropy"),
        lambda s: operations_reading(s, s.heads, s.tokens, after=2),  # the sum of p log p
        lambda s, size: bytes_reading(s, s.heads, s.heads * s.tokens, size),
    ),
    Reading(
        titled("received", "received(m), without maps", reading(received)),
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
            with r.case.running(s) as run:
                right = [BEGINS[r.case.reads](rows) for rows in first_rows(s)]
                got = [t[tuple(map(slice, begin.shape))].clone() for t, begin in zip(run(s.inputs[0])[1], right)]
            verdict, error = judge(r.case.reads, got, right, s.inputs[0].dtype)
        return {"verdict": verdict, "error": error, "peak_bytes": memory_of(s, r.case)}
    except Exception as reason:  # whatever a user would see
        return {"verdict": f"raises {type(reason).__name__}: {str(reason)[:160]}"}


def measured(sizes: Sizes, dtype: torch.dtype, options: argparse.Namespace) -> list[dict[str, Any]]:
    """All readings of one point in turns."""
    s = prepared(sizes, dtype, options.device)
    rows: dict[str, dict[str, Any]] = {}
    for r in READINGS:
        found = {"reading": r.case.key, "title": r.case.title, **asdict(sizes), **tried(s, r, sizes, options.memory)}
        rows[r.case.key] = {**found, "operations": r.operations(sizes), "bytes": r.moved(sizes, dtype.itemsize)}
        clear(s)
    timing = [r.case for r in READINGS if rows[r.case.key]["verdict"] in ("ran", "right")]
    least = AT_LEAST[options.device]
    times = {c.key: max(1, round(least / time_of(s, c))) if least else 1 for c in timing}
    runs = {c.key: partial(time_of, s, c, times=times[c.key]) for c in timing}
    seconds = in_turns(runs, options.rounds, seconds=options.seconds)
    for key, values in seconds.items():
        rows[key] |= {"seconds": spread(list(values.values())), "times": [float(f"{t:.6g}") for t in values.values()]}
        if "forward" in seconds:
            rows[key]["over_forward"] = spread(
                [t / seconds["forward"][i] for i, t in values.items() if i in seconds["forward"]]
            )
    return list(rows.values())


def prepared(sizes: Sizes, dtype: torch.dtype, device: str) -> Setup:
    """A module, or for layers a ViT, with random parameters, and what goes into it."""
    shape = {"embed_dim": sizes.width, "num_heads": sizes.heads}
    torch.manual_seed(0)
    if sizes.layers:
        model = timm.create_model("vit_small_patch16_224", depth=sizes.layers, **shape)
    else:
        model = timm.layers.Attention(sizes.width, num_heads=sizes.heads, qkv_bias=True)
    model = randomise(model).to(device, dtype)
    given = (3, IMAGE, IMAGE) if sizes.layers else (sizes.tokens, sizes.width)
    return Setup({"timm": model}, [torch.randn(sizes.batch, *given).to(device, dtype)])


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


def options_of_command() -> argparse.Namespace:
    """The command line, with defaults that fit the device."""
    parser = measuring_parser(__doc__)
    parser.add_argument("--sweeps", default="*", help="globs of tokens, layers, heads, batch")
    parser.add_argument("--width", type=int, default=384, help="of x")
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--memory", type=float, default=0.0, help="GB that the maps of one reading may take")
    parser.add_argument("--seconds", type=float, default=3.0, help="after which a point gets no more rounds")
    o = parsed(parser, "scaling")
    o.sweeps = matching(o.sweeps, sweeps(o.width, o.heads, o.quick))
    o.memory = int(1e9 * o.memory) or free(o.device) // 4
    return o


def main() -> None:
    options = options_of_command()
    results = begin_results(options)
    for dtype in options.dtypes:
        for run in run_so_far(dtype, options):
            results["runs"] = [r for r in results["runs"] if r["dtype"] != dtype] + [run]
            write_results(results, options.out)
        say(run["stated"])
    say(f"wrote {options.out}")


if __name__ == "__main__":
    main()
