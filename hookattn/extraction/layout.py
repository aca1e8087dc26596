"""How a store is laid out: its arrays, blocks of images, and values as they are stored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..errors import StoreError

Array = npt.NDArray[Any]
PENDING, TAKEN, BROKEN = 0, 1, 2
"""What `status` says of an image: not there yet, taken, or not to be read."""
Pending = Mapping[int, Sequence[int]]
"""Numbers of the images that are to be taken, in their order, by number of their block."""


class Spec(NamedTuple):
    """An array of the store.

    Attributes:
        name: of the quantity.
        dims: names of its axes after "image".
        shape: of one image.
        dtype: "float32", "float16", or "uint8": shares of the largest value of each row, which is in the array `NAME_max`.
        units: of values; "" where they have none.
    """

    name: str
    dims: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str
    units: str = ""

    @property
    def bytes(self) -> int:
        """Of one image, before they are compressed."""
        return int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize


@dataclass
class Block:
    """What was taken of the images that are written together; of those with status `PENDING` nothing was.

    Attributes:
        number: of the block.
        start: number of its first image.
        values: by quantity, (images, *shape) in float32.
        status, label, sha256, error: of the images; see `Store`.
        grid: (images, 2), rows and columns of patches; 0 where they are not known.
    """

    number: int
    start: int
    values: dict[str, Array]
    status: Array
    label: Array
    sha256: Array
    error: Array
    grid: Array

    @classmethod
    def empty(cls, number: int, start: int, stop: int, specs: Sequence[Spec]) -> Block:
        """A block before its images are there."""
        count = stop - start
        values = {spec.name: np.full((count, *spec.shape), np.nan, np.float32) for spec in specs}
        label, sha256, error = (np.full(count, "", object) for _ in range(3))
        return cls(number, start, values, np.zeros(count, np.uint8), label, sha256, error, np.zeros((count, 2), np.int32))


@dataclass(frozen=True)
class Layout:
    """How a store is laid out.

    Attributes:
        images: how many there are.
        block: how many of them are written together: a shard of each array.
        specs: the arrays.
    """

    images: int
    block: int
    specs: Sequence[Spec]

    def range_of(self, number: int) -> tuple[int, int]:
        """The numbers of the images of a block, from the first to before the last."""
        return number * self.block, min((number + 1) * self.block, self.images)


def encode(spec: Spec, values: Array) -> dict[str, Array]:
    """Values as they are stored, by name of the array."""
    if spec.dtype != "uint8":
        stored = values.astype(spec.dtype)
        if np.isinf(stored).any() and not np.isinf(values).any():
            raise StoreError(f"{spec.name!r} has values that {spec.dtype} cannot hold: dtype='float32', in another store.")
        return {spec.name: stored}
    most = np.nan_to_num(values).max(-1, initial=0.0)
    shares = np.nan_to_num(values) / np.where(most > 0, most, 1.0)[..., None]
    return {
        spec.name: np.rint(shares * 255).astype(np.uint8),
        f"{spec.name}_max": np.where(np.isnan(values).all(-1), np.nan, most),
    }


def decode(spec: Spec, stored: Mapping[str, Array]) -> Array:
    """The values of what is stored, in float32."""
    if spec.dtype != "uint8":
        return stored[spec.name].astype(np.float32)
    return stored[spec.name].astype(np.float32) / 255 * stored[f"{spec.name}_max"][..., None]
