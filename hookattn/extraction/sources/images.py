"""The base of all sources: images in a fixed order, with names and labels."""

from __future__ import annotations

from collections.abc import Sequence

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
