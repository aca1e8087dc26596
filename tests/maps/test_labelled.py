"""Maps as arrays of xarray: named axes, and where each query and each key lies, against what modules really receive."""

from __future__ import annotations

import sys
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import xarray
from support.image import DAVIT, SHRUNK, SIZES, SWIN, build, naflex, swin_places
from support.inside import lost
from support.models import tiny
from support.reading import record

from hookattn import UnreadableError
from hookattn.errors import MissingExtraError


def where(numbers: Any, columns: int) -> tuple[Any, Any]:
    """Rows and columns of places that are counted row by row, -1 for none."""
    numbers = np.asarray(numbers)
    return np.where(numbers < 0, np.nan, numbers // columns), np.where(numbers < 0, np.nan, numbers % columns)


def test_prefix_tokens_have_names_and_patches_have_places() -> None:
    model, x = tiny("vit_registers")
    m = record(model, x).maps[1]
    a = m.to_xarray()
    assert type(a) is xarray.DataArray
    assert a.dims == ("batch", "head", "query", "key")
    assert np.array_equal(a.values, m[...].numpy())
    assert a.layer == "blocks.1.attn"
    for side in ("query", "key"):
        row, column = where([*[-1] * 5, *range(16)], 4)
        assert list(a[f"{side}_token"].values) == ["cls", "reg0", "reg1", "reg2", "reg3", *["patch"] * 16]
        assert np.array_equal(a[f"{side}_row"].values, row, equal_nan=True)
        assert np.array_equal(a[f"{side}_col"].values, column, equal_nan=True)
        assert a.attrs[f"{side}_grid_size"] == (4, 4)
    picture = a.sel(query=0).where(a.key_token == "patch", drop=True).set_index(key=["key_row", "key_col"]).unstack("key")
    np.testing.assert_allclose(picture.mean("head").values, m.image("cls").numpy(), rtol=1e-6)


def test_windows_have_an_image_and_a_number_and_their_tokens_places() -> None:
    model = build("swin_tiny_patch4_window7_224", img_size=(40, 72), **SWIN)
    m = record(model, torch.randn(2, 3, 40, 72).double()).maps["layers.0.blocks.1.attn"]
    a = m.to_xarray()
    expected = swin_places(model.get_submodule("layers.0.blocks.1"), 10, 18)  # padding says -1
    assert a.dims == ("batch_windows", "head", "query", "key")
    assert (a.image.values == np.arange(len(a)) // len(expected)).all()
    assert (a.window.values == np.arange(len(a)) % len(expected)).all()
    for i, (row, column) in enumerate(zip(*where(expected, 18))):
        for image in range(2):
            of_window = a[(a.image == image) & (a.window == i)][0]
            assert np.array_equal(of_window.key_row.values, row, equal_nan=True)
            assert np.array_equal(of_window.key_col.values, column, equal_nan=True)
            assert np.array_equal(of_window.values, m[image * len(expected) + i].numpy())


def test_images_that_have_grids_of_their_own_have_places_of_their_own() -> None:
    rec, batch = naflex()
    a = rec.maps[0].to_xarray()
    for i, (rows, columns) in enumerate(SIZES):
        valid = batch["patch_valid"][i].numpy()
        row, column = (np.where(valid, each, np.nan) for each in batch["patch_coord"][i].double().numpy().T)
        assert np.array_equal(a.key_row.values[i], row, equal_nan=True)
        assert np.array_equal(a.query_col.values[i], column, equal_nan=True)
        assert np.nanmax(a.key_row.values[i]) == rows - 1
        assert np.nanmax(a.key_col.values[i]) == columns - 1


def test_keys_that_are_pooled_have_a_grid_of_their_own() -> None:
    model = build("pvt_v2_b0", **SHRUNK)
    a = record(model, torch.randn(1, 3, 64, 96).double()).maps[0].to_xarray()
    assert (a.attrs["query_grid_size"], a.attrs["key_grid_size"]) == ((16, 24), (2, 3))
    assert a.key_row.values.tolist() == [0, 0, 0, 1, 1, 1]
    assert a.key_col.values.tolist() == [0, 1, 2, 0, 1, 2]
    assert a.query_col.values.tolist() == list(range(24)) * 16


def test_channels_have_no_places_and_the_reason_is_told() -> None:
    model = build("davit_tiny", **DAVIT)
    rec = record(model, torch.randn(1, 3, 64, 64).double())
    m = next(m for m in rec.maps.values() if m.axes[2] == "channel")
    a = m.to_xarray()
    assert a.dims == ("batch", "head", "query_channel", "key_channel")
    assert "channels" in a.attrs["no_places"]
    assert "key_row" not in a.coords


def test_layers_of_one_shape_become_one_array_and_differ_where_they_do() -> None:
    model = build("swin_tiny_patch4_window7_224", img_size=(40, 72), **SWIN)
    maps = record(model, torch.randn(1, 3, 40, 72).double()).maps["layers.0.*"]
    a = maps.to_xarray()
    assert a.dims == ("layer", "batch_windows", "head", "query", "key")
    assert a.key_row.dims == ("layer", "batch_windows", "key")
    for name, m in maps.items():
        assert a.sel(layer=name).drop_attrs().identical(m.to_xarray().drop_attrs())
    assert torch.equal(torch.from_numpy(a.values), maps.stack())


def test_layers_of_several_shapes_are_refused() -> None:
    model = build("swin_tiny_patch4_window7_224", img_size=(40, 72), **SWIN)
    maps = record(model, torch.randn(1, 3, 40, 72).double()).maps
    with pytest.raises(ValueError, match=r"to_xarray\(\) is of maps of one kind, and these are .*layers\.0.*layers\.1.*glob"):
        maps.to_xarray()


def test_what_cannot_be_read_says_so() -> None:
    model, x = tiny("vit")
    with pytest.raises(UnreadableError, match="for this reason"):
        lost("for this reason", record(model, x).maps[0]).to_xarray()


def test_without_xarray_it_is_said_what_to_install() -> None:
    model, x = tiny("vit")
    rec: Any = record(model, x)
    with mock.patch.dict(sys.modules, xarray=None):
        for given in (rec.maps, rec.maps[0]):
            with pytest.raises(MissingExtraError, match=r'pip install "hookattn\[table\]"'):
                given.to_xarray()
