"""`hookattn inspect`: what attention a model has, and how it is read."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from itertools import groupby
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..errors import HookattnError, ModelError
from ..image.preprocessing import preprocessing_of
from ..recording.inspection import Entry, Inspection
from ..recording.inspection import inspect as inspect_call
from ..recording.recorder import AttentionRecorder
from .models import Sizes, make_model, read_size
from .output import below_site_packages, console, join_sizes, make_table, name_bytes, say

T = TypeVar("T")


def inspect_model(name: str, batch: int, img_size: str | None) -> None:
    """Run a model without weights and print what attention it has."""
    with console.status(f"running {name} without weights"):
        inspection, places = _inspect(name, batch, read_size(img_size))
    _print_entries(name, batch, inspection, places)
    _print_calls(inspection)


def _inspect(name: str, batch: int, size: Sizes) -> tuple[Inspection, dict[str, str]]:
    """Inspect a model on the meta device, where nothing is computed; on the CPU where that fails."""
    failed: Exception | None = None
    for device in ("meta", "cpu"):
        try:
            with torch.device(device):
                model = make_model(name, size)
                images = torch.zeros(batch, *_shape(model, size), device=device)
                return inspect_call(model, images), _places(model, images)
        # it looks at values, has no kernel for meta, or lies elsewhere all the same
        except (RuntimeError, NotImplementedError, ValueError, ModelError) as error:
            lies_elsewhere = isinstance(error, ModelError) and isinstance(error.__cause__, RuntimeError)
            if isinstance(error, HookattnError) and not lies_elsewhere:
                raise
            failed = error
    raise HookattnError(f"{name} does not run: {failed}")


def _shape(model: nn.Module, size: Sizes) -> tuple[int, ...]:
    channels, *own = preprocessing_of(model).input_size
    return (channels, *(own if size is None else (size, size) if isinstance(size, int) else size))


def _places(model: nn.Module, images: Tensor) -> dict[str, str]:
    """What the keys of each map stand for: tokens in front, and the grid of patches."""
    with AttentionRecorder(model) as rec, torch.no_grad():
        model(images)
    found = {}
    for m in rec.maps.values():
        try:
            prefix, grid = m.tokens.prefix, m.tokens.grid_size
        except (HookattnError, RuntimeError):  # it is not known, or not without values
            continue
        names = [re.sub(r"\W*\d+\W*$", "", each) for each in prefix]
        front = [f"{names.count(each)} {each}" for each in dict.fromkeys(names)]
        found[m.name] = " + ".join([*front, join_sizes(grid)])
    return found


def _print_entries(model: str, batch: int, inspection: Inspection, places: dict[str, str]) -> None:
    table = make_table("module", "class", "read by", "map", "of", "keys", f"at batch {batch}", "fused")
    for entries in _runs(
        inspection.entries,
        lambda e: (_pattern(e.name), e.class_name, e.read_by, e.shape, e.kind, e.reason, e.fused, places.get(e.name)),
    ):
        e = entries[0]
        name = e.name if len(entries) == 1 else f"{e.name} to {entries[-1].name}, {len(entries)} alike"
        if e.shape is None:
            table.add_row(name, e.class_name, f"not read: {e.reason}")
        else:
            table.add_row(
                name, e.class_name, e.read_by, join_sizes(e.shape), e.kind, places.get(e.name, "-"), *_costs(e, len(entries))
            )
    console.print(table)
    total = sum(e.bytes for e in inspection.entries)
    say("\nmap: batch (and windows) x heads x queries x keys; read by: a recipe, or replay of the module's own forward")
    say("keys: tokens in front, and rows x columns of patches of the image\n")
    say(f"all maps of {model} at batch {batch}: {name_bytes(total)} in float32\n")


def _costs(e: Entry, count: int) -> tuple[str, str]:
    each = f"{count} x {name_bytes(e.bytes)}" if count > 1 else name_bytes(e.bytes)
    return each, "-" if e.fused is None else "yes" if e.fused else "no"


def _print_calls(inspection: Inspection) -> None:
    say("who calls them, with what:\n")
    calls: dict[tuple[str, int], list[Entry]] = {}
    for e in inspection.entries:
        calls.setdefault((e.called_from.file, e.called_from.line), []).append(e)
    for (file, line), entries in calls.items():
        say(f"{below_site_packages(file)}:{line}, in {entries[0].called_from.function}\n    {entries[0].called_from.code}")
        for run in _runs(entries, lambda e: _pattern(f"{e.name}: {e.called_from.x}")):
            for e in run if len(run) < 3 else (run[0], run[-1]):
                say(f"    {e.name}: x is {e.called_from.x}")
            if len(run) > 2:
                say(f"    ... and so for the {len(run) - 2} between them")
        say("")
    for name, reason in inspection.skipped.items():
        say(f"not a map: {name}, {reason}")
    for name in inspection.missed:
        say(f"not recorded: {name} forms a map, but is not known as attention; name it, layers=[...]")


def _runs(items: Iterable[T], key: Callable[[T], Any]) -> list[list[T]]:
    """Items that follow each other and are alike."""
    return [list(run) for _, run in groupby(items, key)]


def _pattern(name: str) -> str:
    """A name without its numbers."""
    return re.sub(r"\d+", "#", name)
