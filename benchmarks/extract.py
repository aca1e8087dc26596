"""What a data set costs: images a second beside the bare model on the same loader, bytes, memory, going on, two Ray nodes.

usage: python benchmarks/extract.py [--quick] [--model vit_small_patch16_224] [--batch 32] [--rounds 7] [--threads 1]
           [--images 256] [--readers 1] [--cases "class*,rollout"] [--dtypes float32] [--parts rate,bytes,many,ray]
           [--device cpu|cuda] [--append] [--out benchmarks/results/extract-cpu.json]

The bare model and every run are fed by the same loader, processes of which read ahead, with JPEGs of 500 x 375 pixels that are
drawn here, each of which stands there several times where they are many; they take turns, and rates are over that of the bare
model in the same round. Memory is the resident set of the
process that extracts and of the one that reads ahead, while ten thousand small images go through a small model.
"""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from command import DTYPES as KINDS
from command import matching, measuring_parser, parsed, say, write_results
from machine import describe_machine, in_words, installed_versions
from measure import in_turns, spread
from PIL import Image
from torch import nn

from hookattn.extraction import QUANTITIES, RayEngine, extract
from hookattn.extraction.batches import load_batches
from hookattn.extraction.engines import Engine, run_here
from hookattn.extraction.inputs import find_inputs

CASES = {  # what is asked of each image
    "class rows": "cls",
    "entropy, distance": "entropy,distance",
    "class rows, entropy, distance": "cls,entropy,distance",
    "class rows, entropy, distance, received": "cls,entropy,distance,received",
    "rollout": "rollout",
    "keys": "keys",
    "maps": "maps",
}
DTYPES = ("float32", "float16", "uint8")
MANY = 10_000
RUN = "class rows, entropy, distance"  # of which the arithmetic is, beside maps
COUNTS = (10**6, 10**9)
PRICE = 0.023  # $ for a GB and a month: a list price of object storage


DRAWN = 512  # of more photos, each is one of these


def draw_photos(folder: Path, count: int, size: tuple[int, int], drawn: int = MANY) -> Path:
    """JPEGs of coarse noise, as large as photos are."""
    folder.mkdir(parents=True)
    for i in range(min(count, drawn)):
        coarse = np.random.default_rng(i).integers(0, 255, (15, 20, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
        (folder / f"{i:05d}.jpg").write_bytes(file.getvalue())
    for i in range(drawn, count):
        (folder / f"{i:05d}.jpg").hardlink_to(folder / f"{i % drawn:05d}.jpg")
    return folder


def run_bare(model: nn.Module, photos: Path, batch: int, workers: int) -> float:
    """Seconds the model alone takes for all photos, after the first batch has been asked for."""
    inputs = find_inputs(str(photos), model, None, "center")
    like = next(model.parameters())
    began = time.perf_counter()
    with torch.no_grad():
        for each in load_batches(inputs, {0: range(len(inputs.names))}, batch, workers, pin=like.is_cuda):
            for _, images in each.groups:
                model(images.to(like.device, like.dtype, non_blocking=True)).cpu()
    return time.perf_counter() - began


def run_extract(model: nn.Module, photos: Path, batch: int, workers: int, what: str, **options: Any) -> tuple[float, int]:
    """Seconds a run takes, after the first batch has been asked for and until all is written, and the bytes it wrote."""
    with tempfile.TemporaryDirectory() as folder:
        out, ends = Path(folder) / "run.zarr", list[float]()
        begins = list[float]()

        def note(now: Any) -> None:
            begins.append(time.perf_counter() - now.seconds) if not begins else None
            ends.append(now.seconds)

        extract(model, str(photos), out, what, batch_size=batch, workers=workers, report=note, **options)
        seconds = time.perf_counter() - begins[0]
        return seconds, sum(file.stat().st_size for file in out.rglob("*") if file.is_file())


def measure_rates(model: nn.Module, o: Namespace, folder: Path) -> dict[str, Any]:
    """Images a second of the bare model and of each case, and each case over the bare model of its round."""
    count, workers = (16 if o.quick else o.images), o.readers
    photos = draw_photos(folder / "photos", count, (500, 375), DRAWN)
    turns: dict[str, Callable[[int], float]] = {"bare": lambda _: run_bare(model, photos, o.batch, workers)}
    for title in matching(o.cases, CASES):
        turns[title] = partial(lambda what, _: run_extract(model, photos, o.batch, workers, what)[0], CASES[title])
    turns["bare"](0)
    found = in_turns(turns, o.rounds)
    bare = found["bare"]
    return {
        "images": count,
        "dtype": o.dtypes[0],
        "batch": o.batch,
        "readers": workers,
        "rounds": len(bare),
        "bare": spread([count / seconds for seconds in bare.values()]),
        "cases": {
            title: {
                "images_per_second": spread([count / seconds for seconds in times.values()]),
                "over_bare": spread([bare[turn] / seconds for turn, seconds in times.items()]),
            }
            for title, times in found.items()
            if title != "bare"
        },
    }


def measure_bytes(model: nn.Module, o: Namespace, folder: Path) -> dict[str, dict[str, float]]:
    """Bytes of an image in the store, compressed, by quantity and dtype."""
    count = 8 if o.quick else 32
    photos = draw_photos(folder / "some", count, (500, 375))
    found: dict[str, dict[str, float]] = {}
    for name, quantity in QUANTITIES.items():
        kinds = DTYPES if quantity.bounded else DTYPES[:2] if quantity.is_large else ("float32",)
        found[name] = {kind: _bytes_of(model, photos, name, kind, o.batch) / count for kind in kinds}
    return found


def _bytes_of(model: nn.Module, photos: Path, name: str, dtype: str, batch: int) -> int:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run.zarr"
        extract(model, str(photos), out, name, batch_size=batch, dtype=dtype)
        files = [file for part in (name, f"{name}_max") for file in (out / part).rglob("*") if file.name != "zarr.json"]
        return sum(file.stat().st_size for file in files if file.is_file())


SMALL = {"img_size": 64, "depth": 2, "embed_dim": 48, "num_heads": 3, "num_classes": 0}


def watch_memory(photos: str, out: str) -> None:
    """In a process of its own: extract, and print the resident bytes as the run goes on."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", **SMALL).eval()
    held: dict[int, int] = {}

    def note(now: Any) -> None:
        if now.done % 1_000 < 64 and now.done // 1_000 not in held:
            held[now.done // 1_000] = _resident()

    began = time.perf_counter()
    summary = extract(model, photos, out, "cls,entropy,distance,received", batch_size=64, workers=1, block=256, report=note)
    total = time.perf_counter() - began
    print(json.dumps({"held": held, "seconds": total, "done": summary.images, "resumed": summary.resumed}))


def _resident() -> int:
    """Bytes that this process and its children hold, what they share counted once for each."""
    import psutil

    me = psutil.Process()
    return sum(int(each.memory_info().rss) for each in (me, *me.children(recursive=True)))


def measure_many(o: Namespace, folder: Path) -> dict[str, Any]:
    """Memory over many images, and what the same call costs when all of them are there."""
    count = 500 if o.quick else MANY
    photos = draw_photos(folder / "many", count, (80, 64))
    command = [sys.executable, __file__, "--watch", str(photos), str(folder / "many.zarr")]
    first, again = (json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout) for _ in range(2))
    return {"images": count, "held": first["held"], "seconds": first["seconds"], "seconds_when_done": again["seconds"]}


def measure_ray(model: nn.Module, o: Namespace, folder: Path) -> dict[str, Any]:
    """Images a second of one process with one thread and of two Ray nodes of one CPU each, and seconds until the first."""
    import ray
    from ray.cluster_utils import Cluster

    photos = draw_photos(folder / "shared", 32 if o.quick else 128, (500, 375))
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    cluster.add_node(num_cpus=1)
    ray.init(cluster.address, log_to_driver=False, logging_level="ERROR")
    engines = {"one process": run_here, "two nodes": RayEngine(actors=2)}
    try:
        turns = {title: partial(lambda engine, _: _pace(model, photos, engine)[0], engine) for title, engine in engines.items()}
        found = in_turns(turns, min(o.rounds, 5))
        first = {title: _pace(model, photos, engine)[1] for title, engine in engines.items()}
    finally:
        ray.shutdown()
        cluster.shutdown()
    one, two = (found[title] for title in engines)
    return {
        "images_per_second": {title: spread([1 / each for each in found[title].values()]) for title in engines},
        "two_over_one": spread([one[turn] / two[turn] for turn in two]),
        "seconds_until_first": first,
    }


def _pace(model: nn.Module, photos: Path, engine: Engine) -> tuple[float, float]:
    """Seconds an image takes, from the first block that is done to the last; and those until the first."""
    done: list[tuple[float, int]] = []
    began = time.perf_counter()
    options: dict[str, Any] = {"batch_size": 8, "block": 8, "engine": engine}
    with tempfile.TemporaryDirectory() as folder:
        note = lambda now: done.append((time.perf_counter(), now.done))  # noqa: E731
        extract(model, str(photos), Path(folder) / "x.zarr", "cls,entropy,distance", **options, report=note)
    (start, first), (end, last) = done[0], done[-1]
    return (end - start) / (last - first), start - began


def main() -> None:
    parser = measuring_parser(__doc__)
    parser.add_argument("--model", default="vit_small_patch16_224")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--readers", type=int, default=1, help="processes that read images ahead")
    parser.add_argument("--cases", default="*", help=f"globs of {'; '.join(CASES)}".replace(", ", " and "))
    parser.add_argument("--parts", default="rate,bytes,many,ray")
    o = parsed(parser, "extract")
    o.threads = o.threads or (1 if o.device == "cpu" else 0)
    if o.threads:
        torch.set_num_threads(o.threads)
    if o.device == "cuda":
        torch.backends.cudnn.allow_tf32 = False
    model = timm.create_model(o.model, num_classes=0).eval().to(o.device, KINDS[o.dtypes[0]])
    results: dict[str, Any] = json.loads(o.out.read_text()) if o.append and o.out.exists() else {}
    results |= {"machine": describe_machine(o.device), "versions": installed_versions(), "model": o.model}
    measured: dict[str, Callable[[Path], Any]] = {
        "rate": partial(measure_rates, model, o),
        "bytes": partial(measure_bytes, model, o),
        "many": partial(measure_many, o),
        "ray": partial(measure_ray, model, o),
    }
    with tempfile.TemporaryDirectory() as folder:
        for part in o.parts.split(","):
            say(part)
            results[part] = measured[part](Path(folder))
            write_results(results, o.out)
    print(table(results))


def table(results: dict[str, Any]) -> str:
    """The results as tables, and in words."""
    parts = {"rate": table_of_rates, "bytes": table_of_bytes, "many": tell_many, "ray": tell_ray}
    told = [in_words(results), *(make(results[part]) for part, make in parts.items() if part in results)]
    return "\n\n".join([*told, *([table_of_arithmetic(results)] if {"rate", "bytes"} <= results.keys() else [])])


def table_of_rates(rate: dict[str, Any]) -> str:
    """Images a second by case, and over the bare model."""
    lines = ["| taken of each image | images/s | over the bare model | half of the rounds |", "|---|---|---|---|"]
    lines.append(f"| nothing: the bare model | {rate['bare']['median']:.3g} | 1 | |")
    for title, case in rate["cases"].items():
        over, speed = case["over_bare"], case["images_per_second"]["median"]
        lines.append(f"| {title} | {speed:.3g} | {over['median']:.2f} | {over['q1']:.2f} to {over['q3']:.2f} |")
    return "\n".join(lines)


def table_of_bytes(sizes: dict[str, dict[str, float]]) -> str:
    """Bytes of an image by quantity and dtype."""
    lines = [f"| bytes of an image | {' | '.join(DTYPES)} |", "|---" * (len(DTYPES) + 1) + "|"]
    for name, by_dtype in sizes.items():
        cells = (f"{by_dtype[dtype]:,.0f}" if dtype in by_dtype else "" for dtype in DTYPES)
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def table_of_arithmetic(results: dict[str, Any]) -> str:
    """What many images would take, by arithmetic from rates and bytes that were measured."""
    lines = [
        "| arithmetic, not measured | | " + " | ".join(f"{count:.0e} images" for count in COUNTS) + " |",
        "|---|---|---|---|",
    ]
    for title, what in ((RUN, CASES[RUN].split(",")), ("maps", ["maps"])):
        rate = results["rate"]["cases"][title]["images_per_second"]["median"]
        by_dtype = [results["bytes"][name] for name in what]
        size = sum(each.get("float16", each["float32"]) for each in by_dtype)
        hours = [count / rate / 3600 for count in COUNTS]
        lines.append(f"| {title} | hours of one core | {' | '.join(f'{each:,.3g}' for each in hours)} |")
        lines.append(f"| | cores for one day | {' | '.join(f'{max(1, each / 24):,.3g}' for each in hours)} |")
        lines.append(f"| | GB in the store, float16 | {' | '.join(f'{count * size / 1e9:,.3g}' for count in COUNTS)} |")
        lines.append(f"| | $ a month to keep | {' | '.join(f'{count * size / 1e9 * PRICE:,.3g}' for count in COUNTS)} |")
    return "\n".join(lines)


def tell_many(many: dict[str, Any]) -> str:
    """How memory goes, and what a call costs that finds all done."""
    held = {int(thousands): each / 2**20 for thousands, each in many["held"].items()}
    first, last = min(held), max(held)
    return (
        f"{many['images']:,} images of 64 x 64 through a ViT of two layers, two processes: {held[first]:,.0f} MiB after "
        f"{first},000, {held[last]:,.0f} MiB after {last},000. All took {many['seconds']:.3g} s; the same call again, which "
        f"finds all done, {many['seconds_when_done']:.2g} s."
    )


def tell_ray(found: dict[str, Any]) -> str:
    """Two nodes beside one process."""
    one, two = (found["images_per_second"][title]["median"] for title in ("one process", "two nodes"))
    until, over = found["seconds_until_first"], found["two_over_one"]
    return (
        f"Two Ray nodes of one CPU each, on this machine: {two:.3g} images/s, and one process with one thread {one:.3g} "
        f"({over['median']:.2f} times, {over['min']:.2f} at least), from the first block that was done to the last; the first "
        f"was there after {until['two nodes']:.3g} s, in one process after {until['one process']:.3g} s."
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--watch"]:
        watch_memory(*sys.argv[2:])
    else:
        main()
