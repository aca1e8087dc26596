"""Run by torchrun: extracts as one of several processes, three times, and tells what came of each.

    torchrun --nproc_per_node 2 rank_run.py FOLDER

"held" finds something else where its store is to be, "whole" goes well when images of both processes that could not be read are
tried again, and in "failing" the second process finds an image that cannot be read under `strict`; it ends with that error.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
import torch
from torch import distributed

import hookattn.extraction as extraction
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


def main(folder: Path) -> None:
    torch.set_num_threads(1)
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
    main(Path(sys.argv[1]))
