"""DDP and FSDP in two processes: maps and gradients are exact, or refused with what to do; training is bit-identical."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from support.ranks import CHECKS, FULLY_SHARD, work
from torch import distributed

on_the_cpu = pytest.mark.skipif(not FULLY_SHARD, reason="fully_shard of this torch does not run on the CPU")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two processes found, by the name of a check."""
    if not distributed.is_available() or not distributed.is_gloo_available():
        pytest.skip("this torch has no gloo")
    folder: Path = tmp_path_factory.mktemp("ranks")
    context = mp.get_context("spawn")
    processes = [context.Process(target=work, args=(rank, str(folder))) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=180)
    hung = [process for process in processes if process.is_alive()]
    for process in hung:
        process.kill()
    assert not hung, "the processes wait for each other"
    assert [process.exitcode for process in processes] == [0, 0]
    found = [torch.load(folder / f"{rank}.pt") for rank in range(2)]
    for checks in CHECKS:
        assert checks.__name__ not in found[0], found[0].get(checks.__name__)
    return found


@on_the_cpu
def test_gradients_are_exact_under_ddp_and_fsdp_or_refused_and_edits_go_through(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        assert max(found[f"edit {name}"] for name in ("ddp", "blocks", "attention", "root")) < 1e-12
        exact = ("ddp inputs", "ddp maps", "blocks maps", "root maps")
        assert max(found[f"gradients {name}"] for name in exact) < 1e-12
        assert matches(SHARDED, found["gradients blocks inputs"])
        assert matches(SHARDED, found["gradients root inputs"])
        assert matches(
            "UnreadableError: .* its gradient could not be computed during backward: .* sharded again",
            found["gradients attention maps"],
        )


SHARDED = r"StaleMapError: the map of .* is stale: its parameters are sharded again, as FSDP .*keep=\"maps\""


@pytest.mark.parametrize("opened", ["wrapper", "inside", "compiled"])
def test_each_rank_of_a_ddp_records_its_own_forward_under_the_names_of_the_model(
    ranks: list[dict[str, Any]], opened: str
) -> None:
    assert all(found[f"ddp {opened}"] < 1e-12 for found in ranks)


def test_training_a_ddp_is_bit_identical_and_a_step_makes_maps_stale_that_were_not_kept(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        late, kept = found["ddp train inputs"], found["ddp train maps"]
        assert late["identical"]
        assert kept["identical"]
        assert max(late["after the step's backward"], kept["after the step's backward"], kept["in the end"]) < 1e-12
        assert late["in the end"].startswith("StaleMapError: the map of 'blocks.0.attn'")


@on_the_cpu
@pytest.mark.parametrize("what", ["blocks", "attention", "root"])
def test_maps_kept_under_fsdp_are_exact_and_late_ones_are_exact_or_refused(ranks: list[dict[str, Any]], what: str) -> None:
    assert max(ranks[0][f"fsdp {what} maps"]) < 1e-12
    late = ranks[0][f"fsdp {what} inputs"]
    if what == "root":  # what belongs to the root stays gathered until backward
        assert max(late) < 1e-12
    else:
        for told in late:
            assert matches(SHARDED, told)


@on_the_cpu
@pytest.mark.parametrize("what", ["blocks", "attention", "root"])
def test_training_under_fsdp_is_bit_identical_and_nothing_is_read_from_parameters_gathered_again(
    ranks: list[dict[str, Any]], what: str
) -> None:
    for found in ranks:
        late, kept = found[f"fsdp train {what} inputs"], found[f"fsdp train {what} maps"]
        assert late["identical"]
        assert kept["identical"]
        assert max(kept["after the step's backward"], kept["in the end"]) < 1e-12
        assert matches(SHARDED, late["after the step's backward"])
        assert "StaleMapError" in late["in the end"]


@on_the_cpu
def test_parameters_that_were_gathered_again_with_other_values_are_stale(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        assert found["fsdp never sharded"]["identical"]
        assert "StaleMapError" in found["fsdp never sharded"]["in the end"]


@on_the_cpu
def test_attention_whose_inner_layers_are_sharded_is_refused_since_reading_would_wait_for_others(
    ranks: list[dict[str, Any]],
) -> None:
    for told in (*ranks[0]["fsdp layers maps"], *ranks[0]["fsdp layers inputs"]):
        assert matches(r"UnreadableError: .*'blocks\.0\.attn'.*spread over several processes.*Give FSDP the attention", told)


@on_the_cpu
def test_maps_under_mixed_precision_of_fsdp_are_those_of_the_model_in_that_dtype(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        identical, distance = found["fsdp bfloat16"]
        assert identical
        assert 1e-4 < distance < 0.05


@pytest.mark.parametrize("original", [False, True])
def test_the_older_fsdp_is_read_and_refused_likewise(ranks: list[dict[str, Any]], original: bool) -> None:
    assert ranks[0][f"fsdp1 {original} maps"] < 1e-12
    assert matches(SHARDED, ranks[0][f"fsdp1 {original} inputs"])
    assert all(found[f"fsdp1 train {original} {keep}"] is True for found in ranks for keep in ("inputs", "maps"))


def matches(pattern: str, told: Any) -> bool:
    assert isinstance(told, str), told
    return re.match(pattern, told) is not None
