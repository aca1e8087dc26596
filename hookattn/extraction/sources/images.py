"""The base of all sources: images in a fixed order, with names and labels."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from ...errors import HookattnError


class Images:
    """Images in a fixed order, that can be had by number: what is extracted from.

    Made once, looked at by several processes: it can be pickled, and opens no file before an image is read.

    Attributes:
        names: of the images, each there once.
        labels: of the images, "" where there is none.
        revision: the commit they are of, where they come from a repository; None where none is known.
        address: what is typed for these very images, also from elsewhere and later; None for what was typed.
    """

    names: Sequence[str]
    labels: Sequence[str]
    revision: str | None = None
    address: str | None = None

    def __len__(self) -> int:
        return len(self.names)

    def read(self, index: int) -> bytes:
        """The encoded image, as it is in its file.

        Raises:
            HookattnError: it cannot be read.
        """
        raise NotImplementedError


def readable(name: str) -> str:
    """A name that can be written in any encoding of Unicode: bytes that are no text in it become `\\xff`."""
    return name if name.isascii() else name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def write_label(value: Any) -> str:
    """A label as text: a word or a number as it is, of several, such as a vector, JSON; "" where it is none of these.

    So `numpy.array([json.loads(label) for label in run.labels])` has the vectors of all images.
    """
    value = _plain(value)
    if isinstance(value, (list, tuple, dict)):
        try:
            return readable(json.dumps(value, default=_plain, ensure_ascii=False))
        except (TypeError, ValueError):  # something in it is no label, such as a mask, or it contains itself
            return ""
    told = "" if value is None or hasattr(value, "tolist") else str(value)
    return "" if " at 0x" in told else readable(told)  # of an object nothing is known but where it lies in memory


def _plain(value: Any) -> Any:
    """A vector as a list, a scalar of PyTorch or NumPy as a number, bytes as text; else what it is."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "backslashreplace")
    has_values = isinstance(value, (Tensor, np.ndarray, np.generic))
    return value.squeeze().tolist() if has_values and value.squeeze().ndim <= 1 else value


def check_names(names: Sequence[str], advice: str) -> None:
    """Check that each name is there once, since a store finds an image by its name.

    Raises:
        HookattnError: one is there twice.
    """
    if len(set(names)) < len(names):
        seen: set[str] = set()
        twice = next(name for name in names if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        more = len(names) - len(set(names)) - 1
        raise HookattnError(f"the name {twice!r} is there twice{f', and {more:,} more are' if more else ''}: {advice}.")
