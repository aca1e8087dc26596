"""`hookattn record`: any model of timm on any photo."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Union

import timm
import torch
import typer
from PIL import Image

from ..errors import HookattnError
from ..image.tokens import Query
from ..recording.recorder import AttentionRecorder
from .models import DEFAULT_MODEL, load_model, size_options
from .output import answering_errors, console, name_shapes
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
            help="cls, mean, row and column of a patch as 3,7, a point as 0.4,0.6 of height and width, or a token's number."
        ),
    ] = None,
    img_size: Annotated[Union[int, None], typer.Option(help="Resize to this many pixels instead of the model's own.")] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the picture goes.")] = Path("attention.png"),
) -> None:
    """Record any timm model on any photo and draw what a token attends to."""
    with answering_errors():
        asked = None if query is None else _query(query)
        with console.status(f"loading {model}"):
            vit = load_model(model, checkpoint, img_size)
        config = timm.data.resolve_data_config(size_options(img_size), model=vit)
        x = timm.data.create_transform(**config, is_training=False)(_open(photo)).unsqueeze(0)
        with console.status("running"), AttentionRecorder(vit, _layers(layers)) as rec, torch.no_grad():
            vit(x)
        with console.status("putting every map back into its module"):
            moved = rec.verify()
        console.print(f"{photo.name} at {x.shape[-2]} x {x.shape[-1]}: {len(rec.maps)} maps of {model}, {name_shapes(rec)}")
        console.print(f"put back into their modules, they move the output by {moved:.1e} at most")
        from ..figures.plot import shown_image  # matplotlib is an extra of its own, and takes long to import

        with console.status("drawing"):
            save_picture(shown_image(x[0], config["mean"], config["std"]), rec, asked, out, f"{photo.name}, {model}")


def _open(photo: Path) -> Image.Image:
    try:
        return Image.open(photo).convert("RGB")
    except OSError as error:
        raise HookattnError(f"{photo} is no image that can be read ({error}).") from error


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
