"""Base of the recorder: its maps into a file."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..maps.store import Rows, What
from ..maps.tensor_file import PathLike
from .maps import Maps


class Saving:
    """Base of what has the maps of a forward."""

    @property
    def maps(self) -> Maps:
        """The maps of the last forward."""
        raise NotImplementedError

    def save(
        self,
        path: PathLike,
        *,
        layers: str | int | Sequence[str | int] | None = None,
        rows: Rows = None,
        what: What = "maps",
        dtype: torch.dtype | None = None,
    ) -> None:
        """Write the maps of the last forward into a safetensors file, from which `hookattn.load` takes them without the model.

            rec.save("maps.safetensors", layers="blocks.*.attn", dtype=torch.float16)

        See `rec.maps.save`.
        """
        self.maps.save(path, layers=layers, rows=rows, what=what, dtype=dtype)
