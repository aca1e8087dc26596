"""`hookattn explore`: a page to explore the attention of any model of timm on photos."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Union, cast

import torch
import typer

from ..figures.page import Shown, make_page
from ..image.photo import Photo
from ..recording.recorder import AttentionRecorder
from .models import DEFAULT_MODEL, load_model, read_size
from .output import answering_errors, console, join_sizes, name_bytes
from .record import _layers, _query, _run


def explore(
    photos: Annotated[list[Path], typer.Argument(help="Image files.", exists=True, dir_okay=False)],
    model: Annotated[str, typer.Option("--model", "-m", help="Any model of timm.list_models().")] = DEFAULT_MODEL,
    checkpoint: Annotated[
        Union[Path, None], typer.Option("--checkpoint", "-c", help="Weights from a file instead of the hub.", exists=True)
    ] = None,
    layers: Annotated[
        Union[str, None], typer.Option(help="Names, globs or positions, comma separated: blocks.1*.attn,-1")
    ] = None,
    query: Annotated[Union[str, None], typer.Option(help="What the page begins with, as for record.")] = None,
    img_size: Annotated[
        Union[str, None],
        typer.Option(metavar="H,W", help="This many pixels instead of the model's own; or one number."),
    ] = None,
    crop: Annotated[
        Union[str, None],
        typer.Option(metavar="none|center", help="Show the whole photo or its middle; whole if the model takes any size."),
    ] = None,
    budget: Annotated[
        str, typer.Option(help="How large the page may be; above that layers are left out and queries pooled, and it says so.")
    ] = "20MB",
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the page goes.")] = Path("attention.html"),
) -> None:
    """Write one HTML file to explore the attention of a model on photos: hover a patch, see what it looks at.

    hookattn explore dog.jpg --model vit_small_patch14_reg4_dinov2.lvd142m -o dog.html
    """
    with answering_errors():
        limit = _read_budget(budget)
        with console.status(f"loading {model}"):
            size = read_size(img_size)
            vit = load_model(model, checkpoint, size, whole=crop != "center")
        shown = []
        for path in photos:
            photo = Photo.open(path, vit, size=size, crop=cast(Any, crop))
            with console.status(f"running {path.name}"), AttentionRecorder(vit, _layers(layers)) as rec, torch.no_grad():
                _run(vit, photo)
            steps = "; ".join(photo.steps) or "as it is"
            console.print(f"{path.name}, {join_sizes(photo.size)}: {steps} (crop {photo.crop})", markup=False)
            shown.append(Shown(rec.maps, photo, name=path.name))
        with console.status("computing every map, and putting it back into its module"):
            page = make_page(shown, query=None if query is None else _query(query), budget=limit, title=model)
        console.print(f"wrote {page.save(out)}, {name_bytes(out.stat().st_size)}", markup=False)


def _read_budget(text: str) -> int:
    """A number of bytes: 20MB, 500 kB, 1e6."""
    units = {"GB": 10**9, "MB": 10**6, "KB": 10**3, "B": 1}
    number, unit = text.strip().upper(), 1
    for name, size in units.items():
        if number.endswith(name):
            number, unit = number.removesuffix(name), size
            break
    try:
        count = int(float(number) * unit)
    except (ValueError, OverflowError):
        count = 0
    if count <= 0:
        raise typer.BadParameter(f"{text!r} is no size of a file: 20MB, 500KB, or a number of bytes.", param_hint="--budget")
    return count
