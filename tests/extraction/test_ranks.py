"""Under torchrun: two processes fill one store as one does, and where one of them fails both end, and can be gone on with."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.drawn import Drawn, small_vit
from support.stores import everything, metadata, same

extraction = pytest.importorskip("hookattn.extraction", exc_type=ImportError)
pytest.importorskip("zarr")
SCRIPT = Path(__file__).parents[1] / "support" / "rank_run.py"


def run_by_torchrun(out: Path, failing: str) -> tuple[int, list[dict[str, Any]]]:
    """How it ended, and what each process tells."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", SCRIPT, out, failing]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=300, check=False)
    told = [Path(f"{out}.{rank}.json") for rank in (0, 1)]
    assert all(path.exists() for path in told), done.stderr[-3000:]
    return done.returncode, [json.loads(path.read_text()) for path in told]


def run_alone(out: Path) -> Any:
    torch.manual_seed(0)
    return extraction.extract(small_vit(), Drawn(14), out, "cls,entropy", batch_size=3, block=4)


def same_stores(one: Path, other: Path) -> bool:
    return same(everything(one), everything(other)) and metadata(one) == metadata(other)


def test_two_processes_fill_one_store_as_one_does(tmp_path: Path) -> None:
    code, told = run_by_torchrun(tmp_path / "two.zarr", "none")
    whole = run_alone(tmp_path / "one.zarr")
    assert code == 0
    assert [(each["taken"], each["resumed"]) for each in told] == [(whole.taken, 0), (14, 0)]
    assert same_stores(tmp_path / "two.zarr", tmp_path / "one.zarr")


def test_where_one_process_fails_both_end_and_one_goes_on(tmp_path: Path) -> None:
    code, told = run_by_torchrun(tmp_path / "two.zarr", "1")
    assert code != 0
    # the second process has blocks 1 and 3, and fails in the first of them: the other says so too, when it has done its own
    assert [each["error"].split(" (")[0] for each in told] == ["HookattnError: photo 006.png cannot be read"] * 2
    run_alone(tmp_path / "one.zarr")
    assert run_alone(tmp_path / "two.zarr").resumed == 8
    assert same_stores(tmp_path / "two.zarr", tmp_path / "one.zarr")


def test_where_the_store_is_held_no_process_waits(tmp_path: Path) -> None:
    (tmp_path / "two.zarr").write_text("something else")
    code, told = run_by_torchrun(tmp_path / "two.zarr", "none")
    assert code != 0
    assert [each["error"].split(":")[0] for each in told] == ["StoreError"] * 2
