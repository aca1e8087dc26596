"""What can be typed: the commands, their arguments and options."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Union

import typer

from .asked import DEFAULT_MODEL, NAMES, Asked, Checkpoint, Crop, Device, DType, ImgSize, Json, Layers, Model, Photos
from .output import answering_errors


def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the picture goes.")] = Path("demo.png"),
    seed: Annotated[int, typer.Option(help="Which scene is drawn; any number.", min=0)] = 7,
) -> None:
    """Record a small trained ViT on a scene drawn for the occasion. Needs no network."""
    with answering_errors():
        from .run_demo import run_demo

        run_demo(out, seed)


def record(
    photos: Photos,
    model: Model = DEFAULT_MODEL,
    checkpoint: Checkpoint = None,
    layers: Layers = None,
    query: Annotated[
        Union[str, None],
        typer.Option(
            help="cls, mean, row and column of a patch as 3,7, a point of the photo as 0.4,0.6 of its height and width, or a "
            "token's number."
        ),
    ] = None,
    img_size: ImgSize = None,
    crop: Crop = None,
    device: Device = "cpu",
    dtype: DType = "float32",
    as_json: Json = False,
    out: Annotated[
        Union[Path, None],
        typer.Option(
            "--out",
            "-o",
            help="The picture, attention.png if not given; of several photos a folder, attention. A .safetensors file gets the "
            "maps themselves, or the rows of the query, for hookattn.load.",
        ),
    ] = None,
) -> None:
    """Record any model on any photos and draw what a token attends to."""
    with answering_errors(as_json):
        from .record import record_photos

        record_photos(photos, Asked(model, checkpoint, layers, img_size, crop, device, dtype), query, out, as_json)


def explore(
    photos: Photos,
    model: Model = DEFAULT_MODEL,
    checkpoint: Checkpoint = None,
    layers: Layers = None,
    query: Annotated[Union[str, None], typer.Option(help="What the page begins with, as for record.")] = None,
    img_size: ImgSize = None,
    crop: Crop = None,
    device: Device = "cpu",
    dtype: DType = "float32",
    budget: Annotated[
        str, typer.Option(help="How large the page may be; above that queries are pooled and layers left out, and it says so.")
    ] = "20MB",
    as_json: Json = False,
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the page goes.")] = Path("attention.html"),
) -> None:
    """Write one HTML file to explore attention: hover a patch of a photo, see what it looks at. Needs no network."""
    with answering_errors(as_json):
        from .explore import explore_photos

        asked = Asked(model, checkpoint, layers, img_size, crop, device, dtype)
        explore_photos(photos, asked, query, budget, out, as_json)


def analyze(
    photos: Photos,
    model: Model = DEFAULT_MODEL,
    checkpoint: Checkpoint = None,
    layers: Layers = None,
    img_size: ImgSize = None,
    crop: Annotated[
        Union[str, None],
        typer.Option(metavar="none|center", help="The middle of each photo, or all of it: then of as many patches as it has."),
    ] = "center",
    device: Device = "cpu",
    dtype: DType = "float32",
    per_photo: Annotated[bool, typer.Option("--per-photo", help="A row for each photo, not the mean over all.")] = False,
    as_json: Json = False,
    out: Annotated[Path, typer.Option("--out", "-o", help="A table (.csv, .parquet) or a picture (.png, .pdf, .svg).")] = Path(
        "heads.csv"
    ),
) -> None:
    """Tell entropy, mean attention distance and shares of each head of each layer, over photos and folders."""
    with answering_errors(as_json):
        from .analyze import analyze_photos

        asked = Asked(model, checkpoint, layers, img_size, crop, device, dtype)
        analyze_photos(photos, asked, out, per_photo=per_photo, as_json=as_json)


def inspect(
    model: Annotated[str, typer.Argument(help=NAMES)] = DEFAULT_MODEL,
    batch: Annotated[int, typer.Option(help="Batch size the maps' bytes are told for.", min=1)] = 1,
    img_size: ImgSize = None,
) -> None:
    """Say what attention a model has, how it is read, how large its maps are, and who calls it with what."""
    with answering_errors():
        from .inspect import inspect_model

        inspect_model(model, batch, img_size)
