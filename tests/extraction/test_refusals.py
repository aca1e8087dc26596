"""What can be refused without a model is refused before one is loaded, and what would change nothing is not taken."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from support.drawn import Drawn, draw, small_vit
from support.inside import hold_store
from support.stores import everything, same
from torch import nn
from torch.utils.data import DataLoader, SubsetRandomSampler, TensorDataset

from hookattn import HookattnError, ModelError
from hookattn.errors import MissingExtraError

extraction = pytest.importorskip("hookattn.extraction", exc_type=ImportError)
pytest.importorskip("zarr")
TENSORS = TensorDataset(torch.zeros(6, 3, 64, 64))
TABLE = pd.DataFrame({"file": ["a.png", "b.png"], "label": [0, 1]})


def of_ones_own(name: str, *dims: str) -> Any:
    return extraction.Quantity(name, dims, lambda m: m[:, :, 0].amax(-1))


WRONG: dict[str, tuple[str, dict[str, Any]]] = {
    "what": ("nothing called 'entrophy'", {"what": "entrophy"}),
    "what is none": ("nothing is asked for", {"what": None}),
    "what is a number": ("nothing called 3 to take", {"what": [3]}),
    "a name of an array": ("no array 'label' for a quantity; give it another name", {"what": of_ones_own("label", "head")}),
    "a name of an axis": ("no array 'top' for a quantity", {"what": of_ones_own("top", "top")}),
    "a name of a folder": ("no array 'my/top' for a quantity", {"what": of_ones_own("my/top", "head")}),
    "a name of a scale": ("no array 'cls_max' for a quantity", {"what": ["cls", of_ones_own("cls_max", "head")]}),
    "an axis twice": ("'top' has the axes head, head: name each once", {"what": of_ones_own("top", "head", "head")}),
    "an axis there is": ("without image and layer, which are there", {"what": of_ones_own("top", "image")}),
    "dtype": ("dtype='int8' is not stored", {"dtype": "int8"}),
    "batch_size": ("batch_size and block are numbers", {"batch_size": 0}),
    "block": ("batch_size and block are numbers", {"block": 0}),
    "half a batch": ("batch_size and block are numbers", {"batch_size": 2.5}),
    "images in a list": (r"there is a Tensor in this one, number 0\. .*TensorDataset", {"source": [torch.zeros(3, 64, 64)]}),
    "labels in a list": (r"a tuple in this one, number 1\. Paths with labels .* \.txt", {"source": ["a.png", ("b.png", 1)]}),
    "what is missing in a column": (r"a float in this one, number 1\.", {"source": np.array(["a.png", np.nan], object)}),
    "a dict": (r"a dict is no list of images: give list\(source\) or .* such as source\['a\.png'\]", {"source": {"a.png": 1}}),
    "a table": (r"a DataFrame is no .*: give one of its columns, such as source\['file'\]\.", {"source": TABLE}),
    "a table of Arrow": (
        r"a Table is no list .*: give one of its columns, such as source\['f'\]\.",
        {"source": pa.table({"f": []})},
    ),
    "an array of rows of paths": (
        r"an array of shape \(1, 2\) .* source\.ravel\(\)",
        {"source": np.array([["a.png", "b.png"]])},
    ),
    "an array of images": (r"TensorDataset\(torch\.from_numpy\(source\)\)", {"source": np.zeros((2, 3, 64, 64))}),
    "an array of numbers": ("there is a int64 in this one, number 0", {"source": np.arange(3)}),
    "a path that is missing first": ("there is a NoneType in this one, number 0", {"source": pa.array([None, "a.png"])}),
    "a tensor of one image": (r"none of .* an image of Tensor is a tensor \(64, 64\)", {"source": torch.zeros(3, 64, 64)}),
    "images of whole numbers": (r"is a tensor \(3, 64, 64\) of torch\.uint8", {"source": TensorDataset(TENSORS[:][0].byte())}),
    "no images": ("an image of range is int: a data set gives", {"source": range(3)}),
    "no images, strictly": (r"^00000000 cannot be read \(an image of range is int", {"source": range(3), "strict": True}),
    "an empty dict": ("no source of images is given", {"source": {}}),
    "no paths at all": ("no source of images is given", {"source": iter(())}),
    "a stream of tensors": ("generator cannot be asked for an image by number", {"source": (each for each in TENSORS)}),
    "a stream of labels": ("iterator cannot be asked for an image by number", {"source": iter([("a.png", 0)])}),
    "an array without axes": ("ndarray cannot be asked for an image by number", {"source": np.array("a.png")}),
    "bytes in a list": ("there is a bytes in this one", {"source": [b"a.png"]}),
    "no source": (r"there is no '.*nowhere'", {"source": "nowhere"}),
    "an empty source": ("has no photos, .tar or .parquet files in it", {"source": "empty"}),
    "an empty data set": ("there are no images in it", {"source": TensorDataset(torch.zeros(0, 3, 64, 64))}),
    "out is a folder": ("photos is there, and is no store of Zarr v3", {"out": "photos"}),
    "out is a file": ("photos/a.png is there, and is no store|cannot be opened", {"out": "photos/a.png"}),
    "out is below a file": ("cannot be written", {"out": "photos/a.png/x.zarr"}),
    "out is a link that leads nowhere": (
        r"photos/x\.zarr is a link .*: gone .* Make that folder, or",
        {"out": "photos/x.zarr"},
    ),
    "out is below one": (r"photos/x\.zarr is a link that leads nowhere: gone", {"out": "photos/x.zarr/y.zarr"}),
    "out is held": ("another run of this process writes to held.zarr", {"out": "held.zarr"}),
    "out is nowhere": ("nope://x.zarr cannot be written", {"out": "nope://x.zarr"}),
    "columns of photos": ("columns of images and labels are those of tables", {"image_column": "image"}),
    "columns of a data set": ("image_column and label_column are of tables", {"source": TENSORS, "label_column": "label"}),
    "size of a data set": ("size would change nothing: a data set of torch", {"source": TENSORS, "size": 64}),
    "crop of a data set": ("size, crop would change nothing", {"source": TENSORS, "size": 64, "crop": "none"}),
    "preprocessing of one": ("preprocessing would change nothing", {"source": TENSORS, "preprocessing": {}}),
    "batches of a loader": ("batch_size is that of the DataLoader, 1: set", {"source": DataLoader(TENSORS), "batch_size": 2}),
    "workers of a loader": ("workers is that of the DataLoader, 0: set", {"source": DataLoader(TENSORS), "workers": 2}),
    "a part of a loader": (
        r"chooses 2 of 6 images.*Subset\(dataset, indices\)",
        {"source": DataLoader(TENSORS, sampler=SubsetRandomSampler([1, 3]))},
    ),
}


def load_none() -> nn.Module:
    raise AssertionError("a model is loaded")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two photos, and a folder without any."""
    for name in ("photos", "empty"):
        (tmp_path / name).mkdir()
    for name in ("a.png", "b.png"):
        (tmp_path / "photos" / name).write_bytes(draw(ord(name[0])))
    (tmp_path / "photos/x.zarr").symlink_to("gone")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("wrong", WRONG)
def test_what_can_be_refused_without_a_model_is_refused_before_one_is_loaded(folder: Path, wrong: str) -> None:
    message, options = WRONG[wrong]
    before = sorted(folder.rglob("*"))
    with hold_store("held.zarr"), pytest.raises(HookattnError, match=message):
        extraction.extract(load_none, **{"source": "photos", "out": "new/deep/x.zarr", **options})
    assert sorted(folder.rglob("*")) == before


def test_without_zarr_no_model_is_loaded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zarr", None)
    with pytest.raises(MissingExtraError, match=r'pip install "hookattn\[store\]"'):
        extraction.extract(load_none, "photos", "x.zarr")


@pytest.mark.parametrize("given", [None, "vit_small_patch16_224", lambda: None], ids=["none", "name", "loads none"])
def test_what_is_no_model_is_refused(folder: Path, given: Any) -> None:
    with pytest.raises(ModelError, match=r"a (NoneType|str) is no model: give an nn\.Module, or a function that loads one"):
        extraction.extract(given, "photos", "x.zarr")
    assert not Path("x.zarr").exists()


def test_what_a_model_refuses_leaves_nothing(folder: Path) -> None:
    before = sorted(folder.rglob("*"))
    load: Callable[[], nn.Module] = lambda: small_vit().train()  # noqa: E731
    with pytest.raises(ModelError, match="training mode"):
        extraction.extract(load, "photos", "new/deep/x.zarr")
    assert sorted(folder.rglob("*")) == before


def test_a_model_that_is_loaded_is_loaded_once_and_gives_what_it_gives(folder: Path) -> None:
    model, loaded = small_vit(), list[int]()

    def load() -> nn.Module:
        loaded.append(1)
        return model

    for name, given in (("new/deep/x.zarr", load), ("y.zarr", model)):
        extraction.extract(given, Drawn(3), name, "cls,entropy")
    assert same(everything("new/deep/x.zarr"), everything("y.zarr"))
    assert loaded == [1]


def test_a_loader_that_makes_no_batches_leaves_their_size_open(folder: Path) -> None:
    sizes, model = list[int](), small_vit()
    model.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    extraction.extract(model, DataLoader(TENSORS, batch_size=None, shuffle=True), "x.zarr", "entropy", batch_size=4)
    assert sizes == [1, 4, 2]
