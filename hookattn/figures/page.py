"""A page to explore attention on: one HTML file that needs no network, also as a frame in a notebook."""

from __future__ import annotations

import base64
import hashlib
import html
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Union

import numpy as np
import numpy.typing as npt

from ..errors import TokenError
from ..image.photo import Photo
from ..image.tokens import Query, Tokens
from .page_data import Layer, choose_layers, combined, layer_of, pack
from .panels import Maps, maps_in

FOLDER = Path(__file__).parent / "page"
SCRIPTS = ("store.js", "colours.js", "draw.js", "page.js")
_ASSETS = ("index.html", "style.css", *SCRIPTS)
_LONGEST = 1024  # pixels of the longer side of a photo on the page
Image = Union[Photo, npt.ArrayLike, None]
"""What maps are of: a photo, the model's input as (height, width, 3) RGB, uint8 or floats in 0 to 1, or nothing."""


@dataclass(frozen=True, eq=False)
class Shown:
    """What the page shows of one image.

    Attributes:
        maps: a recorder, its `rec.maps`, some of them, or one.
        image: what they are of, see `Image`.
        index: which image of the batch.
        name: what the page calls it.
    """

    maps: Maps
    image: Image = None
    index: int = 0
    name: str = ""


@dataclass(frozen=True, eq=False)
class Page:
    """A page; a notebook shows it in a frame that can reach nothing outside of itself.

    Attributes:
        html: all of it.
        height: of the frame, in pixels.
    """

    html: str
    height: int = 860

    def save(self, out: str | Path) -> Path:
        """Write it to a file, whose path is returned."""
        path = Path(out)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.html, encoding="utf-8")
        return path

    def _repr_html_(self) -> str:
        return (
            f'<iframe sandbox="allow-scripts allow-downloads" srcdoc="{html.escape(self.html)}" '
            f'style="width: 100%; height: {self.height}px; border: 0" title="attention"></iframe>'
        )

    def __repr__(self) -> str:
        return f"Page({len(self.html):,} bytes)"


def write_page(maps: Maps, image: Image | list[Any], out: str | Path, *, index: int = 0, **options: Any) -> Path:
    """Write a page to explore maps on, as one file that opens from disk; `rec.explore(image, "page.html")` is the same.

    Args:
        maps: a recorder, its `rec.maps`, some of them, or one.
        image: what they are of: a `Photo`, the model's input (height, width, 3), None, or a list of these, one for each image
            of the batch.
        out: where the page goes.
        index: which image of the batch, where `image` is one.
        options: `query`, `budget` and `title` of `make_page`; `name`, what the page calls the image, or a list of these.

    Raises:
        TokenError: there is no such image or query, or no map lies on it.
        ValueError: there are no maps, or the budget holds none.
    """
    return _page_of(maps, image, index, **options).save(out)


def show_page(
    maps: Maps, image: Image | list[Any], *, index: int = 0, height: int = 860, budget: int = 8_000_000, **options: Any
) -> Page:
    """The same page for a notebook, which shows it in a frame; `rec.show(image)` is the same.

    Args:
        height: of the frame, in pixels.
        budget: how many bytes it may have, which the notebook's file grows by.
        maps, image, index, options: as in `write_page`.
    """
    return Page(_page_of(maps, image, index, budget=budget, **options).html, height)


def make_page(shown: Sequence[Shown], *, query: Query | None = None, budget: int = 20_000_000, title: str = "") -> Page:
    """Make a page of one image or several.

    Args:
        shown: the images, and maps of each.
        query: whose attention it begins with, as in `AttentionMap.image`; a point is one of the photo. None for the class
            token, or the middle of the image where there is none.
        budget: how many bytes it may have. Above that, queries are pooled and layers left out, and the page says which.
        title: its first line.

    Raises:
        TokenError, ValueError: as `write_page`.
    """
    pictures = [_picture_of(each.image) for each in shown]
    fixed = sum(len(str(picture["src"])) for picture in pictures) + sum(len(_asset(name)) for name in _ASSETS) + 50_000
    title = title or ", ".join(filter(None, (each.name for each in shown))) or "Attention"
    # first as if attention could be compressed by a fifth, as it mostly can, then as if it could not
    for room in ((budget - fixed) * 15 // 16, (budget - fixed) * 3 // 4):
        facts: dict[str, Any] = {"photos": [], "places": [], "budget": budget}
        blocks: list[str] = []
        for each, picture in zip(shown, pictures):
            known = _photo_of(each, room // len(shown), facts["places"], blocks)
            facts["photos"].append({**picture, "name": each.name, **known})
        facts["start"] = _start_of(query, shown[0], facts["photos"][0])
        page = Page(_fill(title, facts, blocks))
        if (size := len(page.html.encode())) <= budget:
            return page
    raise ValueError(f"the page takes {size:,} bytes even so, most of it for what is no map: give a budget= of as many.")


def _page_of(maps: Maps, image: Image | list[Any], index: int, *, name: str | Sequence[str] = "", **options: Any) -> Page:
    images = image if isinstance(image, list) and not _is_array(image) else [image]
    names = [name] * len(images) if isinstance(name, str) else list(name)
    return make_page([Shown(maps, one, index + i, called) for i, (one, called) in enumerate(zip(images, names))], **options)


def _is_array(image: list[Any]) -> bool:
    """Whether a list is an image in numbers, and not a list of images."""
    return bool(image) and isinstance(image[0], list)


def _photo_of(shown: Shown, room: int, table: list[list[int]], blocks: list[str]) -> dict[str, Any]:
    """What the page knows of one image; places of tokens go into the table, rows into the blocks."""
    layers, notes = [], []
    maps = maps_in(shown.maps)
    for m in maps:
        try:
            layers.append(layer_of(m, shown.index))
        except TokenError as error:
            notes.append(f"{m.name} is not on the page: {error}")
    if not layers:
        raise TokenError(" ".join(notes))
    extra, why_not = combined(maps, shown.index)
    notes += [why_not] * bool(why_not)
    kept, pool = choose_layers(layers, room - sum(layer.size(1) for layer in extra))
    if len(kept) < len(layers):
        left_out = [layer.name for i, layer in enumerate(layers) if i not in kept]
        notes.append(f"Left out, since the page would be too large: {', '.join(left_out)}.")
    if pool > 1 and any(layer.pooled(pool) is not layer.queries for layer in layers):
        notes.append(f"Queries are pooled, since the page would be too large: a row is the mean of {pool} x {pool} patches.")
    described = [_describe(layer, table, blocks, pool) for layer in [layers[i] for i in kept] + extra]
    return {"layers": described, "notes": notes, "pool": pool}


def _describe(layer: Layer, table: list[list[int]], blocks: list[str], pool: int) -> dict[str, Any]:
    packed = pack(layer, pool)
    block = f"block-{len(blocks)}"
    blocks.append(f'<script type="text/plain" id="{block}">{packed.block}</script>')
    return {
        "name": layer.name,
        "kind": layer.kind,
        "heads": layer.heads,
        "queries": _tokens(layer.pooled(pool), table),
        "keys": _tokens(layer.keys, table),
        "hasMean": bool((layer.queries.patches >= 0).any()),
        "perUnit": layer.kind != "relevance",
        "block": block,
        "error": packed.error,
        "signed": packed.signed,
        **layer.facts,
    }


def _tokens(tokens: Tokens, table: list[list[int]]) -> dict[str, Any]:
    places = None
    if tokens.places is not None:
        numbers = tokens.places.flatten().tolist()
        if numbers not in table:
            table.append(numbers)
        places = table.index(numbers)
    return {
        "prefix": list(tokens.prefix),
        "grid": list(tokens.grid_size),
        "extent": list(tokens.extent),
        "seen": list(tokens.seen),
        "spread": tokens.spread,
        "windows": tokens.windows,
        "places": places,
    }


def _picture_of(image: Image) -> dict[str, Any]:
    """The image in the page, and how its coordinates are those of the model's input."""
    if isinstance(image, Photo):
        top, left = image.to_photo((0.0, 0.0))
        bottom, right = image.to_photo((1.0, 1.0))
        where = {"origin": [top, left], "side": [bottom - top, right - left], "seen": list(image.seen)}
        return {"src": _encode(image.pixels.numpy()), "size": list(image.size), "steps": list(image.steps), **where}
    where = {"origin": [0.0, 0.0], "side": [1.0, 1.0], "seen": [0.0, 0.0, 1.0, 1.0], "steps": []}
    if image is None:
        return {"src": None, "size": None, **where}
    pixels = np.asarray(image)
    if pixels.ndim != 3 or pixels.shape[-1] != 3:
        raise ValueError(f"an image is (height, width, 3), not {pixels.shape}: give a Photo, or the model's input as RGB.")
    if pixels.dtype != np.uint8:
        pixels = (pixels.clip(0, 1) * 255).round().astype(np.uint8)
    return {"src": _encode(pixels), "size": list(pixels.shape[:2]), **where}


def _encode(pixels: npt.NDArray[np.uint8]) -> str:
    from PIL import Image as Pillow

    picture = Pillow.fromarray(pixels)
    picture.thumbnail((_LONGEST, _LONGEST))
    held = io.BytesIO()
    picture.save(held, "JPEG", quality=88)
    return f"data:image/jpeg;base64,{base64.b64encode(held.getvalue()).decode()}"


def _start_of(query: Query | None, shown: Shown, photo: Mapping[str, Any]) -> dict[str, Any]:
    """The query that the page begins with: the name of a token, or a point of the photo."""
    tokens = [m.query_tokens for m in maps_in(shown.maps) if any(m.name == layer["name"] for layer in photo["layers"])]
    names = {name for each in tokens for name in each.prefix}
    if query is None:
        patches = any((each.patches >= 0).any() for each in tokens)
        return {"token": "cls"} if "cls" in names or not patches else {"point": [0.5, 0.5]}
    if isinstance(query, str) and (query == "mean" or query in names):
        return {"token": query}
    last = tokens[-1]
    number = last.index(shown.image.to_input(query) if _is_point_of_photo(query, shown) else query)  # type: ignore[union-attr, arg-type]
    if number < len(last.prefix):
        return {"token": last.prefix[number]}
    row, column = divmod(number - len(last.prefix), last.grid_size[1])
    at = ((i + 0.5) / n * reach for i, n, reach in zip((row, column), last.grid_size, last.extent))
    return {"point": [o + s * p for o, s, p in zip(photo["origin"], photo["side"], at)]}


def _is_point_of_photo(query: Query, shown: Shown) -> bool:
    return isinstance(shown.image, Photo) and isinstance(query, tuple) and any(isinstance(each, float) for each in query)


@cache
def _asset(name: str) -> str:
    return (FOLDER / name).read_text(encoding="utf-8")


def _fill(title: str, facts: Mapping[str, Any], blocks: Sequence[str]) -> str:
    """Put all of it into the one file."""
    style, script = _asset("style.css"), "\n".join(["(() => {", *map(_asset, SCRIPTS), "})();"])
    parts = {
        "csp": f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'",
        "title": html.escape(title),
        "style": style,
        "script": script,
        # what JSON leaves as it is would end the element, or begin a comment in it
        "facts": json.dumps(facts, allow_nan=False).replace("<", "\\u003c").replace(">", "\\u003e"),
        "blocks": "\n".join(blocks),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], _asset("index.html"))


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
