"""Run as a script: extracts into a store again and again, each run killed after a random while, and tells what became of it.

    python killed.py FOLDER KILLS

It prints, in JSON: how many were killed, how often there was a store after that, blocks that were torn, blocks that were read
again though they were done, and how many images each run took for nothing.

Everything is imported once, before the first fork; each run, and each look into the store, is a process of its own.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
import torch
import xarray  # noqa: F401
import zarr

import hookattn.extraction as extraction
from support.drawn import Drawn, small_vit

IMAGES, BLOCK = 24, 3


def forked(job: Callable[[], Any], after: float | None = None) -> Any:
    """What a job returns in a process of its own; None if it was killed, after so many seconds."""
    receives, sends = os.pipe()
    if (child := os.fork()) == 0:
        status = 1
        try:
            os.close(receives)
            os.write(sends, json.dumps(job()).encode())
            status = 0
        except BaseException:  # which nothing else would tell
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(sends)
    if after is not None:
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
    with os.fdopen(receives, "rb") as file:
        told = file.read()
    status = os.waitpid(child, 0)[1]
    if status and not (after is not None and os.WIFSIGNALED(status)):
        raise SystemExit(f"a run ended with {status}")
    return json.loads(told) if told and not status else None


class Account:
    """A file that gets a line for everything that happens, whole even where the process is killed."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def add(self, number: int) -> None:
        file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        os.write(file, f"{number}\n".encode())
        os.close(file)

    def numbers(self) -> list[int]:
        return [int(line) for line in self.path.read_text().split()] if self.path.exists() else []


def extract(out: Path, model: Any, workers: int, read: Account, taken: Account) -> bool:
    images = Drawn(IMAGES, account=read.add)
    report = lambda now: taken.add(now.done)  # noqa: E731
    extraction.extract(model, images, out, "cls,entropy,maps", batch_size=2, block=BLOCK, workers=workers, report=report)
    return True


def look(out: Path, whole: Path) -> dict[str, Any] | None:
    """Which blocks of a store count as done, and which of those do not hold what they should; None if it is not made yet."""
    if not (out / "zarr.json").exists():
        return None
    there, expected = (zarr.open_group(each, mode="r") for each in (out, whole))
    if there.attrs["hookattn"].get("state") == "being made":
        return None
    arrays = {name: array for name, array in there.arrays() if array.metadata.dimension_names[0] == "image"}
    blocks = [slice(start, start + BLOCK) for start in range(0, IMAGES, BLOCK)]
    done = [number for number, rows in enumerate(blocks) if (there["status"][rows] != 0).all()]
    torn = [n for n in done if not all((a[blocks[n]] == expected[name][blocks[n]]).all() for name, a in arrays.items())]
    return {"done": done, "torn": torn}


def main(folder: Path, wanted: int) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, chance = small_vit(), random.Random(0)
    out, whole = folder / "killed.zarr", folder / "whole.zarr"
    began = time.monotonic()
    forked(partial(extract, whole, model, 0, Account(folder / "0 read"), Account(folder / "0 taken")))
    lasts = time.monotonic() - began
    told: dict[str, Any] = {"kills": 0, "begun": 0, "torn": [], "done_again": [], "lost": []}
    done: list[int] = []
    for number in count(1):
        read, taken = Account(folder / f"{number} read"), Account(folder / f"{number} taken")
        enough = told["kills"] >= wanted
        # short enough that it takes many to get to the end, and long enough that most get somewhere
        after = None if enough else chance.uniform(0.05, 0.6) * lasts
        told["kills"] += forked(partial(extract, out, model, number % 4 == 0, read, taken), after) is None
        if (seen := forked(partial(look, out, whole))) is not None:
            told["begun"] += 1
            told["torn"] += seen["torn"]
            # all but the first, which is read to see what the model gives
            told["done_again"] += sorted({each // BLOCK for each in read.numbers()[1:]} & {*done})
            told["lost"] += [done_with - BLOCK * len(seen["done"]) for done_with in taken.numbers()[-1:]]
            done = seen["done"]
        if len(done) == IMAGES // BLOCK:
            if enough:
                break
            shutil.rmtree(out)  # once more from the beginning
            done = []
    print(json.dumps(told))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
