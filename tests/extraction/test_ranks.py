"""Under torchrun: two processes fill one store as one does, and where one of them fails both end, and can be gone on with."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import timm
from safetensors.torch import save_file
from support.drawn import draw
from support.plain import Noise, Plain
from support.stores import alike, everything, metadata

extraction = pytest.importorskip("hookattn.extraction", exc_type=ImportError)
pytest.importorskip("zarr")
SCRIPT = Path(__file__).parents[1] / "support" / "rank_run.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two processes have been at work, see the script."""
    found = tmp_path_factory.mktemp("ranks")
    (found / "held.zarr").write_text("something else")
    for number, name in enumerate("abcde"):
        (found / "photos" / name).with_suffix(".png").parent.mkdir(exist_ok=True)
        (found / "photos" / name).with_suffix(".png").write_bytes(draw(number, 60, 40 + 10 * number))
    (found / "photos/broken.jpg").write_bytes(b"hello")
    save_file(timm.create_model("test_vit").state_dict(), found / "weights.safetensors")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(SCRIPT), str(found)]
    with ExitStack() as held:  # all at once, or one might come twice
        free = [held.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(3)]
        command += [str(each.getsockname()[1]) for each in free]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode != 0  # the last of them fails
    assert (found / "failing.1.json").exists(), done.stderr[-3000:]
    return found


def test_of_two_processes_that_type_the_command_one_prints(folder: Path) -> None:
    one, other = told_of(folder, "typed")
    facts = json.loads(one["first"][1])
    assert (facts["taken"], facts["broken"], list(facts["left_out"])) == (5, 1, ["broken.jpg"])
    assert other["first"] == [0, "", ""]
    assert (one["other"][0], other["other"][0]) == (1, 1)
    assert (one["other"][2] + other["other"][2]).count("was begun with other settings") == 1
    assert " 4/4 " in one["bar"].split("\rimages of process 1 of 2 ")[-1]  # of three blocks, the first and the last
    assert other["bar"] == ""


def told_of(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads((folder / f"{name}.{rank}.json").read_text()) for rank in (0, 1)]


def run_alone(out: Path) -> Any:
    return extraction.extract(Plain(), Noise(14), out, "cls,entropy", batch_size=3, block=4)


def same_stores(one: Path, other: Path) -> bool:
    return alike(everything(one), everything(other)) and metadata(one) == metadata(other)


def test_two_processes_fill_one_store_as_one_does(tmp_path: Path, folder: Path) -> None:
    whole = run_alone(tmp_path / "one.zarr")
    # one image of each of the blocks 0 and 1 was tried again, one by each
    told = told_of(folder, "whole")
    assert [(each["taken"], each["resumed"]) for each in told] == [(whole.taken, 12), (14, 12)]
    assert [each["steps"] for each in told] == [[[13, 13, rank, 2]] for rank in (0, 1)]
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
