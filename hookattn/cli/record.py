"""`hookattn record`: any model of timm on any photo."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Union, cast

import torch
import typer
from torch import nn

from ..errors import HookattnError
from ..image.photo import Photo
from ..image.tokens import Query
from ..recording.recorder import AttentionRecorder
from .models import DEFAULT_MODEL, load_model, read_size
from .output import answering_errors, console, join_sizes, name_shapes
from .picture import save_picture


def record(
    photo: Annotated[Path, typer.Argument(help="An image file.", exists=True, dir_okay=False)],
    model: Annotated[str, typer.Option("--model", "-m", help="Any model of timm.list_models().")] = DEFAULT_MODEL,
    checkpoint: Annotated[
        Union[Path, None], typer.Option("--checkpoint", "-c", help="Weights from a file instead of the hub.", exists=True)
    ] = None,
    layers: Annotated[
        Union[str, None], typer.Option(help="Names, globs or positions, comma separated: blocks.1*.attn,-1")
    ] = None,
    query: Annotated[
        Union[str, None],
        typer.Option(
            help="cls, mean, row and column of a patch as 3,7, a point of the photo as 0.4,0.6 of its height and width, or a "
            "token's number."
        ),
    ] = None,
    img_size: Annotated[
        Union[str, None],
        typer.Option(metavar="H,W", help="This many pixels instead of the model's own; or one number."),
    ] = None,
    crop: Annotated[
        Union[str, None],
        typer.Option(metavar="none|center", help="Show the whole photo or its middle; whole if the model takes any size."),
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the picture goes.")] = Path("attention.png"),
) -> None:
    """Record any timm model on any photo and draw what a token attends to."""
    with answering_errors():
        asked = None if query is None else _query(query)
        with console.status(f"loading {model}"):
            size = read_size(img_size)
            vit = load_model(model, checkpoint, size, whole=crop != "center")
        shown = Photo.open(photo, vit, size=size, crop=cast(Any, crop))
        console.print(f"{photo.name}, {join_sizes(shown.size)}: {'; '.join(shown.steps) or 'as it is'} (crop {shown.crop})")
        with console.status("running"), AttentionRecorder(vit, _layers(layers)) as rec, torch.no_grad():
            _run(vit, shown)
        with console.status("putting every map back into its module"):
            moved = rec.verify()
        console.print(f"{photo.name} at {join_sizes(shown.input_size)}: {len(rec.maps)} maps of {model}, {name_shapes(rec)}")
        console.print(f"put back into their modules, they move the output by {moved:.1e} at most")
        with console.status("drawing"):
            save_picture(shown, rec, asked, out, f"{photo.name}, {model}")


def _run(model: nn.Module, photo: Photo) -> None:
    try:
        model(photo.tensor[None])
    except (AssertionError, RuntimeError) as error:
        if photo.crop == "center" or isinstance(error, HookattnError):
            raise
        # not all models say which sizes they take
        size = join_sizes(photo.input_size)
        raise HookattnError(f"this {type(model).__name__} takes no images of {size} ({error}). Try --crop center.") from error


def _query(text: str) -> Query:
    """What was typed as a query: a name, a number, a row and a column, or a point in fractions of the image."""
    parts = text.split(",")
    try:
        if any("." in part for part in parts):
            y, x = (float(part) for part in parts)
            return y, x
        numbers = [int(part) for part in parts]
    except ValueError:
        return text
    if len(numbers) == 2:
        return numbers[0], numbers[1]
    return numbers[0] if len(numbers) == 1 else text


def _layers(text: str | None) -> list[str | int] | None:
    if text is None:
        return None
    return [int(part) if part.lstrip("-").isdigit() else part for part in (p.strip() for p in text.split(","))]
