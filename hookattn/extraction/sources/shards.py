"""Images in tar archives, as WebDataset has them: members of one name are one sample, and nothing is unpacked."""

from __future__ import annotations

import tarfile
from array import array
from collections.abc import Iterator, Sequence
from typing import BinaryIO, NamedTuple

from ...errors import HookattnError, did_you_mean
from .folders import photo_suffixes
from .images import Images, check_names, readable
from .places import answering, join, name_file, open_file, read_bytes


class Member(NamedTuple):
    """A file in an archive: its name up to the first dot, what follows it, and where its bytes lie."""

    key: str
    ending: str
    start: int
    size: int


class Shards(Images):
    """Images in tar archives. Where they lie is known from the headers, so that each is read alone.

    Args:
        folder: that archives are seen from.
        shards: the archives.
        image: the ending of images, where samples have several: "left.jpg"; None for all that PIL opens.
        label: the ending of what holds the label as text.

    Raises:
        HookattnError: an archive is cut off or none at all, there are no images, or none of the labels asked for.
    """

    def __init__(self, folder: str, shards: Sequence[str], image: str | None, label: str | None) -> None:
        self.names, self.labels = [], []
        self._folder, self._shards = folder, list(shards)
        self._places = array("q")  # shard, start and size of each image: a fifth of what numbers of Python would take
        endings = [None if each is None else each.lower().removeprefix(".") for each in (image, label)]
        for n, shard in enumerate(shards):
            for (key, _, start, size), text in _index(join(folder, shard), *endings):
                self.names.append(readable(f"{name_file(shard, folder)}/{key}"))
                self.labels.append(text)
                self._places.extend((n, start, size))
        if not self.names or (label is not None and not any(self.labels)):
            raise HookattnError(_tell_endings(join(folder, shards[0]), image if self.names == [] else label))
        check_names(self.names, "of samples with several images, image='left.jpg' takes those that end so")

    def read(self, index: int) -> bytes:
        first = 3 * range(len(self))[index]
        shard, start, size = self._places[first : first + 3]
        return read_bytes(join(self._folder, self._shards[shard]), start, size)


def _index(address: str, image: str | None, label: str | None) -> list[tuple[Member, str]]:
    """The images of an archive in the order of its members, with their labels."""
    images: list[Member] = []
    labels: dict[str, str] = {}
    with answering(address), open_file(address) as file:
        for member in _members(address, file):
            if _is_image(member.ending, image):
                images.append(member)
            elif member.ending == (label or "cls"):
                file.seek(member.start)
                labels[member.key] = file.read(member.size).decode("utf-8", "backslashreplace").strip()
    files = [readable(f"{member.key}.{member.ending}") for member in images]
    check_names(files, f"make {address!r} anew with each file in it once")  # what is added to one leaves what was there
    return [(member, labels.get(member.key, "")) for member in images]


def _is_image(ending: str, wanted: str | None) -> bool:
    return ending == wanted if wanted else f".{ending.rpartition('.')[2]}" in photo_suffixes()


def _members(address: str, file: BinaryIO) -> Iterator[Member]:
    """The files in an archive, from their headers, hidden ones left out."""
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while (found := tar.next()) is not None:
                vars(tar)["members"].clear()  # which would hold a kilobyte for each
                if not found.isdir() and (member := _describe(address, found)).key.rpartition("/")[2]:
                    yield member
            _check_end(file, tar.offset)
    except tarfile.ReadError as error:
        raise HookattnError(
            f"{address!r} is no whole tar archive ({error}): it is cut off or compressed. Fetch or make it anew, uncompressed."
        ) from error


def _describe(address: str, found: tarfile.TarInfo) -> Member:
    if not found.isreg() or found.issparse():
        raise HookattnError(
            f"{found.name!r} in {address!r} is a link: make the archive by tar --dereference --hard-dereference."
        )
    folder, slash, base = found.name.removeprefix("./").rpartition("/")
    key, _, ending = base.partition(".")
    return Member(f"{folder}{slash}{key}", ending.lower(), found.offset_data, found.size)


def _check_end(file: BinaryIO, offset: int) -> None:
    """Check that an archive has an end: tarfile takes one that is cut between members, or broken there, for a short one."""
    file.seek(offset)
    if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError(f"there is no end after {offset} bytes")
    while block := file.read(2**20):
        if any(block):
            raise tarfile.ReadError(f"there is more after its end at {offset} bytes, as where archives were strung together")


def _tell_endings(address: str, wanted: str | None) -> str:
    with answering(address), open_file(address) as file:
        endings = sorted({member.ending for member in _members(address, file)})
    found = did_you_mean(wanted, endings) if wanted else f"Its members end in {', '.join(endings) or 'nothing'}."
    return f"nothing in {address!r} ends as {wanted!r}. {found}" if wanted else f"{address!r} has no images in it. {found}"
