"""What the command lines have in common, and the files of results that they write and read."""

from __future__ import annotations

import argparse
import fnmatch
import json
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from machine import describe_machine, installed_versions

RESULTS = Path(__file__).parent / "results"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def plain_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser whose help is the docstring of a benchmark, as it is written."""
    return argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


def measuring_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with the options of every benchmark that takes times."""
    parser = plain_parser(description)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="little of it, in few rounds: does it run?")
    parser.add_argument("--dtypes", default="", help=", ".join(DTYPES))
    parser.add_argument("--rounds", type=int, default=0, help="at most; 3 if quick, else 30")
    parser.add_argument("--threads", type=int, default=0, help="of torch, on the CPU")
    parser.add_argument("--append", action="store_true", help="keep other runs of the file, if machine and versions agree")
    parser.add_argument("--out", type=Path, help="file of results")
    return parser


def parsed(parser: argparse.ArgumentParser, kind: str) -> argparse.Namespace:
    """Options of a benchmark that takes times, with defaults that fit the device."""
    o = parser.parse_args()
    if o.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device here; nothing is measured or estimated without one.")
    o.dtypes = (o.dtypes or ("float32" if o.quick or o.device == "cpu" else "float32,bfloat16")).split(",")
    o.rounds = o.rounds or (3 if o.quick else 30)
    o.out = o.out or RESULTS / f"{kind}-{o.device}.json"
    return o


def matching(patterns: str, names: Iterable[str]) -> list[str]:
    """The names that one of some globs, with commas between them, stands for."""
    found = [n for n in names if any(fnmatch.fnmatch(n, p) for p in patterns.split(","))]
    if not found:
        raise SystemExit(f"{patterns!r} is none of {', '.join(names)}")
    return found


def begin_results(options: argparse.Namespace) -> dict[str, Any]:
    """Results without runs, or with those of the file if they are added to; threads are set, and the folder is there."""
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.device == "cuda":
        torch.backends.cudnn.allow_tf32 = False  # on by default, and then float32 is none where patches are embedded
    warnings.simplefilter("ignore")
    results: dict[str, Any] = {"machine": describe_machine(options.device), "versions": installed_versions(), "runs": []}
    if options.append and options.out.exists():
        before = json.loads(options.out.read_text())
        if any(before[k] != results[k] for k in ("machine", "versions")):
            raise SystemExit(f"{options.out} is of another machine or of other versions: leave out --append, or give --out.")
        results["runs"] = before["runs"]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    return results


def write_results(results: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(results, indent=1) + "\n")


def table_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser of what makes tables and a plot of files of results."""
    parser = plain_parser(description)
    parser.add_argument("results", type=Path, nargs="*")
    parser.add_argument("--plot", type=Path, help="where to draw it; needs matplotlib")
    return parser


def read_results(kind: str, paths: Iterable[Path]) -> dict[str, dict[str, Any] | None]:
    """The files of results that are named, or else those of both devices by device; None for what there is not."""
    devices = {"CUDA": RESULTS / f"{kind}-cuda.json", "the CPU": RESULTS / f"{kind}-cpu.json"}
    wanted = {str(path): path for path in paths} or devices
    return {name: json.loads(path.read_text()) if path.exists() else None for name, path in wanted.items()}


def save_figure(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, **({"pil_kwargs": {"quality": 88}} if path.suffix == ".jpg" else {}))
    print(f"wrote {path}")
