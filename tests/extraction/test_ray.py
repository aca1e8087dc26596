"""On a cluster: a store is that of one process bit for bit, also where a node dies; an error comes back as what it was."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Event, Lock, Thread
from typing import Any

import pytest
import torch
from support.inside import (
    Job,
    check_all_there,
    check_seen,
    make_sendable,
    send_actors,
    try_blocks,
    unpack,
    wait_for_threads,
)
from support.on_nodes import FailElsewhere, KillElsewhere, LostTwice, Stuck, wait_for
from support.plain import Noise, Plain
from support.stores import alike, everything, metadata, same
from torch import Tensor

from hookattn import HookattnError, UnreadableError
from hookattn.errors import MissingExtraError, StoreError

extraction = pytest.importorskip("hookattn.extraction", exc_type=ImportError)
RayEngine = extraction.RayEngine
_, ray = pytest.importorskip("zarr"), pytest.importorskip("ray")
# of attributes of its own, when Ray Data is first used in a process
pytestmark = pytest.mark.filterwarnings(r"ignore:`use_\w+` is deprecated:DeprecationWarning")
NODE = {"num_cpus": 1, "object_store_memory": 80 * 2**20, "include_dashboard": False}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A cluster of one node, whose processes find what these tests send them."""
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        tests = Path(__file__).parents[1]
        patch.setenv("PYTHONPATH", os.pathsep.join(map(str, (tests.parent, tests, os.environ.get("PYTHONPATH", "")))))
        patch.setenv("OMP_NUM_THREADS", "2")  # not what actors are to have
        patch.setenv("RAY_DISABLE_IMPORT_WARNING", "1")
        made = Cluster(
            head_node_args={**NODE, "_system_config": {"health_check_period_ms": 1000, "health_check_failure_threshold": 2}},
            initialize_head=True,
        )
        yield made
        ray.shutdown()
        made.shutdown()


def run(out: Path, images: Any, model: Any = None, what: Any = "cls,entropy", **options: Any) -> Any:
    asked = {"batch_size": 3, "block": 4, "dtype": "float32", **options}
    return extraction.extract(Plain() if model is None else model, images, out, what, **asked)


def test_a_node_that_dies_is_survived_and_the_store_is_that_of_one_process(
    tmp_path: Path, cluster: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    model, what = Plain(), ["cls", "rollout", "entropy", "distance", "keys"]
    node = cluster.add_node(**NODE)
    (tmp_path / "read").mkdir()
    stuck, broken, steps = Stuck(tmp_path / "read", node.node_id, block=4), [5, 22], list[Any]()

    def kill(step: Any) -> None:
        if not steps:
            wait_for(lambda: len(stuck.stuck()) > 4)
            cluster.remove_node(node, allow_graceful=False)
        steps.append(step)

    capfd.readouterr()
    engine = RayEngine(cluster.address, actors=2)
    summary = run(tmp_path / "x.zarr", Noise(24, broken=broken, account=stuck), model, what, engine=engine, report=kill)
    told = capfd.readouterr()
    assert told.out == ""
    assert "WARN" not in told.err
    whole = run(tmp_path / "whole.zarr", Noise(24, broken=broken), model, what)
    assert same(everything(tmp_path / "x.zarr"), everything(tmp_path / "whole.zarr"))
    assert metadata(tmp_path / "x.zarr") == metadata(tmp_path / "whole.zarr")
    assert (summary.taken, summary.broken) == (whole.taken, whole.broken) == (22, 2)
    again = [index for _, index in stuck.read()].count(stuck.stuck()[-1])
    assert again == 2  # what the dead node was at was taken by the other
    assert [step.done for step in steps] == [*range(4, 25, 4)]
    assert {name for step in steps for name in step.broken} == {"00000005", "00000022"}
    assert not ray.is_initialized()


def test_an_error_in_an_actor_comes_back_as_what_it_was(tmp_path: Path, cluster: Any) -> None:
    what = extraction.Quantity("top", ("head",), FailElsewhere(LookupError), per_layer=False)
    with pytest.raises(LookupError, match="not of these maps") as raised:
        run(tmp_path / "x.zarr", Noise(8), what=what, engine=RayEngine(cluster.address))
    assert type(raised.value) is LookupError
    assert "on_nodes.py" in str(raised.value.__cause__)  # where it was raised there
    assert run(tmp_path / "x.zarr", Noise(8), what=what).resumed == 0


def test_actors_that_ray_loses_before_they_begin_are_replaced(
    tmp_path: Path, cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes the first one for the end of all, and has lost some itself on a machine that had much to do."""
    context = ray.data.DataContext.get_current()
    if not hasattr(context, "max_consecutive_actor_init_deaths"):
        pytest.skip("Ray does not replace them")
    send_actors(monkeypatch, LostTwice)
    assert run(tmp_path / "x.zarr", Noise(8), engine=RayEngine(cluster.address)).taken == 8
    assert context.max_consecutive_actor_init_deaths == 0
    monkeypatch.setattr(context, "max_consecutive_actor_init_deaths", 1)  # what somebody has asked for stays
    with pytest.raises(HookattnError, match="Ray has given up"):
        run(tmp_path / "y.zarr", Noise(4), engine=RayEngine(cluster.address))
    assert context.max_consecutive_actor_init_deaths == 1


def test_threads_of_ray_that_it_leaves_to_themselves_are_waited_for() -> None:
    """What one of them asks of Ray after it was left would start another."""
    ended, left = list[str](), Event()

    def read(name: str) -> None:
        left.wait(0.3)
        ended.append(name)

    def fetch() -> None:
        left.wait(60)

    read.__module__ = fetch.__module__ = "ray.data._internal.block_batching.util"
    fetching = Thread(target=fetch, name="Prefetcher", daemon=True)
    fetching.start()
    Thread(target=read, args=("one",), daemon=True).start()
    wait_for_threads()
    assert ended == ["one"]
    assert fetching.is_alive()
    left.set()
    fetching.join()


def test_threads_that_are_not_of_the_run_are_not_waited_for() -> None:
    """A pipeline of the user's, the thread that a run is ended in, and whatever calls what no module is known of."""

    def read(wait: Any) -> None:
        wait(60)

    read.__module__ = "ray.data._internal.execution.streaming_executor"
    left, lock = Event(), Lock()
    lock.acquire()
    users = Thread(target=read, args=(left.wait,), daemon=True)
    # a method of what is written in C
    unknown = Thread(target=lock.__enter__.__call__, daemon=True)
    for each in (users, unknown):
        each.start()
    begun = time.monotonic()
    wait_for_threads([users])
    ending = Thread(target=end_here, args=(errors := list[Exception](), [users]), daemon=True)
    ending.start()
    ending.join(30)
    assert not errors
    assert not ending.is_alive()
    assert time.monotonic() - begun < 30
    left.set()
    lock.release()


def end_here(errors: list[Exception], others: list[Thread]) -> None:
    try:
        wait_for_threads(others)
    except Exception as error:
        errors.append(error)


end_here.__module__ = "ray.data._internal.execution.streaming_executor"


STOPPED = """
import os, signal
from support.plain import Noise, Plain
from hookattn import extraction

class Ended(BaseException):
    pass

def end(*_):
    raise Ended

signal.signal(signal.SIGTERM, end)
try:
    how = dict(batch_size=3, block=4, dtype="float32", engine=extraction.RayEngine("ADDRESS"))
    extraction.extract(Plain(), Noise(12), "OUT", "cls,entropy", **how, report=lambda _: os.kill(os.getpid(), signal.SIGTERM))
except Ended:
    print("ended as it was told to")
"""


def test_sigterm_is_left_to_who_answers_it(tmp_path: Path, cluster: Any) -> None:
    """Ray answers it with a traceback of C++ and an abort, as soon as it is connected."""
    code = STOPPED.replace("ADDRESS", cluster.address).replace("OUT", str(tmp_path / "x.zarr"))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (0, "ended as it was told to\n"), done.stderr
    assert "SIGTERM received" not in done.stderr
    run(tmp_path / "x.zarr", Noise(12))
    run(tmp_path / "y.zarr", Noise(12))
    assert same(everything(tmp_path / "x.zarr"), everything(tmp_path / "y.zarr"))


def test_a_node_whose_gpu_pytorch_does_not_see_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    check_seen("cpu")
    with pytest.raises(HookattnError, match=r"given a GPU .* PyTorch 2\S* sees none there: .* for the driver of that node"):
        check_seen("cuda")


class OwnError(Exception):
    """One that cannot be made again of its message alone."""

    def __init__(self, one: str, other: str) -> None:
        super().__init__(f"{one} and {other}")


def test_an_error_that_cannot_be_sent_is_told() -> None:
    sent = make_sendable(OwnError("this", "that"))
    assert type(sent) is HookattnError
    assert str(sent) == "OwnError: this and that"
    error = UnreadableError("so")
    assert make_sendable(error) is error
    with pytest.raises(UnreadableError, match=r"^so$") as raised:
        unpack(pickle.dumps((error, "where it was raised")))
    assert raised.value.__cause__ is None  # it says all itself


def told(m: Any) -> Tensor:
    """Of what figures depend on beside the model."""
    return m[:, :, 0, 0] * 0 + torch.get_num_threads() + (10 if torch.get_float32_matmul_precision() == "high" else 0)


def test_an_image_that_ends_each_process_that_reads_it_is_told_when_all_others_are_done(
    tmp_path: Path, cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a cluster that is connected, which is used and left; and of images that are tried again, all of which are broken."""
    monkeypatch.chdir(tmp_path)
    Path("read").mkdir()
    kill, what, out = KillElsewhere(Path("read"), 5), [extraction.Quantity("told", ("head",), told), "cls"], Path("x.zarr")
    run(out, Noise(12, broken=[1, 5, 9]), what=what)
    ray.init(cluster.address, log_to_driver=False, logging_level="ERROR")
    torch.set_float32_matmul_precision("high")
    try_blocks(monkeypatch, 1)
    try:
        with pytest.raises(HookattnError, match=r"took 00000005 ended each of 1 times: .* tries these once more"):
            run(out, Noise(12, account=kill), what=what, engine=RayEngine(), retry=True)
        assert ray.is_initialized()
        wait_for(lambda: ray.available_resources().get("CPU") == 1)  # no actor is left
        assert kill.read() == [1, 5, 9]
        assert extraction.open(out).broken() == {"00000005": "OSError: image 5 is broken"}
        assert run(out, Noise(12), what=what, retry=True).resumed == 11
        run(Path("whole.zarr"), Noise(12), what=what)
        found, whole = everything(out), everything("whole.zarr")
        # what it depends on is as here when it was taken: of the others it stays
        assert found.pop("told")[:, 0, 0].tolist() == [11 if number in (1, 5, 9) else 1 for number in range(12)]
        assert (whole.pop("told") == 11).all()
        assert alike(found, whole)
    finally:
        torch.set_float32_matmul_precision("highest")
        ray.shutdown()


def test_nodes_that_have_written_to_a_store_of_their_own_are_told(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"x\.zarr of their own: name a folder that all nodes share"):
        run(tmp_path / "x.zarr", Noise(4), engine=check_all_there)  # and nothing here


def test_what_cannot_be_done_on_a_cluster_is_refused_before_there_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for options in ({"actors": 0}, {"actors": (3, 2)}, {"cpus": 0}, {"gpus": -1}):
        with pytest.raises(HookattnError, match="actors is a number from 1 on"):
            RayEngine(**options)
    lock = Lock()
    with pytest.raises(HookattnError, match=r"cannot be sent .* files are opened when an image"):
        run(tmp_path / "x.zarr", Noise(4, account=lambda _: lock.locked()), engine=RayEngine())
    with pytest.raises(HookattnError, match=r"the model is on meta, and actors have no GPU: RayEngine\(gpus=1\)"):
        RayEngine()(Job(Plain().to("meta"), None, None, [0], None))
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError, match=r'pip install "hookattn\[ray\]"'):
        run(tmp_path / "y.zarr", Noise(4), engine=RayEngine())
