"""Base of the recorder: its maps into a file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import torch

from ..errors import RecorderError
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

    def __reduce__(self) -> NoReturn:
        """Always raises: hooks on a model cannot be copied or pickled."""
        raise RecorderError(
            "a recorder is of the hooks on its model, and is not copied or pickled: rec.maps are, so keep these, and make "
            "another recorder for a copy of the model. Where a module holds one, open it where the module is called instead."
        )
