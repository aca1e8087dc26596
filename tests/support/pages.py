"""What is in a page, read as the page reads it, but here."""

from __future__ import annotations

import base64
import json
import re
import zlib
from typing import Any

import numpy as np
import torch
from torch import Tensor


def facts_of(html: str) -> dict[str, Any]:
    """What the page knows beside rows."""
    facts: dict[str, Any] = json.loads(re.findall(r'id="facts-of-the-page">(.*?)</script>', html, re.DOTALL)[0])
    return facts


def unpacked(html: str) -> list[tuple[dict[str, Any], Tensor]]:
    """Facts of each layer and its rows, (windows, heads, queries + 1, keys), read as the page reads them, but here."""
    facts = facts_of(html)
    found = []
    for layer in (layer for photo in facts["photos"] for layer in photo["layers"]):
        text = re.findall(rf'id="{layer["block"]}">(.*?)</script>', html, re.DOTALL)[0]
        raw = zlib.decompress(base64.b64decode(text))
        sizes = [_count(layer[axis], facts["places"]) for axis in ("queries", "keys")]
        shape = (layer["keys"]["windows"], layer["heads"], sizes[0] + 1, sizes[1])
        count = shape[0] * shape[1] * shape[2]
        tops = np.frombuffer(raw[: 4 * count], "<f4").reshape(*shape[:3], 1).astype(np.float64)
        steps = np.frombuffer(raw[4 * count :], np.uint8).reshape(shape).astype(np.float64)
        share = np.sign(steps - 128) * ((steps - 128) / 127) ** 2 if layer["signed"] else (steps / 255) ** 2
        found.append((layer, torch.tensor(tops * share)))
    return found


def _count(tokens: dict[str, Any], places: list[list[int]]) -> int:
    rows, columns = tokens["grid"]
    placed = rows * columns if tokens["places"] is None else len(places[tokens["places"]]) // tokens["windows"]
    return len(tokens["prefix"]) + placed // tokens["spread"]
