"""How fast a model runs while its attention is read: hookattn and others, against the fused model alone.

usage: python benchmarks/throughput.py [--device cpu|cuda] [--quick] [--models "vit_small*"] [--cases "keep_maps,naive"]
           [--dtypes float32,bfloat16] [--modes eager,compiled] [--batch 8,fill] [--rounds 40] [--threads 2]
           [--pairs] [--append] [--out benchmarks/results/throughput-cpu.json]

All cases (cases.py, peers.py) run in one process, in turns (measure.py). Each is divided by its base of the same round; a base
stands there twice, and what the second makes of itself is the noise. A case may take long: one that needs several times
its base is measured in fewer rounds. With --pairs the base is measured anew right before each case: twice the time, for a
machine whose speed wanders.

First, what a case returns is compared with the softmaxes of the same model in float64, on its unfused path (oracle.py): what is
wrong, empty, raises or does not fit into memory is reported as that and is not timed. Nothing is estimated.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import peers as peers  # files its cases
import timm
import torch
from cases import CASES, Case, NotHereError, Setup, clear, memory_of, through, time_of
from command import DTYPES, begin_results, matching, measuring_parser, parsed, say, write_results
from measure import AT_LEAST, in_turns, spread, timed
from oracle import judge, randomise, right_answers, right_gradients
from torch import Tensor, nn

MODELS: dict[str, tuple[str, dict[str, Any], int]] = {  # what timm calls it, arguments, size of the images
    "vit_small_patch16_224": ("vit_small_patch16_224", {}, 224),
    "vit_base_patch16_224": ("vit_base_patch16_224", {}, 224),
    "vit_large_patch14_dinov2_518": ("vit_large_patch14_dinov2", {}, 518),
    "vit_base_patch16_1024": ("vit_base_patch16_224", {"img_size": 1024}, 1024),
    "swin_tiny_patch4_window7_224": ("swin_tiny_patch4_window7_224", {}, 224),
}
FILLED = 0.05  # a batch fills the device when twice as many images gain less than this
IMAGES = 3  # batches that take turns, so that none is in a cache
WARMUP = 2


@dataclass
class Measured:
    """What was found of one case in one run."""

    case: Case
    verdict: str = ""
    error: float | None = None
    output: str = ""
    peak: int | None = None
    seconds: dict[int, float] = field(default_factory=dict)  # by round
    before: dict[int, float] = field(default_factory=dict)  # of the base, right before it, by round

    @property
    def is_timed(self) -> bool:
        return self.verdict in ("ran", "right")

    def report(self, base: Measured, batch: int) -> dict[str, Any]:
        """What goes into the results."""
        c = self.case
        row: dict[str, Any] = {"case": c.key, "title": c.title, "base": c.base, "reads": c.reads, "peer": c.peer}
        row |= {"verdict": self.verdict, "error": self.error, "output": self.output, "peak_bytes": self.peak}
        if self.seconds:
            bases = self.before or base.seconds
            ratios = [bases[i] / t for i, t in self.seconds.items() if i in bases]
            row |= {"seconds": spread(list(self.seconds.values())), "throughput_over_base": spread(ratios) if ratios else None}
            row |= {"images_per_second": round(batch / row["seconds"]["median"], 2)}
            row |= {"times": [round(t, 6) for t in self.seconds.values()]}
        return row


class Judge:
    """Compares what cases return with what is right, worked out once for all of them."""

    def __init__(self, s: Setup, cases: Sequence[Case]) -> None:
        self.s, self.cases = s, cases
        self.rights: dict[tuple[str, bool], dict[str, list[Tensor]]] = {}
        self.outputs: dict[str, Tensor] = {}

    def right(self, c: Case) -> list[Tensor]:
        """What a case should have read, of the first images."""
        if (c.family, c.grad) not in self.rights:
            few = self.s.inputs[0][: 2 if self.s.inputs[0].shape[-1] <= 224 else 1]
            model = self.s.models[c.family]
            wanted = sorted({o.reads for o in self.cases if o.reads and (o.family, o.grad) == (c.family, c.grad)})
            answers = {"gradients": right_gradients(model, few, through)} if c.grad else right_answers(model, few, wanted)
            self.rights[c.family, c.grad] = answers
        return self.rights[c.family, c.grad][c.reads]

    def compare_output(self, c: Case, output: Tensor) -> str:
        """How far the output of the model is from that of the first case with the same base."""
        first = self.outputs.setdefault(c.base, output)
        if torch.equal(output, first):
            return "bit-identical"
        return f"off by {float((output.double() - first.double()).norm() / first.double().norm()):.1g}"

    def examine(self, c: Case) -> Measured:
        """Run a case for the first time."""
        m, x = Measured(c), self.s.inputs[0]
        try:
            with c.running(self.s) as run:
                output, got = run(x)
                m.verdict, m.error = judge(c.reads, got, self.right(c) if c.reads else [], x.dtype)
            m.output = "" if output is None else self.compare_output(c, output)
        except NotHereError as reason:
            m.verdict = f"not here: {reason}"
        except torch.OutOfMemoryError:
            m.verdict = "out of memory"
        except Exception as error:  # whatever a user would see
            m.verdict = f"raises {type(error).__name__}: {str(error)[:160]}"
        clear(self.s)
        say(f"  {c.key}: {m.verdict} {m.error or ''} {m.output}")
        return m


def measure(s: Setup, cases: Sequence[Case], options: argparse.Namespace) -> tuple[dict[str, Measured], int]:
    """All cases that are right, in turns; and how often each is called in one turn."""
    judging = Judge(s, cases)
    found = {c.key: judging.examine(c) for c in cases}
    del judging
    timing = {key: m for key, m in found.items() if m.is_timed and m.case.base in found and found[m.case.base].is_timed}
    for m in timing.values():
        m.peak = memory_of(s, m.case)
        clear(s)
    warm: dict[str, float] = {}
    for turn in range(WARMUP):
        warm = {key: time_of(s, m.case, turn) for key, m in timing.items()}
    times = max(1, round(AT_LEAST[s.device.type] / min(warm.values(), default=1.0)))
    every = {key: max(1, min(8, round(warm[key] / warm[m.case.base] / 4))) for key, m in timing.items()}
    say(f"  {len(timing)} cases in {options.rounds} rounds")
    runs = {key: measurement(s, m, times, options.pairs) for key, m in timing.items()}
    for key, seconds in in_turns(runs, options.rounds, every=every).items():
        found[key].seconds = seconds
    return found, times


def measurement(s: Setup, m: Measured, times: int, pairs: bool) -> Callable[[int], float]:
    """A case that is measured in a turn, if it is told so right after its base."""

    def run(turn: int) -> float:
        if pairs and m.case.base != m.case.key:
            m.before[turn] = time_of(s, CASES[m.case.base], turn, times)
        return time_of(s, m.case, turn, times)

    return run


def fill(model: nn.Module, size: int, like: Tensor) -> int:
    """The batch from which on twice as many images are hardly faster, or do not fit."""
    batch, before = 1, 0.0
    while True:
        try:
            x = torch.randn(batch, 3, size, size, device=like.device, dtype=like.dtype)
            with torch.no_grad():
                times = [timed(model, [x], max(1, 16 // batch)) for _ in range(5)]
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            return max(1, batch // 2)
        rate = batch / statistics.median(times)
        if rate < before * (1 + FILLED):
            return batch // 2
        batch, before = 2 * batch, rate


def prepared(name: str, dtype: torch.dtype, mode: str, batch: str, device: str) -> Setup:
    """A model with random parameters, and images for it."""
    timm_name, arguments, size = MODELS[name]
    torch.manual_seed(0)
    model = randomise(timm.create_model(timm_name, **arguments)).to(device, dtype)
    count = fill(model, size, next(model.parameters())) if batch == "fill" else int(batch)
    images = [torch.randn(count, 3, size, size).to(device, dtype) for _ in range(IMAGES)]
    return Setup({"timm": model}, images, mode == "compiled")


def one_run(name: str, dtype: str, mode: str, batch: str, options: argparse.Namespace) -> dict[str, Any]:
    """All cases of one model, dtype, mode and batch size."""
    torch.compiler.reset()
    s = prepared(name, DTYPES[dtype], mode, batch, options.device)
    count = len(s.inputs[0])
    say(f"{name}, {dtype}, {mode}, batch {count}")
    bases = {CASES[k].base for k in options.cases}
    load, began = os.getloadavg(), time.time()
    found, times = measure(s, [c for c in CASES.values() if c.key in options.cases or c.key in bases], options)
    return {
        "model": name,
        "image_size": s.inputs[0].shape[-1],
        "dtype": dtype,
        "mode": mode,
        "batch": count,
        "fills_the_device": batch == "fill",
        "rounds": options.rounds,
        "pairs": options.pairs,
        "forwards_per_measurement": times,
        "load_average": {"before": load[0], "after": os.getloadavg()[0]},
        "minutes": round((time.time() - began) / 60, 2),
        "cases": [m.report(found[m.case.base], count) for m in found.values()],
    }


def identity(run: dict[str, Any]) -> tuple[Any, ...]:
    """What two runs of the same thing have in common."""
    return tuple(run[k] for k in ("model", "dtype", "mode", "batch"))


def options_of_command() -> argparse.Namespace:
    """The command line, with defaults that fit the device."""
    parser = measuring_parser(__doc__)
    parser.add_argument("--models", default="", help=f"globs of {', '.join(MODELS)}")
    parser.add_argument("--cases", default="*", help=f"globs of {', '.join(CASES)}")
    parser.add_argument("--modes", default="", help="eager, compiled")
    parser.add_argument("--batch", default="", help='batch sizes; "fill" for the one that fills the device')
    parser.add_argument("--pairs", action="store_true", help="measure the base before each case")
    o = parsed(parser, "throughput")
    gpu, small = o.device == "cuda", o.quick or o.device == "cpu"
    o.models = matching(o.models or ("vit_small_patch16_224" if small else "*"), MODELS)
    o.cases = matching(o.cases, CASES)
    o.modes = (o.modes or ("eager" if small else "eager,compiled")).split(",")
    o.batch = (o.batch or ("2" if o.quick else "1,fill" if gpu else "8")).split(",")
    return o


def main() -> None:
    options = options_of_command()
    results = begin_results(options)
    for name in options.models:
        for dtype in options.dtypes:
            for mode in options.modes:
                for batch in options.batch:
                    run = one_run(name, dtype, mode, batch, options)
                    results["runs"] = [r for r in results["runs"] if identity(r) != identity(run)] + [run]
                    write_results(results, options.out)
    say(f"wrote {options.out}")


if __name__ == "__main__":
    main()
