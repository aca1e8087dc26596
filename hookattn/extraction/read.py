"""A store that is read: images by name or number, and their maps as if they had just been recorded."""

from __future__ import annotations

import hashlib
import os
from functools import cached_property
from numbers import Integral
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..attention.sources import Dense
from ..errors import HookattnError, StoreError, did_you_mean, listed
from ..image.photo import Photo
from ..image.preprocessing import Preprocessing
from ..maps.attention_map import AttentionMap
from ..maps.lazy import Delivery
from ..maps.reading import Loaded
from ..maps.rows import SomeRows
from ..recording.maps import Maps
from .geometry import read_places
from .layout import BROKEN, PENDING, TAKEN, Array, Spec, decode
from .manifest import compare_names, hash_names
from .sources.images import Images
from .sources.open_images import open_images
from .store import Facts, Store


class Counts(NamedTuple):
    """Of the images of a run, how many are there, could not be read, and are not there yet."""

    taken: int
    broken: int
    pending: int


class Run:
    """What a run has written, or has written so far.

        run = hookattn.extraction.open("run.zarr")
        run.maps("dog.jpg")["blocks.11.attn"].image("cls")     # slices, pictures, pages, as of recorded maps
        run.read("entropy", 17)                                 # (layers, heads)

    For all images at once `xarray.open_zarr` is the way.

    Attributes:
        facts: what the run is: model, weights, preprocessing, versions, what was asked.
        names, labels: of the images.
        layers: names of the maps.
    """

    def __init__(self, store: Store, facts: Facts) -> None:
        self._store, self.facts = store, facts
        self.names: list[str] = [str(name) for name in store.read("image")]
        if "" in self.names:
            raise StoreError(f"{store.where} is damaged: names of images are gone: remove the store, and run the same again.")
        self.layers: list[str] = list(facts["layers"])
        what = facts["run"]["what"]
        self.specs = {name: Spec(name, tuple(w["dims"]), tuple(w["shape"]), w["dtype"]) for name, w in what.items()}

    @cached_property
    def labels(self) -> list[str]:
        """Of the images; "" where there is none, or it is not there yet."""
        return [str(label) for label in self._store.read("label")]

    def __len__(self) -> int:
        return len(self.names)

    def __repr__(self) -> str:
        what, counts = ", ".join(self.specs), self.count()
        return f"Run({self._store.where}: {what} of {counts.taken} of {len(self)} images, {counts.broken} broken)"

    def find(self, image: int | str | os.PathLike[str]) -> int:
        """The number of an image by its name, or by its number, negative from the end.

        Raises:
            HookattnError: there is none, it is not there yet, or it could not be read.
        """
        if isinstance(image, os.PathLike):
            image = os.fspath(image)
        if not isinstance(image, (str, Integral)):
            raise HookattnError(
                f"an image is told by its name or its number, not by a {type(image).__name__}; for several at once there is "
                f"xarray.open_zarr({self._store.where!r})."
            )
        if isinstance(image, str):
            if image not in self._numbers:
                raise HookattnError(f"{self._store.where} has no image {image!r}. {did_you_mean(image, self.names[:10_000])}")
            number = self._numbers[image]
        else:
            if not -len(self) <= image < len(self):
                raise HookattnError(f"there is no image {image}: {self._store.where} has {len(self)}.")
            number = int(image) % len(self)
        status = int(self._store.read("status", number))
        if status == PENDING:
            raise HookattnError(f"image {image} is not there yet; the same extract again goes on with the run.")
        if status == BROKEN:
            raise HookattnError(f"image {image} could not be read: {self._store.read('error', number)}")
        return number

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self.names)}

    def count(self) -> Counts:
        """How many images are there, could not be read, and are not there yet."""
        status = self._store.status()
        return Counts(*(int((status == kind).sum()) for kind in (TAKEN, BROKEN, PENDING)))

    def broken(self) -> dict[str, str]:
        """The images that could not be read, by name, with the reason."""
        errors = self._store.read("error")
        return {self.names[number]: str(errors[number]) for number in np.flatnonzero(self._store.read("status") == BROKEN)}

    def photo(self, image: int | str | os.PathLike[str], photo: Any = None) -> Photo:
        """The photo of an image as the model was shown it, read again from where the run read it.

        Args:
            image: name or number.
            photo: the photo itself, where it has moved: whatever `Photo.open` takes.

        Raises:
            HookattnError: it is not there any more, or has other bytes than it had, or images were no photos.
        """
        number, shown = self.find(image), dict(self.facts["run"]["preprocessing"])
        if "dataset" in shown:
            raise HookattnError(f"images of {self._store.where} came from a data set of torch ({shown['dataset']})")
        if photo is None:
            photo = self._images.read(number)
            if hashlib.sha256(photo).hexdigest() != self._store.read("sha256", number):
                raise HookattnError(f"{self.names[number]} is another file now than the run was shown")
        values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in shown.items()}
        size, crop = values.pop("size"), values.pop("crop")
        return Photo.open(photo, Preprocessing(**values), size=size, crop=crop)

    @cached_property
    def _images(self) -> Images:
        """Where the run read its images from."""
        source = self.facts["source"]
        if source is None:
            raise HookattnError("images came from no file")
        paths = list(dict.fromkeys(source["paths"]))  # in which one may be twice, as it was listed for earlier versions
        images = open_images(paths, image=source["image"], label=source["label"])
        if hash_names(images.names) != self.facts["run"]["images"]["names"]:
            told = compare_names(self.names, images.names)
            raise HookattnError(f"there are other images in {listed(source['paths'])} now: {told}")
        return images

    def read(self, quantity: str, image: int | str | os.PathLike[str]) -> Tensor:
        """What was taken of an image, (layers, ...) in float32; NaN where a layer or the image has less than others.

        Raises:
            HookattnError: there is no such quantity or image.
        """
        if quantity not in self.specs:
            raise HookattnError(f"{self._store.where} has no {quantity!r}. {did_you_mean(quantity, self.specs)}")
        return torch.from_numpy(self._read(self.specs[quantity], self.find(image)))

    def maps(self, image: int | str | os.PathLike[str]) -> Maps:
        """The maps of an image: whole where `maps` were stored, else with the row of the class token where `cls` was.

        Raises:
            HookattnError: there is no such image, or neither was stored.
        """
        number = self.find(image)
        kind = next((kind for kind in ("maps", "cls") if kind in self.specs), None)
        if kind is None:
            raise HookattnError(
                f"{self._store.where} has neither maps nor rows of maps, but {listed(self.specs)}, for run.read(NAME, image): "
                "extract maps or cls into another store."
            )
        values = torch.from_numpy(self._read(self.specs[kind], number))
        rows, cols = (int(self._store.read(name, number)) for name in ("grid_rows", "grid_cols"))
        grid, missing = (rows, cols) if self.facts["varies"] else None, self.facts["missing"].get(kind, {})
        found = {
            name: _make_map(name, kind, values[place], layer, grid)
            for place, (name, layer) in enumerate(self.facts["layers"].items())
            if name not in missing
        }
        maps = Maps(found, model=self.facts["run"]["model"]["name"])
        maps.skipped = dict(missing)
        return maps

    def _read(self, spec: Spec, number: int) -> Array:
        names = [spec.name, *([f"{spec.name}_max"] if spec.dtype == "uint8" else [])]
        return decode(spec, {name: self._store.read_image(name, number) for name in names})


def open_run(where: str | os.PathLike[str]) -> Run:
    """Open the store of a run, also of one that has not ended.

    Raises:
        StoreError: there is none, it is damaged, or it was written by a later hookattn.
        MissingExtraError: zarr is not installed.
    """
    store = Store(where)
    facts = store.find_facts(mode="r")
    if facts is None:
        raise StoreError(f"there is no store {store.where}; hookattn extract makes one.")
    return Run(store, facts)


def _make_map(name: str, kind: str, values: Tensor, layer: Facts, grid: tuple[int, int] | None) -> AttentionMap:
    places = read_places(layer, grid)
    heads, queries, keys = layer["shape"]
    if grid is not None and not isinstance(places.tokens, str):
        queries, keys = (len(each) for each in places.tokens)
    if kind == "maps":
        source: Dense = Dense(values[None, :heads, :queries, :keys])
    else:
        row = 0 if isinstance(places.tokens, str) else places.tokens[0].index("cls")
        source = SomeRows(values[None, :heads, None, :keys], name, (row,), queries)
    return AttentionMap(name, Loaded(name, source), places, Delivery())
