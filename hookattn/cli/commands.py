"""What can be typed: the commands, their arguments and options."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Union

import typer

from .asked import DEFAULT_MODEL, NAMES, RETRY, Asked, Checkpoint, Crop, Device, DType, ImgSize, Json, Layers, Model, Photos
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


def extract(
    source: Annotated[
        list[str],
        typer.Argument(
            help="A folder, photos, a list of them (.txt), archives (.tar, WebDataset), tables (.parquet), datasets:NAME:SPLIT "
            "of Hugging Face, or addresses (s3://, gs://) of these."
        ),
    ],
    model: Model = DEFAULT_MODEL,
    checkpoint: Checkpoint = None,
    what: Annotated[
        str, typer.Option(help="Any of cls, rollout, entropy, distance, received, keys, maps; comma separated.")
    ] = "cls,entropy,distance",
    layers: Layers = None,
    img_size: ImgSize = None,
    crop: Annotated[
        Union[str, None],
        typer.Option(metavar="none|center", help="The middle of each photo, or all of it: then each has a grid of its own."),
    ] = "center",
    device: Device = "cpu",
    dtype: DType = "float32",
    store_dtype: Annotated[
        str, typer.Option(help="What maps, rows and keys are stored as: float16, float32, or uint8 with a scale for each row.")
    ] = "float16",
    batch: Annotated[int, typer.Option(help="Images in a forward.", min=1)] = 32,
    workers: Annotated[int, typer.Option(help="Processes that read images ahead.", min=0)] = 2,
    block: Annotated[
        Union[int, None], typer.Option(help="Images that are written together; up to 1,024 in 128 MB if not given.", min=1)
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Stop at the first image that cannot be read.")] = False,
    retry: Annotated[bool, typer.Option(RETRY, help="Try images again that could not be read.")] = False,
    image_column: Annotated[Union[str, None], typer.Option(help="Of a table: which column holds images.")] = None,
    label_column: Annotated[Union[str, None], typer.Option(help="Of a table: which column holds labels.")] = None,
    engine: Annotated[str, typer.Option(help="local, or ray for several machines.")] = "local",
    address: Annotated[Union[str, None], typer.Option(help="Of a Ray cluster; one is started here if not given.")] = None,
    actors: Annotated[
        Union[str, None], typer.Option(help="How many models run at once under Ray: 4, or 1,8 to let Ray choose.")
    ] = None,
    gpus: Annotated[Union[float, None], typer.Option(help="GPUs of each of them.", min=0.0)] = None,
    as_json: Json = False,
    out: Annotated[
        str, typer.Option("--out", "-o", help="The store: a folder, or an address (s3://, gs://).")
    ] = "attention.zarr",
) -> None:
    """Extract attention of a data set into a Zarr store. Stopped, it goes on by the same command; torchrun splits it."""
    with answering_errors(as_json):
        from .extract import Wanted, Where, extract_images

        asked = Asked(model, checkpoint, layers, img_size, crop, device, dtype)
        where = Where(engine, address, actors, gpus)
        wanted = Wanted(what, store_dtype, batch, workers, block, strict, retry, image_column, label_column, where)
        extract_images(source, asked, wanted, out, as_json)


def show(
    store: Annotated[str, typer.Argument(help="A store that extract has written, or a .safetensors file of record.")],
    image: Annotated[Union[str, None], typer.Option(help="Name or number of an image; without, what there is is told.")] = None,
    query: Annotated[Union[str, None], typer.Option(help="As for record.")] = None,
    photo: Annotated[Union[Path, None], typer.Option(help="The photo, where it is not found again.")] = None,
    budget: Annotated[
        Union[str, None], typer.Option(help="How large a page may be, as for explore: 20MB if not given.")
    ] = None,
    as_json: Json = False,
    out: Annotated[
        Union[Path, None], typer.Option("--out", "-o", help="A picture, attention.png if not given, or a page (.html).")
    ] = None,
) -> None:
    """Say what is in a store or a file of maps, and draw one of its images, as a picture or a page to explore."""
    with answering_errors(as_json):
        from .show import Wanted, show_stored

        show_stored(store, Wanted(image, query, photo, budget, out), as_json)


def inspect(
    model: Annotated[str, typer.Argument(help=NAMES)] = DEFAULT_MODEL,
    batch: Annotated[int, typer.Option(help="Batch size the maps' bytes are told for.", min=1)] = 1,
    img_size: ImgSize = None,
) -> None:
    """Say what attention a model has, how it is read, how large its maps are, and who calls it with what."""
    with answering_errors():
        from .inspect import inspect_model

        inspect_model(model, batch, img_size)
