"""Where images come from: folders, lists, archives, tables, data sets by name."""

from __future__ import annotations

from collections.abc import Sequence


class Images:
    """Images in a fixed order, that can be had by number: what is extracted from.

    Made once, looked at by several processes: it can be pickled, and opens no file before an image is read.

    Attributes:
        names: of the images, each there once.
        labels: of the images, "" where there is none.
    """

    names: Sequence[str]
    labels: Sequence[str]

    def __len__(self) -> int:
        return len(self.names)

    def read(self, index: int) -> bytes:
        """The encoded image, as it is in its file.

        Raises:
            HookattnError: it cannot be read.
        """
        raise NotImplementedError


def open_images(source: object, *, image: str | None = None, label: str | None = None) -> Images:
    """Placeholder."""
    raise NotImplementedError
