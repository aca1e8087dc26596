"""The command line: `hookattn demo`, `hookattn record`, `hookattn inspect`."""

from __future__ import annotations

import difflib
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Union
from urllib.parse import urlparse

import huggingface_hub.constants as hub
import numpy as np
import timm
import torch
from torch import nn

from ..errors import HookattnError, MissingExtraError, TokenError
from ..image.tokens import Query
from ..maps.attention_map import AttentionMap
from ..recording.inspection import Inspection, inspect
from ..recording.recorder import AttentionRecorder

try:
    import typer
    from PIL import Image
    from rich.console import Console
    from rich.table import Table
except ImportError as error:
    raise MissingExtraError('the command line needs typer and rich: pip install "hookattn[cli]".') from error


DEFAULT_MODEL = "vit_small_patch14_reg4_dinov2.lvd142m"
app = typer.Typer(
    help="Read the attention of Vision Transformers.", no_args_is_help=True, add_completion=False, rich_markup_mode=None
)
# Into a file or a pipe tables get a fixed width: rich would take 80 columns, and break names of layers.
console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 160)


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the picture goes.")] = Path("demo.png"),
    seed: Annotated[int, typer.Option(help="Which scene is drawn; any number.", min=0)] = 7,
) -> None:
    """Record a small trained ViT on a scene drawn for the occasion. Needs no network."""
    from . import demo as small  # here, since the other commands need not wait for it

    with _answered():
        model, scene = small.load(), small.draw(seed)
        with AttentionRecorder(model) as rec, torch.no_grad():
            logits = model(small.to_input(scene.image[None]))
        guess = small.SHAPES[int(logits.argmax())]
        sure = logits.softmax(-1).max()
        console.print(f"scene {seed} shows a {small.SHAPES[scene.label]}; the model says {guess} ({sure:.0%} sure)")
        console.print(f"{len(rec.maps)} maps recorded, scaled_dot_product_attention on; each put back into its module:\n")
        table = _table("layer", "map", "output moves by", "class token on the shape")
        for m in rec.maps.values():
            on_shape = small.attention_on(m, scene.mask)
            times = on_shape / scene.mask.mean()
            table.add_row(m.name, _by(m.shape), f"{m.verify():.1e}", f"{on_shape:.0%}, {times:.1f} x its area")
        console.print(table)
        _save(scene.image, rec, "cls", out, f"a {guess}, seen by 5 layers of 4 heads")


@app.command()
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
    with _answered():
        asked = None if query is None else _query(query)
        with console.status(f"loading {model}"):
            vit = _load(model, checkpoint, img_size)
        config = timm.data.resolve_data_config(_sized(img_size), model=vit)
        x = timm.data.create_transform(**config, is_training=False)(_open(photo)).unsqueeze(0)
        with console.status("running"), AttentionRecorder(vit, _layers(layers)) as rec, torch.no_grad():
            vit(x)
        with console.status("putting every map back into its module"):
            moved = rec.verify()
        console.print(f"{photo.name} at {x.shape[-2]} x {x.shape[-1]}: {len(rec.maps)} maps of {model}, {_shapes(rec)}")
        console.print(f"put back into their modules, they move the output by {moved:.1e} at most")
        from ..figures.plot import shown_image  # matplotlib is an extra of its own, and takes long to import

        with console.status("drawing"):
            _save(shown_image(x[0], config["mean"], config["std"]), rec, asked, out, f"{photo.name}, {model}")


@app.command(name="inspect")
def inspect_command(
    model: Annotated[str, typer.Argument(help="Any model of timm.list_models().")] = DEFAULT_MODEL,
    batch: Annotated[int, typer.Option(help="Batch size the maps' bytes are told for.", min=1)] = 1,
    img_size: Annotated[Union[int, None], typer.Option(help="Pixels instead of the model's own.")] = None,
) -> None:
    """Say what attention a model has, how it is read, how large its maps are, and who calls it with what."""
    with _answered():
        with console.status(f"running {model} without weights"):
            inspection = _inspect(model, batch, img_size)
        _print_inspection(model, batch, inspection)


def _print_inspection(model: str, batch: int, inspection: Inspection) -> None:
    table = _table("module", "class", "read by", "map", "of", f"at batch {batch}", "fused")
    for e in inspection.entries:
        if e.shape is None:
            table.add_row(e.name, e.class_name, f"not read: {e.reason}")
        else:
            fused = "-" if e.fused is None else "yes" if e.fused else "no"
            table.add_row(e.name, e.class_name, e.read_by, _by(e.shape), e.kind, _bytes(e.bytes), fused)
    console.print(table)
    total = sum(e.bytes for e in inspection.entries)
    console.print(
        "\nmap: batch (and windows) x heads x queries x keys; read by: a recipe, or replay of the module's own forward"
    )
    console.print(f"all maps of {model} at batch {batch}: {_bytes(total)} in float32\n")
    console.print("who calls them, with what:\n")
    calls: dict[tuple[str, int], list[str]] = {}
    for e in inspection.entries:
        calls.setdefault((e.called_from.file, e.called_from.line), []).append(f"    {e.name}: x is {e.called_from.x}")
    for (file, line), names in calls.items():
        site = next(e.called_from for e in inspection.entries if (e.called_from.file, e.called_from.line) == (file, line))
        console.print(f"{_below_site_packages(file)}:{line}, in {site.function}\n    {site.code}", markup=False)
        console.print("\n".join(names), markup=False)
        console.print()
    for name, reason in inspection.skipped.items():
        console.print(f"not a map: {name}, {reason}", markup=False)
    for name in inspection.missed:
        console.print(f"not recorded: {name} forms a map, but is not known as attention; name it, layers=[...]", markup=False)


def _inspect(name: str, batch: int, img_size: int | None) -> Inspection:
    """Inspect a model on the meta device, where nothing is computed; on the CPU where that fails."""
    failed: Exception | None = None
    for device in ("meta", "cpu"):
        try:
            with torch.device(device):
                model = _create(name, img_size, pretrained=False)
                size = timm.data.resolve_data_config(_sized(img_size), model=model)["input_size"]
                return inspect(model, torch.zeros(batch, *size))
        except HookattnError:
            raise
        except (RuntimeError, NotImplementedError) as error:  # it looks at values, or an operator has no kernel for meta
            failed = error
    raise HookattnError(f"{name} does not run: {failed}")


def _sized(img_size: int | None) -> dict[str, int]:
    return {} if img_size is None else {"img_size": img_size}


def _load(name: str, checkpoint: Path | None, img_size: int | None) -> nn.Module:
    if checkpoint is not None:
        # pretrained, with the file in place of the hub's: timm then converts names and sizes as it does for those
        return _create(name, img_size, pretrained=True, num_classes=0, pretrained_cfg_overlay={"file": str(checkpoint)})
    if not _hub_answers():
        hub.HF_HUB_OFFLINE = True  # weights that were fetched before still load, and nobody waits for the others
    try:
        return _create(name, img_size, pretrained=True, num_classes=0)
    except HookattnError:
        raise
    except Exception as error:  # whatever the hub's client and its network stack raise
        raise HookattnError(
            f"the weights of {name} could not be fetched ({type(error).__name__}). With a file of weights: "
            f"hookattn record PHOTO --model {name.split('.')[0]} --checkpoint FILE. Without a network: hookattn demo."
        ) from error


def _hub_answers() -> bool:
    """Whether the hub's name resolves, asked first, since its client waits and tries again; behind a proxy it need not."""
    if any(name.lower().endswith("_proxy") for name in os.environ):
        return True
    try:
        socket.getaddrinfo(urlparse(hub.ENDPOINT).hostname, 443)
    except OSError:
        return False
    return True


def _create(name: str, img_size: int | None, **options: Any) -> nn.Module:
    if not timm.is_model(name):
        near = timm.list_models(f"*{name.split('.')[0]}*")[:6]
        near = near or difflib.get_close_matches(name, timm.list_models(), n=6, cutoff=0.4)
        raise HookattnError(f"timm has no model {name!r}." + (f" Did you mean {', '.join(near)}?" if near else ""))
    model: nn.Module = timm.create_model(name, **_sized(img_size), **options)
    return model.eval()


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


def _save(image: np.typing.ArrayLike, rec: AttentionRecorder, query: Query | None, out: Path, title: str) -> None:
    from ..figures.plot import overview

    # with no map to draw, the last one is tried all the same: its error says why
    drawn = [m for m in rec.maps.values() if _has_a_grid(m)] or rec.maps[-1:]
    left_out = [m.name for m in rec.maps.values() if m not in drawn]
    if left_out:
        console.print(f"left out of the picture, no grid of patches over the whole image: {', '.join(left_out)}", markup=False)
    if query is None:
        query = "cls" if all(m.tokens.prefix[:1] == ("cls",) for m in drawn) else "mean"
    asked = [m for m in drawn if _has(m, query)] or drawn
    if len(asked) < len(drawn):
        others = ", ".join(m.name for m in drawn if m not in asked)
        console.print(f"left out of the picture, query {query!r} is not among theirs: {others}", markup=False)
    drawn = asked
    out.parent.mkdir(parents=True, exist_ok=True)
    overview(image, drawn, query, title=title).savefig(out)
    console.print(f"\nwrote {out}")


def _has(m: AttentionMap, query: Query) -> bool:
    """Whether a query is among those of a map."""
    try:
        m.query_tokens.select(query)
    except TokenError:
        return False
    return True


def _has_a_grid(m: AttentionMap) -> bool:
    """Whether it is known where the keys of a map lie on the image."""
    try:
        return bool(m.tokens)
    except TokenError:
        return False


def _shapes(rec: AttentionRecorder) -> str:
    return ", ".join(dict.fromkeys(_by(m.shape) for m in rec.maps.values()))


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def _bytes(count: int) -> str:
    size, unit = float(count), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if size < 1024 or unit == "TiB":
            break
        size /= 1024
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"


def _below_site_packages(file: str) -> str:
    return file.rpartition("site-packages/")[2]


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


@contextmanager
def _answered() -> Iterator[None]:
    """Turn an error that was raised on purpose into a message and an exit status."""
    try:
        yield
    except HookattnError as error:  # any other is a fault of ours, and keeps its traceback
        Console(stderr=True, highlight=False, soft_wrap=True).print(f"hookattn: {error}", markup=False)
        raise typer.Exit(1) from None
