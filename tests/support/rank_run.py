"""Run by torchrun: types the command, and then extracts in Python, as one of several processes, and tells what came of each.

    torchrun --nproc_per_node 2 rank_run.py FOLDER PORT PORT PORT

The command is typed three times: as it should be, with another block, and in a terminal. Then, in Python:

"held" finds something else where its store is to be, "whole" goes well when images of both processes that could not be read are
tried again, and in "failing" the second process finds an image that cannot be read under `strict`; it ends with that error.
"""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
import torch
from rich.console import Console
from torch import distributed
from typer.testing import CliRunner

import hookattn.extraction as extraction
from hookattn.cli.app import app
from support.plain import Noise, Plain


def extract(out: Path, name: str) -> Any:
    if name == "whole":
        extract(out, "broken")
    broken = {"broken": [2, 6], "failing": [6] if distributed.get_rank() == 1 else []}.get(name, [])
    how: dict[str, Any] = {"strict": name == "failing", "retry": name == "whole"}
    steps = list[Any]()
    how |= {"batch_size": 3, "block": 4, "report": steps.append}
    found = extraction.extract(Plain(), Noise(14, broken=broken), out, "cls,entropy", **how)
    return {**found._asdict(), "steps": [(each.done, each.images, each.process, each.processes) for each in steps]}


def type_command(folder: Path, ports: Iterator[str]) -> dict[str, Any]:
    def typed(name: str, block: int = 2) -> list[Any]:
        # each call of the command would be in a process of its own, and meets the other at an address where nobody has met
        os.environ.update(MASTER_PORT=next(ports), TORCHELASTIC_USE_AGENT_STORE="False")
        sizes = ["--workers", 0, "--batch", 2, "--block", block]
        args = [folder / "photos", "-m", "test_vit", "-c", folder / "weights.safetensors", "-o", folder / name, *sizes]
        found = CliRunner().invoke(app, ["extract", *map(str, args), "--json"])
        return [found.exit_code, found.stdout, found.stderr]

    found = {"first": typed("typed.zarr"), "other": typed("typed.zarr", block=3)}
    terminal = Console(file=(file := io.StringIO()), force_terminal=True, width=160, color_system=None)
    for name in ("extract", "output"):
        setattr(import_module(f"hookattn.cli.{name}"), "console", terminal)  # noqa: B010
    typed("in_terminal.zarr")
    return {**found, "bar": file.getvalue()}


def main(folder: Path, *ports: str) -> None:
    torch.set_num_threads(1)
    told_by_torchrun = dict(os.environ)
    (folder / f"typed.{os.environ['RANK']}.json").write_text(json.dumps(type_command(folder, iter(ports))))
    os.environ.update(told_by_torchrun)
    distributed.init_process_group("gloo")
    for name in ("held", "whole", "failing"):
        told, error = folder / f"{name}.{distributed.get_rank()}.json", None
        try:
            found = extract(folder / f"{name}.zarr", name)
        except Exception as raised:
            found, error = {"error": f"{type(raised).__name__}: {raised}"}, raised
        told.write_text(json.dumps(found))
    if error is not None:
        raise error


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
