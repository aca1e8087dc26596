"""All that tests take from the inside of the package: where something moves there, it is renamed here and nowhere else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from hookattn import AttentionMap, UnreadableError
from hookattn.analysis.statistics import Sum
from hookattn.attention.narrowing import EachToken
from hookattn.attention.projected import Projected
from hookattn.attention.projection import project_heads
from hookattn.attention.softmax import Chunk
from hookattn.attention.sources import QK, Scores
from hookattn.calls.call import capture
from hookattn.calls.layer import look_up
from hookattn.calls.restore import is_reading, restoring
from hookattn.cli.models import load_model
from hookattn.conditions import changes, samples
from hookattn.conditions.cuda_graphs import is_capturing as is_capturing
from hookattn.conditions.function_modes import OwnMode, lowest
from hookattn.conditions.modules import walk as walk
from hookattn.conditions.samples import Values as Values
from hookattn.conditions.setting import Setting as Setting
from hookattn.conditions.training import random_streams as random_streams
from hookattn.extraction import ray_engine, taking
from hookattn.extraction.engines import Job
from hookattn.extraction.locks import _Note as Note
from hookattn.extraction.locks import hold_store
from hookattn.extraction.ray_engine import _check_all_there as check_all_there
from hookattn.extraction.ray_engine import _check_seen as check_seen
from hookattn.extraction.ray_engine import _unpack as unpack
from hookattn.extraction.ray_engine import _Worker as Worker
from hookattn.extraction.ray_session import wait_for_threads as wait_for_threads
from hookattn.extraction.sent_errors import make_sendable
from hookattn.extraction.sources.images import Images
from hookattn.extraction.sources.open_images import open_images
from hookattn.extraction.writer import Writer
from hookattn.figures import page_data
from hookattn.image import preprocessing
from hookattn.image.preprocessing import preprocessing_of as preprocessing_of
from hookattn.image.sizes import size_after
from hookattn.maps import comparison, established, forward, lazy, specs, transfer
from hookattn.maps.comparison import compare_runs
from hookattn.maps.established import as_in_training
from hookattn.maps.evidence.establish import establish_axes
from hookattn.maps.forward import Forward
from hookattn.maps.reading import source_of
from hookattn.maps.replay import replayed, replayed_by_evidence
from hookattn.maps.transfer import Copies, copy_into, copy_to_cpu, start_copies
from hookattn.maps.vectors import values_by_recipe
from hookattn.recipes import global_attention, registry, window_attention
from hookattn.recipes.registry import find_recipe, list_recipes
from hookattn.recording import edits
from hookattn.recording.buffers import Buffers
from hookattn.recording.hear import Listener as Listener
from hookattn.recording.maps import Maps
from support.oracle import own_softmax

__all__ = [
    "QK",
    "Buffers",
    "Chunk",
    "Copies",
    "EachToken",
    "Images",
    "Job",
    "Maps",
    "Note",
    "Projected",
    "Scores",
    "Sum",
    "Worker",
    "Writer",
    "check_all_there",
    "check_seen",
    "compare_runs",
    "copy_into",
    "copy_to_cpu",
    "establish_axes",
    "find_recipe",
    "hold_store",
    "is_reading",
    "list_recipes",
    "load_model",
    "make_sendable",
    "open_images",
    "project_heads",
    "registry",
    "restoring",
    "size_after",
    "start_copies",
    "taking",
    "transfer",
    "unpack",
]
may_be_tf32, steps_of_rounding = comparison._may_be_tf32, comparison._steps
REMEMBERED = "hookattn.calls.callsite.WeakTensorKeyDictionary"  # by tensor, who made it


def cells_of_whole_photos(cells: int, shapes: list[tuple[int, int]]) -> tuple[int, list[int]]:
    """How many cells whole photos of any shape become at most, and those of some shapes, for a model of so many cells."""
    model = preprocessing.Preprocessing((3, 1, cells))
    sizes = [preprocessing.plan_whole(shape, None, model).size for shape in shapes]
    return preprocessing.most_cells(None, model), [rows * columns for rows, columns in sizes]


def call_of(m: AttentionMap) -> tuple[Any, Any, Any]:
    """The module that was called, and what with."""
    call: Any = m.call
    return call.layer.module, call.args, call.kwargs


def replay_of(m: AttentionMap) -> Tensor:
    """What the module forms when it runs again on what it was called with."""
    module, args, kwargs = call_of(m)
    return formed_as_told(module, *args, **kwargs)


@torch.no_grad()
def formed_as_told(module: Any, *args: Any, **kwargs: Any) -> Tensor:
    """What a module forms when it runs on these arguments, in the axes that its recipe tells."""
    with (call := capture(look_up("module", module), args, kwargs, detach=False)).resumed():
        return replayed(call).narrow().values()


@torch.no_grad()
def replay(module: Any, *args: Any, **kwargs: Any) -> Tensor:
    """What a module forms when it runs on these arguments, in axes that evidence tells."""
    with (call := capture(look_up("module", module), args, kwargs, detach=False)).resumed():
        return replayed_by_evidence(call).narrow().values()


def sweep_modes() -> int:
    """Put a mode of ours on this thread and take it off again, as each reading does; how many lie there then."""
    with lowest(OwnMode()):
        pass
    return torch._C._len_torch_function_stack()


def edits_in_checkpoints() -> int:
    """Of how many checkpoints it is remembered what was edited in them."""
    return sum(len(editing._in_checkpoints) for editing in edits._ON.values())


def forget_what_was_established() -> None:
    """Let the next module be looked at anew: where its map stands if no recipe tells, and what becomes of it."""
    established._KNOWN.clear()
    forward._OF_CLASSES.clear()


@contextmanager
def no_more_evidence() -> Iterator[None]:
    """Fail where evidence is looked for that is not there already."""

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("evidence is looked for")

    with mock.patch.object(established, "establish_axes", fail):
        yield


@contextmanager
def rearranged(change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Let what is established be wrong: another table of rows."""

    def wrongly(*args: Any, **kwargs: Any) -> Any:
        arrangement = establish_axes(*args, **kwargs)
        return replace(arrangement, index=change(arrangement.index))

    forget_what_was_established()
    with mock.patch.object(established, "establish_axes", wrongly):
        yield
    forget_what_was_established()


def form_of(m: AttentionMap) -> Any:
    """Queries and keys, or scores, as they are read of the call."""
    with m.call.resumed():
        return source_of(m.call)


def told_values(m: AttentionMap) -> Tensor | None:
    """The values of a map as its recipe tells them; None where it does not."""
    with m.call.resumed(), as_in_training(m.call):
        found = values_by_recipe(m.call)
        return None if found is None else found * 1


def multiplied_values(m: AttentionMap) -> Tensor:
    """The values of a map as the forward of its module shows them, when it runs again."""
    with m.call.resumed(), as_in_training(m.call):
        return Forward(m.call).values()


def list_values() -> list[str]:
    """Classes whose recipe tells values, by qualified name."""
    return [*registry._VALUES.as_dict()]


def kept(attention: Tensor, like: AttentionMap) -> AttentionMap:
    """A map that is there already, of the call of another."""
    return like.kept(attention)


def lost(reason: str, like: AttentionMap) -> AttentionMap:
    """A map that could not be computed while the model ran."""
    return like.lost(UnreadableError(reason))


def show_image(m: AttentionMap, size: tuple[int, ...]) -> None:
    """Let a map be one of an image of this size."""
    m._geometry = m._geometry._replace(images=size)


def read_in_chunks(patch: pytest.MonkeyPatch, elements: int) -> None:
    """How much of a map is computed at a time."""
    patch.setattr(lazy, "_CHUNK", elements)


def sample_by_kernel(patch: pytest.MonkeyPatch) -> None:
    """Look at values of parameters on the CPU as they are looked at on other devices."""
    patch.setattr(samples, "_AT_HAND", ())


def forget_steps(patch: pytest.MonkeyPatch) -> None:
    """Other tests may hold maps, while which steps of optimizers are counted."""
    patch.setattr(changes, "_current", None)


def own_registers(patch: pytest.MonkeyPatch) -> None:
    """What is filed of classes while a test runs is gone after it."""
    for table in (registry._RECIPES, registry._VALUES, registry._LAYOUTS, registry._PARTITIONS):
        patch.setattr(table, "_facts", table.as_dict())
    patch.setattr(registry, "_WHERE", dict(registry._WHERE))


def refile(patch: pytest.MonkeyPatch, name: str, recipe: Any) -> None:
    """Put another recipe in place of that of a class."""
    patch.setattr(registry._RECIPES, "_facts", {**registry._RECIPES.as_dict(), name: recipe})


def read_by(patch: pytest.MonkeyPatch, recipe: Any = global_attention.attention) -> None:
    """Read every module by one recipe: that of timm's `Attention`, or another."""
    patch.setattr(specs, "find_recipe", lambda _: recipe)
    patch.setattr(established, "find_recipe", lambda _: recipe)


def roll_out_at_most(patch: pytest.MonkeyPatch, tokens: int) -> None:
    """Of how many tokens a page has a rollout at most."""
    patch.setattr(page_data, "_MATRIX", tokens**2)


def try_blocks(patch: pytest.MonkeyPatch, times: int) -> None:
    """How often a block is taken whose process ends, before it is given up."""
    patch.setattr(ray_engine, "_TRIES", times)


def note_projections(patch: pytest.MonkeyPatch) -> list[Projected]:
    """Projections that are computed from now on, rather than taken from what a module has made."""
    computed: list[Projected] = []

    def note(compute: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def noting(self: Projected, *args: Any) -> Tensor:
            computed.append(self)
            return compute(self, *args)

        return noting

    for name in ("_compute", "_compute_few"):
        patch.setattr(Projected, name, note(getattr(Projected, name)))
    return computed


def send_actors(patch: pytest.MonkeyPatch, actor: type) -> None:
    """Let others take blocks on a cluster."""
    patch.setattr(ray_engine, "_Worker", actor)


def ignore_shift_masks(patch: pytest.MonkeyPatch) -> None:
    """Let recipes of windows leave their masks out."""
    patch.setattr(window_attention, "per_window", lambda mask, batch: ())


def formed_by(m: AttentionMap) -> Tensor:
    """What the module itself forms, unfused, on what it was called with."""
    module, args, kwargs = call_of(m)
    return own_softmax(module, *args, **kwargs)
