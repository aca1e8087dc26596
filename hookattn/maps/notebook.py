"""A map, and a list of maps, as a notebook shows them."""

from __future__ import annotations

import base64
import html
import struct
import zlib
from collections.abc import Iterable, Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor

from .lazy import LazyArray

# inferno at nine places, between which colours are mixed
_COLOURS = ("000004", "210c4a", "57106e", "8a226a", "bc3754", "e45a31", "f98e09", "f9cb35", "fcffa4")


def describe_in_html(m: Any) -> str:
    """A small picture of a map and its facts, for a notebook: the mean of heads, of the first image."""
    facts = {"layer": m.name, **_facts_of(m)}
    picture = ""
    try:
        query = "cls" if "cls" in m.query_tokens.prefix else "mean"
        picture = _draw(m.image(query)[0].detach().float().cpu())
        facts["picture"] = f"{'class token' if query == 'cls' else 'mean of all patches'}, mean of heads, first image"
    except Exception as error:  # a repr never raises
        facts["no picture"] = str(error)
    rows = "".join(f"<tr><th>{name}</th><td>{html.escape(text)}</td></tr>" for name, text in facts.items())
    return f'<div style="display: flex; gap: 1em; align-items: center">{picture}<table>{rows}</table></div>'


def list_in_html(maps: Iterable[LazyArray], skipped: Mapping[str, str]) -> str:
    """A table of maps for a notebook, of which nothing is computed."""
    columns = ("layer", "shape", "grid", "bytes of the whole map")
    lines = [(m.name, *map(_facts_of(m).get, columns[1:])) for m in maps]
    lines += [(name, reason) for name, reason in skipped.items()]
    head = "".join(f"<th>{column}</th>" for column in columns)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell or '')}</td>" for cell in line) + "</tr>" for line in lines)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _facts_of(m: Any) -> dict[str, str]:
    try:
        shape, dtype = m.shape, m.dtype
        facts = {"shape": " x ".join(map(str, shape)), "dtype": str(dtype).removeprefix("torch."), "device": str(m.device)}
        facts["bytes of the whole map"] = f"{prod(shape) * dtype.itemsize:,}"
    except Exception as error:  # a repr never raises
        return {"cannot be read": str(error)}
    try:
        rows, columns = m.tokens.grid_size
        windows = f", in {m.tokens.windows} windows" if m.tokens.windows > 1 else ""
        facts["grid"] = f"{rows} x {columns}{windows}"
    except Exception:  # tokens that are no patches have none
        facts["grid"] = "not known"
    return facts


def _draw(picture: Tensor) -> str:
    """(rows, columns) as an image of HTML, whose highest patch is the brightest."""
    table = torch.tensor([list(bytes.fromhex(colour)) for colour in _COLOURS], dtype=torch.float32, device="cpu")
    at = (picture / picture.amax().clamp(min=1e-30)).nan_to_num().clamp(0, 1) * (len(table) - 1)
    below = at.floor().long().clamp(max=len(table) - 2)
    pixels = torch.lerp(table[below], table[below + 1], (at - below)[..., None]).round().to(torch.uint8)
    source = f"data:image/png;base64,{base64.b64encode(_png(pixels)).decode()}"
    rows, columns = picture.shape
    size = f"width: {160 * columns // max(rows, columns)}px; image-rendering: pixelated"
    return f'<img alt="attention on {rows} x {columns} patches" src="{source}" style="{size}">'


def _png(pixels: Tensor) -> bytes:
    """(rows, columns, 3) uint8 as a file, since no package that draws need be there."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    rows, columns, _ = pixels.shape
    lines = b"".join(b"\0" + line.numpy().tobytes() for line in pixels)
    header = struct.pack(">IIBBBBB", columns, rows, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
