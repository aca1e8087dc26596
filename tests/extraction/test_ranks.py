"""Under torchrun: two processes fill one store as one does, and where one of them fails both end, and can be gone on with."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.plain import Noise, Plain
from support.stores import everything, metadata, same

extraction = pytest.importorskip("hookattn.extraction", exc_type=ImportError)
pytest.importorskip("zarr")
SCRIPT = Path(__file__).parents[1] / "support" / "rank_run.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two processes have been at work, see the script."""
    found = tmp_path_factory.mktemp("ranks")
    (found / "held.zarr").write_text("something else")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(SCRIPT), str(found)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode != 0  # the last of them fails
    assert (found / "failing.1.json").exists(), done.stderr[-3000:]
    return found


def told_of(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads((folder / f"{name}.{rank}.json").read_text()) for rank in (0, 1)]


def run_alone(out: Path) -> Any:
    return extraction.extract(Plain(), Noise(14), out, "cls,entropy", batch_size=3, block=4)


def same_stores(one: Path, other: Path) -> bool:
    return same(everything(one), everything(other)) and metadata(one) == metadata(other)


def test_two_processes_fill_one_store_as_one_does(tmp_path: Path, folder: Path) -> None:
    whole = run_alone(tmp_path / "one.zarr")
    # blocks 0 and 1 were tried again, one by each
    told = told_of(folder, "whole")
    assert [(each["taken"], each["resumed"]) for each in told] == [(whole.taken, 6), (14, 6)]
    assert [each["steps"] for each in told] == [[[9, 10, rank, 2], [10, 10, rank, 2]] for rank in (0, 1)]
    assert same_stores(folder / "whole.zarr", tmp_path / "one.zarr")


def test_where_one_process_fails_both_end_and_one_goes_on(tmp_path: Path, folder: Path) -> None:
    # the second process has blocks 1 and 3, and fails in the first of them: the other says so too, when it has done its own
    told = [each["error"].split(" (")[0] for each in told_of(folder, "failing")]
    assert told == ["HookattnError: 00000006 cannot be read"] * 2
    run_alone(tmp_path / "one.zarr")
    assert run_alone(folder / "failing.zarr").resumed == 8
    assert same_stores(folder / "failing.zarr", tmp_path / "one.zarr")


def test_where_the_store_is_held_no_process_waits(folder: Path) -> None:
    assert [each["error"].split(":")[0] for each in told_of(folder, "held")] == ["StoreError"] * 2
