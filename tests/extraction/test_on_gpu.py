"""What a GPU is given to do while images are read: stores are those of a CPU, and one batch is begun before the last is put."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.drawn import Drawn, small_vit
from support.inside import Copies, taking
from support.stores import everything, full_after, same

from hookattn import AttentionMap, HookattnError

extraction = pytest.importorskip("hookattn.extraction", exc_type=ImportError)
pytest.importorskip("zarr")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
WHAT = "cls,rollout,entropy,distance,received,keys,maps"
HOW: dict[str, Any] = {"batch_size": 3, "block": 5, "dtype": "float32"}


class Later:
    """What tells that copies are made: not before somebody has waited."""

    def __init__(self, log: list[str], number: int) -> None:
        self.log, self.number, self.is_made = log, number, False

    def query(self) -> bool:
        return self.is_made

    def synchronize(self) -> None:
        self.is_made = True
        self.log.append(f"waited for {self.number}")


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Copies that are made as by a GPU: later; and what was done in which order."""
    told, start = list[str](), taking.start_copies

    def start_later(pairs: Any) -> Copies:
        number = sum(each.startswith("begun") for each in told)
        told.append(f"begun {number}")
        copies = start([(torch.empty_like(place), values) for place, values in pairs])
        later: Any = Later(told, number)
        return Copies([(place, values) for (place, _), (_, values) in zip(pairs, copies.pairs)], [later])

    monkeypatch.setattr(taking, "start_copies", start_later)
    return told


def test_a_batch_is_begun_before_the_last_is_waited_for_and_all_is_the_same(tmp_path: Path, log: list[str]) -> None:
    model, images, done = small_vit(), Drawn(13, broken=[4]), list[int]()
    extraction.extract(model, images, tmp_path / "a.zarr", WHAT, **HOW, report=lambda now: done.append(now.done))
    begun = [f"begun {n}" for n in range(5)]
    waited = [f"waited for {n}" for n in range(5)]
    assert log == [begun[0], *[each for n in range(1, 5) for each in (begun[n], waited[n - 1])], waited[4]]
    assert done == [3, 5, 8, 10, 13]


def test_the_store_is_bit_for_bit_that_of_waiting_each_time(
    tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, images = small_vit(), Drawn(13, broken=[4])
    extraction.extract(model, images, tmp_path / "a.zarr", WHAT, **HOW)
    request.getfixturevalue("log")
    extraction.extract(model, images, tmp_path / "b.zarr", WHAT, **HOW)
    monkeypatch.setattr(taking, "_MOST", 100)  # more than is let be on its way
    extraction.extract(model, images, tmp_path / "c.zarr", WHAT, **HOW)
    a, b, c = (everything(tmp_path / f"{name}.zarr") for name in "abc")
    assert same(a, b)
    assert same(a, c)


@pytest.mark.usefixtures("log")
def test_what_is_there_when_the_next_batch_fails_is_written(tmp_path: Path) -> None:
    calls: list[int] = []

    def fail(m: AttentionMap) -> torch.Tensor:
        calls.append(0)
        if len(calls) > 1 + 2 * 2:  # the probe's, and those of two layers of two batches
            raise HookattnError("no more")
        return m[:, :, 0].amax(-1)

    model, images = small_vit(depth=1), Drawn(10)
    what = [extraction.Quantity("top", ("head",), fail)]
    with pytest.raises(HookattnError, match="no more"):
        extraction.extract(model, images, tmp_path / "x.zarr", what, batch_size=2, block=2)
    assert list(everything(tmp_path / "x.zarr")["status"]) == [1] * 8 + [0] * 2


@pytest.mark.usefixtures("log")
def test_time_in_which_the_model_still_runs_is_no_waiting(tmp_path: Path) -> None:
    model, images, waited = small_vit(), Drawn(6), list[float]()
    note = lambda now: waited.append(now.waited)  # noqa: E731
    extraction.extract(model, images, tmp_path / "x.zarr", "cls", batch_size=1, block=6, report=note)
    assert waited == waited[:1] * 6  # for the first image alone
    assert waited[0] > 0


@pytest.mark.parametrize("what", ["maps", "maps,cls,rollout"])
def test_no_more_than_one_layers_map_is_held_where_maps_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    model, seen = small_vit(depth=3), list[int]()
    put = taking.copy_into

    def note(pairs: Any) -> None:
        pairs = list(pairs)
        seen.append(sum(values.dim() == 4 and values.shape[-1] == values.shape[-2] for _, values in pairs))
        put(pairs)

    monkeypatch.setattr(taking, "copy_into", note)
    extraction.extract(model, Drawn(2), tmp_path / "x.zarr", what, batch_size=2)
    assert seen == [1] * 3


def test_nothing_is_left_on_the_model_where_a_block_cannot_be_written(tmp_path: Path) -> None:
    model = small_vit()
    with full_after(65), pytest.raises(HookattnError) as held:
        extraction.extract(model, Drawn(40), tmp_path / "x.zarr", "cls", batch_size=2, block=4)
    assert "make room" in str(held.value)  # whose frames are there still
    assert 0 < list(everything(tmp_path / "x.zarr")["status"]).count(1) < 40
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@needs_cuda
@pytest.mark.parametrize("dtype", ["float32", "uint8"])
def test_a_store_of_a_gpu_is_that_of_a_cpu(tmp_path: Path, dtype: str) -> None:
    model, images = small_vit(reg_tokens=1), Drawn(13, broken=[4])
    how = {**HOW, "dtype": dtype, "workers": 2}
    extraction.extract(model, images, tmp_path / "a.zarr", WHAT, **how)
    extraction.extract(copy.deepcopy(model).cuda(), images, tmp_path / "b.zarr", WHAT, **how)
    a, b = (everything(tmp_path / f"{name}.zarr") for name in "ab")
    assert a.keys() == b.keys()
    for name, array in a.items():
        if array.dtype.kind == "f":
            rtol, atol = (2e-3, 1e-3) if array.dtype == np.float16 else (2e-4, 2e-5)
            np.testing.assert_allclose(b[name], array, rtol=rtol, atol=atol, err_msg=name)
        elif array.dtype == np.uint8 and array.ndim > 1:
            assert abs(b[name].astype(int) - array.astype(int)).max() <= 1, name
        else:
            assert (b[name] == array).all(), name


@needs_cuda
@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")
def test_figures_are_taken_while_nobody_waits_for_the_gpu() -> None:
    model, images = small_vit().cuda(), torch.randn(4, 3, 64, 64, device="cuda")
    asked = extraction.quantities.find_quantities("cls,entropy,distance,received,keys")
    taker: Callable[..., Any] = taking.Taker
    with taker(model, None, asked) as taker_of:
        known = taker_of.probe(images[:1])
        out = {name: np.full((4, *shape), np.nan, np.float32) for name, shape in known.shapes.items()}
        taker_of.take(images, known, out).copies.finish()
        for values in out.values():
            values.fill(np.nan)
        try:
            torch.cuda.set_sync_debug_mode("error")
            taken = taker_of.take(images, known, out)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        taken.copies.finish()
    assert all(np.isfinite(values).all() for values in out.values())


@needs_cuda
@pytest.mark.filterwarnings(r"ignore:`use_\w+` is deprecated:DeprecationWarning")
def test_actors_share_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ray, tests = pytest.importorskip("ray"), Path(__file__).parents[1]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, (tests.parent, tests, os.environ.get("PYTHONPATH", "")))))
    model, images = small_vit(), Drawn(13, broken=[4])
    extraction.extract(copy.deepcopy(model).cuda(), images, tmp_path / "a.zarr", WHAT, **HOW)
    ray.init(num_cpus=4, num_gpus=1, include_dashboard=False, log_to_driver=False, object_store_memory=200 * 2**20)
    try:
        engine = extraction.RayEngine(actors=2, gpus=0.5)
        extraction.extract(model, images, tmp_path / "b.zarr", WHAT, **HOW, engine=engine)
    finally:
        ray.shutdown()
    assert same(everything(tmp_path / "a.zarr"), everything(tmp_path / "b.zarr"))
