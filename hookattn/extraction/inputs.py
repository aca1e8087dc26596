"""What a model is shown: photos as it was trained to see them, or what a data set of torch makes."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Union

import torch
from torch import Tensor, nn

from ..errors import HookattnError, TokenError, listed
from ..image.photo import Photo
from ..image.preprocessing import Crop, Preprocessing, preprocessing_of
from ..image.tokens import Size
from ..image.trunk import cut_of, trunk_of
from .sources.images import Images
from .sources.open_images import open_images


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


@dataclass(frozen=True)
class Photos:
    """Encoded photos, prepared for a model as `Photo.open` does it.

    Attributes:
        images: where they come from.
        preprocessing: how the model wants them.
        size, crop: as in `Photo.open`.
    """

    images: Images
    preprocessing: Preprocessing
    size: Size | int | None = None
    crop: Crop | None = "center"

    @property
    def names(self) -> Sequence[str]:
        """Of the images."""
        return self.images.names

    @property
    def revision(self) -> str | None:
        """Of the images."""
        return self.images.revision

    @property
    def varies(self) -> bool:
        """Whether images come in shapes of their own."""
        crop = self.crop or ("none" if self.preprocessing.any_size else "center")
        return crop == "none" and not isinstance(self.size, tuple)

    def label_of(self, index: int) -> str:
        """The label of one that cannot be read, too."""
        return self.images.labels[index]

    def load(self, index: int) -> Input:
        """Read and prepare one.

        Raises:
            HookattnError: it cannot be read, or the model takes none of its shape.
        """
        encoded = self.images.read(index)
        photo = Photo.open(encoded, self.preprocessing, size=self.size, crop=self.crop)
        return Input(photo.tensor, self.label_of(index), hashlib.sha256(encoded).hexdigest())

    def describe(self) -> dict[str, Any]:
        """How photos are shown, in plain values: two runs in which it is the same show them alike."""
        found = self.preprocessing._asdict()
        del found["model"]  # which class a model is of is told by its weights
        told = {name: list(v) if isinstance(v, tuple) else v for name, v in found.items()}
        return {**told, "size": list(self.size) if isinstance(self.size, tuple) else self.size, "crop": self.crop}


class DataSet:
    """Images that a data set of torch makes, by number.

    Args:
        dataset: one that has a length and gives, by number, an image (channels, height, width), a tuple that begins with one
            (its second part, a number or a word, is the label), or a dict with one under "pixel_values", "image" or "images".

    Raises:
        HookattnError: it has no length, or cannot be asked by number.
    """

    def __init__(self, dataset: Any) -> None:
        if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
            raise HookattnError(
                f"{type(dataset).__name__} cannot be asked for an image by number, so that a run could be resumed: give a data "
                "set with __getitem__ and __len__, or the folder, archive or table it reads."
            )
        self._dataset, self.revision = dataset, None
        self.names = _names_of(dataset)

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
            label = str(_plain(found[1])) if len(found) > 1 else ""
            found = found[0] if found else None
        elif isinstance(found, Mapping):
            label = str(_plain(found.get("label", found.get("labels", ""))))
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
        """What is known of how images are made: the kind of data set, and its transform in words."""
        transform = getattr(self._dataset, "transform", None)
        # but for where it lies in memory, which is another place in each run
        told = None if transform is None else re.sub(r" at 0x[0-9a-f]+", "", repr(transform))
        return {"dataset": type(self._dataset).__qualname__, "transform": told}


_EXAMPLE = 'preprocessing={"input_size": (3, 224, 224), "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "crop_pct": 1.0}'
Inputs = Union[Photos, DataSet]
Opened = Union[Images, DataSet]
Source = Union[str, "os.PathLike[str]", Sequence[Any], Images, Any]
"""Whatever `open_images` takes, `Images`, or a data set of torch."""


def open_source(source: Source, image_column: str | None = None, label_column: str | None = None) -> Opened:
    """The images of a source, before there is a model to show them to.

    Raises:
        HookattnError: there are none, they are in a list themselves, or columns are named of what has none.
    """
    if isinstance(source, (str, os.PathLike, list, tuple)):
        _check_paths(source)
        source = open_images(source, image=image_column, label=label_column)
    elif image_column is not None or label_column is not None:
        raise HookattnError(
            f"image_column and label_column are of tables that are opened here, and {type(source).__name__} gives images "
            "itself: leave them out."
        )
    found: Opened = source if isinstance(source, (Images, DataSet)) else DataSet(source)
    if not len(found.names):
        raise HookattnError("there are no images in it.")
    return found


def _check_paths(source: Any) -> None:
    for each in source if isinstance(source, (list, tuple)) else ():
        if not isinstance(each, (str, os.PathLike)):
            raise HookattnError(
                f"a list names files and addresses of images, and there is a {type(each).__name__} in this one. Images in "
                "memory are given as a data set of torch, such as torch.utils.data.TensorDataset(torch.stack(tensors))."
            )


def check_how_shown(opened: Opened, size: Size | int | None, crop: Crop | None, preprocessing: object) -> None:
    """Check that nothing is said about how images are shown which are made by somebody else.

    Raises:
        HookattnError: something is.
    """
    told = {"size": size is not None, "crop": crop not in ("center", None), "preprocessing": preprocessing is not None}
    if isinstance(opened, DataSet) and any(told.values()):
        raise HookattnError(
            f"{listed(name for name, is_told in told.items() if is_told)} would change nothing: a data set of torch makes "
            "images as the model is shown them. Leave it out, and let the transform of the data set do it."
        )
    if not (preprocessing is None or isinstance(preprocessing, (Mapping, Preprocessing))):
        raise HookattnError(
            f"{type(preprocessing).__name__} does not say how photos are made: {_EXAMPLE}; where it is a function that makes "
            "them, give a data set of torch with it as its transform."
        )


def find_inputs(
    source: Source,
    model: nn.Module,
    size: Size | int | None = None,
    crop: Crop | None = "center",
    preprocessing: Mapping[str, Any] | Preprocessing | None = None,
) -> Inputs:
    """The images of a source, as a model is shown them.

    Raises:
        HookattnError: there are none.
        TokenError: the model does not tell how it wants photos, and nobody else does.
    """
    opened = open_source(source)
    if isinstance(opened, DataSet):
        return opened
    return Photos(opened, _prepare_for(model, preprocessing, whole=crop == "none"), size, crop)


def _prepare_for(model: nn.Module, told: Mapping[str, Any] | Preprocessing | None, *, whole: bool) -> Preprocessing:
    if told is None:
        try:
            return preprocessing_of(model)
        except TokenError as error:
            raise TokenError(f"{type(model).__name__} does not say how it wants its images; say it: {_EXAMPLE}.") from error
    found, patch = preprocessing_of(told), cut_of(trunk_of(model)).patch_size
    # a config does not tell that whole photos are to be made of whole patches
    return found._replace(multiple=max(found.multiple, *patch)) if whole and patch is not None else found


def describe_source(
    source: Source, opened: Opened, image_column: str | None, label_column: str | None
) -> dict[str, Any] | None:
    """Where photos can be found again; None for what is no path, address or name, or a list of these."""
    paths: list[Any] = list(source) if isinstance(source, (list, tuple)) else [source]
    if not all(isinstance(path, (str, os.PathLike)) for path in paths):
        return None
    found = [os.path.abspath(path) if os.path.exists(path) else os.fspath(path) for path in paths]
    address = opened.address if isinstance(opened, Images) else None
    return {"paths": [address] if address else found, "image": image_column, "label": label_column}


def _names_of(dataset: Any) -> list[str]:
    """Paths, where it is known of each image which file it is of; else numbers."""
    samples = getattr(dataset, "samples", None)  # as torchvision's folders have it
    root = getattr(dataset, "root", None)
    if isinstance(samples, list) and len(samples) == len(dataset) and all(isinstance(each, tuple) for each in samples[:1]):
        paths = [Path(each[0]) for each in samples]
        names = [str(path.relative_to(root)) if root and path.is_relative_to(root) else str(path) for path in paths]
        if len({*names}) == len(names):
            return names
    return [f"{index:08d}" for index in range(len(dataset))]


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
