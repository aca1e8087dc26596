"""`hookattn inspect`: what attention a model has, and how it is read."""

from __future__ import annotations

from typing import Annotated, Union

import timm
import torch
import typer

from ..errors import HookattnError
from ..recording.inspection import Inspection, inspect
from .models import DEFAULT_MODEL, create_model, size_options
from .output import answering_errors, below_site_packages, console, join_sizes, make_table, name_bytes


def inspect_command(
    model: Annotated[str, typer.Argument(help="Any model of timm.list_models().")] = DEFAULT_MODEL,
    batch: Annotated[int, typer.Option(help="Batch size the maps' bytes are told for.", min=1)] = 1,
    img_size: Annotated[Union[int, None], typer.Option(help="Pixels instead of the model's own.")] = None,
) -> None:
    """Say what attention a model has, how it is read, how large its maps are, and who calls it with what."""
    with answering_errors():
        with console.status(f"running {model} without weights"):
            inspection = _inspect(model, batch, img_size)
        _print_inspection(model, batch, inspection)


def _inspect(name: str, batch: int, img_size: int | None) -> Inspection:
    """Inspect a model on the meta device, where nothing is computed; on the CPU where that fails."""
    failed: Exception | None = None
    for device in ("meta", "cpu"):
        try:
            with torch.device(device):
                model = create_model(name, img_size, pretrained=False)
                size = timm.data.resolve_data_config(size_options(img_size), model=model)["input_size"]
                return inspect(model, torch.zeros(batch, *size))
        except HookattnError:
            raise
        except (RuntimeError, NotImplementedError) as error:  # it looks at values, or an operator has no kernel for meta
            failed = error
    raise HookattnError(f"{name} does not run: {failed}")


def _print_inspection(model: str, batch: int, inspection: Inspection) -> None:
    table = make_table("module", "class", "read by", "map", "of", f"at batch {batch}", "fused")
    for e in inspection.entries:
        if e.shape is None:
            table.add_row(e.name, e.class_name, f"not read: {e.reason}")
        else:
            fused = "-" if e.fused is None else "yes" if e.fused else "no"
            table.add_row(e.name, e.class_name, e.read_by, join_sizes(e.shape), e.kind, name_bytes(e.bytes), fused)
    console.print(table)
    total = sum(e.bytes for e in inspection.entries)
    console.print(
        "\nmap: batch (and windows) x heads x queries x keys; read by: a recipe, or replay of the module's own forward"
    )
    console.print(f"all maps of {model} at batch {batch}: {name_bytes(total)} in float32\n")
    console.print("who calls them, with what:\n")
    calls: dict[tuple[str, int], list[str]] = {}
    for e in inspection.entries:
        calls.setdefault((e.called_from.file, e.called_from.line), []).append(f"    {e.name}: x is {e.called_from.x}")
    for (file, line), names in calls.items():
        site = next(e.called_from for e in inspection.entries if (e.called_from.file, e.called_from.line) == (file, line))
        console.print(f"{below_site_packages(file)}:{line}, in {site.function}\n    {site.code}", markup=False)
        console.print("\n".join(names), markup=False)
        console.print()
    for name, reason in inspection.skipped.items():
        console.print(f"not a map: {name}, {reason}", markup=False)
    for name in inspection.missed:
        console.print(f"not recorded: {name} forms a map, but is not known as attention; name it, layers=[...]", markup=False)
