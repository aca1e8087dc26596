"""Images that a data set of torch makes: by number, named after their files where these are known."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Subset

from ..errors import HookattnError, listed
from .layout import Array
from .sources.images import write_label


class Input(NamedTuple):
    """One image as a model is shown it.

    Attributes:
        tensor: (channels, height, width).
        label: "" where there is none.
        sha256: of the bytes it was made of.
    """

    tensor: Tensor
    label: str
    sha256: str


class DataSet:
    """Images that a data set of torch makes, by number.

    Args:
        dataset: one that has a length and gives, by number, an image (channels, height, width), a tuple that begins with one
            (its second part, a number, a word, or a vector of these, which is stored as JSON, is the label), or a dict with
            one under "pixel_values", "image" or "images". Parts of data sets, and several as one (`Subset`, `ConcatDataset`),
            are seen through for names.

    Raises:
        HookattnError: it has no length, or cannot be asked by number.
    """

    def __init__(self, dataset: Any) -> None:
        if not hasattr(dataset, "__getitem__") or not _has_length(dataset):
            raise HookattnError(
                f"{type(dataset).__name__} cannot be asked for an image by number, so that a run could be resumed: give a data "
                "set with __getitem__ and __len__, or the folder, archive or table it reads."
            )
        self._dataset, self.revision = dataset, None
        self._parts, places = _see_through(dataset)
        self.names = _name_images(self._parts, places)

    def label_of(self, index: int) -> str:
        """None: it comes with the image."""
        return ""

    def load(self, index: int) -> Input:
        """Ask for one.

        Raises:
            HookattnError: what it gives is no image; whatever the data set raises comes as it is.
        """
        found = self._dataset[index]
        label, keys = "", ""
        if isinstance(found, (tuple, list)):
            label = write_label(found[1]) if len(found) > 1 else ""
            found = found[0] if found else None
        elif isinstance(found, Mapping):
            label = write_label(found.get("label", found.get("labels")))
            keys = f" of a dict with {listed(map(str, found))}"
            found = next((found[key] for key in ("pixel_values", "image", "images") if key in found), None)
        if not isinstance(found, Tensor) or found.dim() != 3 or not found.is_floating_point():
            what = f"a tensor {tuple(found.shape)} of {found.dtype}" if isinstance(found, Tensor) else type(found).__name__
            what += keys
            raise HookattnError(
                f"an image of {type(self._dataset).__name__} is {what}: a data set gives (channels, height, width) in "
                'floating point, as the model is called with, alone, first in a tuple, or as "pixel_values" in a dict. Its '
                "transform makes it so; what a DataLoader would make of several is not asked."
            )
        found = found.detach().cpu().contiguous()
        return Input(found, label, hashlib.sha256(found.view(torch.uint8).numpy().data).hexdigest())

    def describe(self) -> dict[str, Any]:
        """What is known of how images are made: the kinds of data sets, and their transforms in words."""
        # what is PyTorch's own makes nothing of an image; what somebody derives from it may
        makers = [each for each in _walk(self._dataset) if type(each) not in (Subset, ConcatDataset)]
        transforms = [getattr(each, "transform", None) for each in makers]
        # but for where it lies in memory, which is another place in each run
        told = [re.sub(r" at 0x[0-9a-f]+", "", repr(transform)) for transform in transforms]
        told = told[:1] if len({*told}) == 1 else told  # of several which is whose, by their order
        is_known = any(transform is not None for transform in transforms)
        kinds = dict.fromkeys(type(each).__qualname__ for each in makers)
        return {"dataset": ", ".join(kinds), "transform": "; ".join(told) if is_known else None}


def _has_length(dataset: Any) -> bool:
    try:
        return len(dataset) >= 0
    except TypeError:  # it has none, or says so when it is asked
        return False


def _walk(dataset: Any) -> Iterator[Any]:
    """A data set, and those that it is put together of."""
    yield dataset
    if isinstance(dataset, (Subset, ConcatDataset)):
        for each in [dataset.dataset] if isinstance(dataset, Subset) else dataset.datasets:
            yield from _walk(each)


def _see_through(dataset: Any) -> tuple[list[Any], Array]:
    """The data sets that one is put together of, and of each image which of these it is from, and its number there."""
    if isinstance(dataset, (Subset, ConcatDataset)):
        with suppress(TypeError, ValueError, IndexError):  # of what has no length, and of indices that are no numbers of images
            parts, places = _take_apart(dataset)
            if len(places) == len(dataset):  # which a class of somebody's may tell otherwise
                return parts, places
    return [dataset], np.stack([np.zeros(len(dataset), int), np.arange(len(dataset))], 1)


def _take_apart(dataset: Subset[Any] | ConcatDataset[Any]) -> tuple[list[Any], Array]:
    if isinstance(dataset, Subset):
        parts, places = _see_through(dataset.dataset)
        return parts, places[np.asarray(dataset.indices, int)]
    found = [_see_through(each) for each in dataset.datasets]
    before = accumulate((len(parts) for parts, _ in found), initial=0)
    return [part for parts, _ in found for part in parts], np.concatenate([p + (n, 0) for n, (_, p) in zip(before, found)])


def _name_images(parts: Sequence[Any], places: Array) -> list[str]:
    """Paths, where it is known of each image which file it is of; else numbers, those of a whole where it is a part."""
    files = [_list_files(part) for part in parts]
    if all(files):
        chosen = [files[part][number] for part, number in places.tolist()]
        names = _seen_from([getattr(part, "root", None) for part in parts], chosen)
    else:
        begins = np.array([*accumulate(map(len, parts), initial=0)])
        names = [f"{number:08d}" for number in (begins[places[:, 0]] + places[:, 1]).tolist()]
    return names if len({*names}) == len(names) else [f"{number:08d}" for number in range(len(places))]


def _list_files(dataset: Any) -> list[str]:
    """The files of all images, as torchvision's folders tell them; none where that is not known."""
    samples = getattr(dataset, "samples", None)
    if not isinstance(samples, list) or len(samples) != len(dataset):
        return []
    files = [each[0] for each in samples if isinstance(each, tuple) and each]
    return [os.fsdecode(file) for file in files] if all(isinstance(file, (str, os.PathLike)) for file in files) else []


def _seen_from(roots: Sequence[Any], files: Sequence[str]) -> list[str]:
    """Names of files in the folder around these; as they are where a folder is not known."""
    if not all(isinstance(root, (str, os.PathLike)) and root for root in roots):
        return list(files)
    around = os.path.join(os.path.commonpath([os.path.abspath(root) for root in roots]), "")
    return [os.path.abspath(file).removeprefix(around) for file in files]
