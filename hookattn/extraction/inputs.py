"""What a model is shown: photos as it was trained to see them, or what a data set of torch makes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, Union

from torch import Tensor, nn
from torch.utils.data import Dataset

from ..errors import HookattnError, TokenError, listed
from ..image.photo import Photo
from ..image.preprocessing import Crop, Preprocessing, preprocessing_of
from ..image.tokens import Size
from ..image.trunk import cut_of, trunk_of
from .data_sets import DataSet, Input
from .sources.images import Images
from .sources.open_images import open_images


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


_EXAMPLE = 'preprocessing={"input_size": (3, 224, 224), "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "crop_pct": 1.0}'
Inputs = Union[Photos, DataSet]
Opened = Union[Images, DataSet]
Source = Union[str, "os.PathLike[str]", Sequence[Any], Images, Any]
"""Whatever `open_images` takes, anything that gives paths one after the other, `Images`, or a data set of torch."""


def list_paths(source: Source) -> Source:
    """A list of whatever gives paths one after the other: an array, a column, a generator, a set, sorted; else what it is.

    Raises:
        HookattnError: it is a table or a dict, an array of several axes, or there is something else among its paths.
    """
    if isinstance(source, (str, os.PathLike, Images, DataSet, Dataset, Tensor)):
        return source
    _check_no_table(source)
    source = source.to_pylist() if hasattr(source, "to_pylist") else source  # a column of Arrow, whose values are its own
    if not isinstance(source, Iterable):
        return source
    try:
        found: Iterator[Any] = iter(source)
        first = [*islice(found, 1)]
    except Exception:
        if hasattr(source, "__getitem__"):  # a data set, whose first image may be broken
            return source
        raise
    is_list = isinstance(source, (list, tuple)) or getattr(source, "ndim", None) == 1
    if not is_list and not all(isinstance(each, (str, os.PathLike, bytes)) for each in first):
        return source
    paths = [_check_path(place, each) for place, each in enumerate(chain(first, found))]
    return sorted(paths) if isinstance(source, (set, frozenset)) else paths


def _check_no_table(source: Any) -> None:
    """Check that there are not several columns, or axes, to take paths of."""
    names = list(getattr(source, "column_names", None) or source.columns) if hasattr(source, "columns") else []
    is_dict = isinstance(source, Mapping) and all(isinstance(each, str) for each in islice(source, 1))
    names += [*islice(source, 1)] if is_dict else []
    if names:
        whole = "list(source) or list(source.values()), or one of these" if is_dict else "one of its columns"
        raise HookattnError(f"a {type(source).__name__} is no list of images: give {whole}, such as source[{names[0]!r}].")
    if getattr(source, "ndim", 0) > 1:
        raise HookattnError(
            f"an array of shape {tuple(source.shape)} is no list of images: give one of paths with one axis, such as "
            "source.ravel(), and images in torch.utils.data.TensorDataset(torch.from_numpy(source))."
        )


def _check_path(place: int, path: Any) -> str:
    if isinstance(path, (str, os.PathLike)):
        return str(os.fsdecode(path))
    advice = (
        "Paths with labels are written into a .txt, a path a line, and a label after a tab, and its name is given"
        if isinstance(path, (tuple, list))
        else "Images in memory are given as a data set of torch, such as torch.utils.data.TensorDataset(torch.stack(tensors))"
    )
    raise HookattnError(
        f"a list names files and addresses of images, and there is a {type(path).__name__} in this one, number {place}. "
        f"{advice}."
    )


def open_source(source: Source, image_column: str | None = None, label_column: str | None = None) -> Opened:
    """The images of a source, before there is a model to show them to; of paths as `list_paths` has them.

    Raises:
        HookattnError: there are none, they are in a list themselves, or columns are named of what has none.
    """
    if isinstance(source, (str, os.PathLike, list)):
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


def explain(error: Exception) -> str:
    """Why an image cannot be read, in a line."""
    told = " ".join(str(error).split())
    return told if isinstance(error, HookattnError) else f"{type(error).__name__}: {told or 'no reason is told'}"


def describe_source(
    source: Source, opened: Opened, image_column: str | None, label_column: str | None
) -> dict[str, Any] | None:
    """Where photos can be found again; None for what is no path, address or name, or a list of these."""
    paths: list[Any] = source if isinstance(source, list) else [source]
    if not all(isinstance(path, (str, os.PathLike)) for path in paths):
        return None
    found = [os.path.abspath(path) if os.path.exists(path) else os.fspath(path) for path in paths]
    address = opened.address if isinstance(opened, Images) else None
    return {"paths": [address] if address else found, "image": image_column, "label": label_column}
