"""Run by torchrun: extracts as one of several processes, and tells what came of it.

    torchrun --nproc_per_node 2 rank_run.py STORE FAILING

FAILING is the rank whose image 6 cannot be read under `strict`, or "none".
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import torch
from torch import distributed

import hookattn.extraction as extraction
from support.drawn import Drawn, small_vit


def main(out: Path, failing: str) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    distributed.init_process_group("gloo")
    rank, told = distributed.get_rank(), Path(f"{out}.{distributed.get_rank()}.json")
    images = Drawn(14, broken=[6] if failing == str(rank) else [])
    try:
        summary = extraction.extract(small_vit(), images, out, "cls,entropy", batch_size=3, block=4, strict=failing != "none")
    except Exception as error:
        told.write_text(json.dumps({"error": f"{type(error).__name__}: {error}"}))
        raise
    told.write_text(json.dumps(summary._asdict()))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
