"""A photo on its way into a model and back: upright, in its colours, cut as timm cuts, and each pixel where it came from."""

from __future__ import annotations

import io
import zlib
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from support.inside import preprocessing_of
from torch import nn

from hookattn import HookattnError, TokenError
from hookattn.image import Geometry, Photo, whole_grid

PLAIN = {"input_size": (3, 32, 32), "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0), "crop_pct": 1.0}
few = settings(max_examples=60, deadline=None, derandomize=True)
side = st.integers(1, 90)


def noise(height: int, width: int) -> Image.Image:
    pixels = np.random.default_rng(height * 1000 + width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


# What the model gets


CONFIGS: Iterator[Any] = [
    {"crop_mode": mode, "crop_pct": crop_pct, "input_size": (3, *size), "interpolation": how}
    for mode, crop_pct, size, how in [
        ("center", 0.875, (32, 32), "bicubic"),
        ("center", 1.0, (32, 32), "bilinear"),
        ("center", 0.9, (30, 47), "bicubic"),
        ("center", 1.25, (32, 32), "bilinear"),
        ("squash", 0.9, (32, 40), "bilinear"),
        ("squash", 1.0, (33, 33), "bicubic"),
        ("border", 1.0, (32, 45), "bicubic"),
        ("border", 0.8, (31, 31), "bilinear"),
    ]
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c['crop_mode']} {c['crop_pct']} {c['input_size'][1:]}")
def test_the_input_is_that_of_the_transform_of_timm_bit_for_bit(config: dict[str, Any]) -> None:
    whole = timm.data.resolve_data_config(config)
    transform = timm.data.create_transform(**whole, is_training=False)
    for size in [(40, 60), (61, 33), (32, 32), (7, 5), (1, 1), (20, 300), (101, 99)]:
        photo = noise(*size)
        assert torch.equal(Photo.open(photo, whole).tensor, transform(photo)), size


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "levit_128s", "mobilevitv2_050"])
def test_a_model_tells_how_it_wants_photos(name: str) -> None:
    model = timm.create_model(name)
    config = timm.data.resolve_model_data_config(model)
    transform = timm.data.create_transform(**config, is_training=False)
    assert torch.equal(Photo.open(noise(70, 90), model, crop="center").tensor, transform(noise(70, 90)))
    assert torch.equal(Photo.open(noise(70, 90), nn.Sequential(model), crop="center").tensor, transform(noise(70, 90)))


def test_a_model_of_another_size_gets_photos_of_that_size() -> None:
    model = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=(64, 96))
    photo = Photo.open(noise(200, 100), model)
    assert (photo.crop, photo.input_size, photo.resized) == ("center", (64, 96), (212, 106))
    model(photo.tensor[None])


@pytest.mark.parametrize("size", [(480, 640), (640, 480), (300, 300), (10, 4000), (1, 1), (5000, 1)])
def test_a_model_that_takes_any_size_is_shown_the_whole_photo(size: tuple[int, int]) -> None:
    model = timm.create_model("vit_tiny_patch16_224", depth=1, embed_dim=12, num_heads=1, dynamic_img_size=True)
    photo = Photo.open(noise(*size), model)
    height, width = photo.input_size
    assert photo.crop == "none"
    assert photo.resized == photo.input_size
    assert photo.seen == (0, 0, 1, 1)
    assert height % 16 == width % 16 == 0
    assert height * width <= 1.15 * 224 * 224
    if max(size) < 5 * min(size):
        assert abs(height / width / (size[0] / size[1]) - 1) < 0.08
    with torch.no_grad():
        model(photo.tensor[None])
    assert Photo.open(noise(*size), model, size=(32, 48)).input_size == (32, 48)
    assert Photo.open(noise(*size), model, size=64).tensor[0].numel() <= 1.3 * 64 * 64


def test_hierarchical_models_take_multiples_of_what_they_shrink_by() -> None:
    model = timm.create_model("pvt_v2_b0")
    photo = Photo.open(noise(100, 160), model)
    assert (photo.crop, photo.input_size) == ("none", (192, 288))
    assert "widened by 7%" not in repr(photo)
    assert "heightened by 7%" in repr(photo)


def test_a_model_of_one_size_says_so_when_it_is_to_see_the_whole_photo() -> None:
    model = timm.create_model("vit_tiny_patch16_224", depth=1)
    with pytest.raises(
        TokenError, match=r"takes images of 224 x 224 alone.*192 x 256\. Take crop='center', or.*img_size=\(192, 256\)"
    ):
        Photo.open(noise(48, 64), model, crop="none")
    told = preprocessing_of(model)  # as it is kept where the model is not at hand
    with pytest.raises(TokenError, match="this VisionTransformer takes images of 224 x 224 alone"):
        Photo.open(noise(48, 64), told, crop="none")
    with pytest.raises(TokenError, match="this model takes images of 224 x 224 alone"):
        Photo.open(noise(48, 64), told._replace(model=""), crop="none")
    assert Photo.open(noise(48, 64), model, crop="none", size=(224, 224)).seen == (0, 0, 1, 1)
    assert Photo.open(noise(50, 50), model, crop="none").input_size == (224, 224)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crop": "middle"}, "crop='middle' is no choice: 'none'"),
        ({"size": 0}, "size=0 is no size"),
        ({"size": (3, 4, 5)}, "is no size"),
        ({"model": nn.Linear(1, 1)}, "Linear does not say how it wants its images"),
        ({"model": {"input_size": (12, 32, 32)}}, "1 or 3 channels"),
        ({"model": {"input_size": (3, 64)}}, r"input_size=\(3, 64\) .* three whole numbers"),
        ({"model": {"input_size": (3, 64.5, 64)}}, r"three whole numbers"),
        ({"model": {"interpolation": "cubic"}}, "interpolation='cubic' .* bilinear, bicubic"),
        ({"model": {"mean": 0.5}}, "mean=0.5 .* a number for each channel"),
        ({"model": {"std": (0.5, 0, 0.5)}}, "none of them 0"),
        ({"model": {"crop_pct": "all"}}, "crop_pct='all' .* above 0"),
        ({"model": {"crop_mode": "middle"}}, "crop_mode='middle' .* center, squash, border"),
        ({"source": noise(1, 10**6)}, "too long a strip"),
        ({"source": np.zeros((3, 8, 8), np.uint8)}, "channels that come first"),
        ({"source": torch.zeros(8, 8, 3)}, "channels that come last"),
        ({"source": torch.zeros(1, 3, 8, 8)}, r"of a batch give x\[0\]"),
        ({"source": np.zeros((0, 8, 3), np.uint8)}, "an array of one photo is"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], message: str) -> None:
    source, model = options.pop("source", noise(8, 8)), options.pop("model", PLAIN)
    with pytest.raises(TokenError, match=message):
        Photo.open(source, model, **options)


def test_a_file_that_is_no_image_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no image")
    whole = tmp_path / "whole.png"
    noise(64, 64).save(whole)
    (tmp_path / "cut.png").write_bytes(whole.read_bytes()[:2000])
    with pytest.raises(HookattnError, match="not int"):
        Photo.open(3, PLAIN)
    for name in ("text.png", "cut.png", "none.png"):
        with pytest.raises(HookattnError, match="is no image that can be read"):
            Photo.open(tmp_path / name, PLAIN)


def encode(image: Image.Image, kind: str) -> bytes:
    image.save(file := io.BytesIO(), kind)
    return file.getvalue()


DAMAGED: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", r"0 bytes is no image that can be read \(it is empty\)\. Fetch it anew\.$"),
    "a page": (
        lambda: b"<!DOCTYPE html><html>",
        r"or broken where it begins, b'<!DOCTYPE html>.'\)\. Fetch it anew",
    ),
    "a pointer": (lambda: b"version https://git-lfs.github.com", r"b'version https://'\)\. Fetch it anew"),
    "of no pixels": (lambda: set_width(encode(noise(8, 8), "PNG"), 0), r"or broken where it begins, b'.x89PNG.*Fetch it anew"),
    "cut": (
        lambda: encode(noise(64, 64), "PNG")[:2000],
        r"\(.+\)\. It is damaged, or ends too early: fetch it anew",
    ),
    "cut in its data": (
        lambda: encode(noise(64, 64), "BMP")[:2000],
        r"\(.+\)\. It is damaged, or ends too early: fetch it anew",
    ),
    "a bomb": (
        lambda: set_width(encode(noise(8, 8), "PNG"), 10**8),
        r"\(Image size \(800000000 pixels\) .*\)\. Make it smaller, or set PIL\.Image\.MAX_IMAGE_PIXELS = None",
    ),
}


def set_width(png: bytes, width: int) -> bytes:
    """A PNG that says that it is so wide."""
    head = b"IHDR" + width.to_bytes(4, "big") + png[20:29]
    return png[:12] + head + zlib.crc32(head).to_bytes(4, "big") + png[33:]


@pytest.mark.parametrize("kind", DAMAGED)
def test_what_is_wrong_with_a_file_and_what_to_do_is_told_in_a_line(kind: str) -> None:
    make, message = DAMAGED[kind]
    with pytest.raises(HookattnError, match=message) as refused:
        Photo.open(make(), PLAIN)
    assert "\n" not in str(refused.value)


# Upright, in its colours


def upright() -> np.ndarray[Any, Any]:
    pixels = np.zeros((24, 36, 3), np.uint8)
    pixels[:5, :9], pixels[12:, :, 1], pixels[:, 30:, 2] = (250, 0, 0), 90, 200
    return pixels


# how a photo is stored for an orientation, by the table of the EXIF standard: row 0 is at the ..., column 0 at the ...
STORED = {
    1: lambda p: p,
    2: lambda p: p[:, ::-1],
    3: lambda p: p[::-1, ::-1],
    4: lambda p: p[::-1],
    5: lambda p: p.transpose(1, 0, 2),
    6: lambda p: p.transpose(1, 0, 2)[::-1],
    7: lambda p: p.transpose(1, 0, 2)[::-1, ::-1],
    8: lambda p: p.transpose(1, 0, 2)[:, ::-1],
}


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("crop", ["none", "center"])
def test_a_photo_is_turned_upright(tmp_path: Path, orientation: int, crop: Any) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "turned.png"
    Image.fromarray(np.ascontiguousarray(STORED[orientation](upright()))).save(path, exif=exif)
    photo, expected = Photo.open(path, PLAIN, crop=crop), Photo.open(upright(), PLAIN, crop=crop)
    assert torch.equal(photo.pixels, torch.from_numpy(upright()))
    assert torch.equal(photo.tensor, expected.tensor)
    assert any("EXIF" in step for step in photo.steps) == (orientation > 1)


def in_mode(mode: str) -> Image.Image:
    """Two rows in a mode of PIL, made of values by hand."""
    if mode == "P":
        image = Image.new("P", (1, 2))
        image.putpalette([200, 100, 50, 9, 9, 9])
        image.putpixel((0, 1), 1)
        image.info["transparency"] = 1
        return image
    values: dict[str, Any] = {
        "1": [0, 255],
        "L": [10, 200],
        "LA": [(10, 255), (10, 0)],
        "RGBA": [(10, 20, 30, 255), (10, 20, 30, 51)],
        "CMYK": [(255, 0, 0, 0), (0, 0, 0, 255)],
        "YCbCr": [(128, 128, 128), (255, 128, 128)],
        "I": [1000, 3000],
        "F": [-1.5, 2.5],
        "RGB": [(1, 2, 3), (4, 5, 6)],
    }
    image = Image.new(mode, (1, 2))
    for row, value in enumerate(values[mode]):
        image.putpixel((0, row), value)
    return image


MODES: dict[str, tuple[Any, list[tuple[int, ...]]]] = {
    "1": (in_mode("1"), [(0,) * 3, (255,) * 3]),
    "L": (in_mode("L"), [(10,) * 3, (200,) * 3]),
    "LA": (in_mode("LA"), [(10,) * 3, (255,) * 3]),
    "RGB": (in_mode("RGB"), [(1, 2, 3), (4, 5, 6)]),
    "RGBA": (in_mode("RGBA"), [(10, 20, 30), (206, 208, 210)]),
    "P, transparent": (in_mode("P"), [(200, 100, 50), (255,) * 3]),
    "CMYK": (in_mode("CMYK"), [(0, 255, 255), (0, 0, 0)]),
    "YCbCr": (in_mode("YCbCr"), [(128,) * 3, (255,) * 3]),
    "I": (in_mode("I"), [(0,) * 3, (255,) * 3]),
    "F": (in_mode("F"), [(0,) * 3, (255,) * 3]),
    "I;16": (Image.fromarray(np.array([[300], [4095]], np.uint16)), [(0,) * 3, (255,) * 3]),
    "uint16": (np.array([[40000], [50000]], np.uint16), [(0,) * 3, (255,) * 3]),
    "float in 0 to 1": (np.array([[0.2], [0.6]]), [(51,) * 3, (153,) * 3]),
    "float of more": (np.array([[-1.0], [3.0]], np.float32), [(0,) * 3, (255,) * 3]),
    "float with a gap": (np.array([[np.nan], [3.0]], np.float32), [(0,) * 3, (0,) * 3]),
    "bool": (np.array([[False], [True]]), [(0,) * 3, (255,) * 3]),
    "float RGBA": (np.array([[[0.2, 0.4, 0.6, 1.0]], [[0.2, 0.4, 0.6, 0.0]]]), [(51, 102, 153), (255,) * 3]),
    "uint16 RGBA": (np.array([[[0, 0, 9, 65535]], [[9, 0, 0, 0]]], np.uint16), [(0, 0, 255), (255,) * 3]),
    "one channel": (np.array([[[7]], [[8]]], np.uint8), [(7,) * 3, (8,) * 3]),
    "tensor": (torch.tensor([[[1], [4]], [[2], [5]], [[3], [6]]], dtype=torch.uint8), [(1, 2, 3), (4, 5, 6)]),
    "tensor of bfloat16": (torch.tensor([[0.0], [1.0]], dtype=torch.bfloat16), [(0,) * 3, (255,) * 3]),
}


@pytest.mark.parametrize("mode", MODES)
def test_colours_are_those_of_the_photo(mode: str) -> None:
    source, expected = MODES[mode]
    photo = Photo.open(source, PLAIN)
    assert [tuple(row) for row in photo.pixels[:, 0].tolist()] == expected
    scaled = mode in ("I", "F", "I;16", "uint16", "uint16 RGBA", "float of more", "float with a gap")
    assert any("scaled from" in step for step in photo.steps) == scaled
    see_through = {"RGBA", "LA", "P, transparent", "float RGBA", "uint16 RGBA"}
    assert any("transparent" in step for step in photo.steps) == (mode in see_through)


@pytest.mark.parametrize("mode", ["I;16", "F", "LA", "P"])
def test_a_file_is_what_was_saved_in_it(tmp_path: Path, mode: str) -> None:
    image = Image.fromarray(np.array([[300], [4095]], np.uint16)) if mode == "I;16" else in_mode(mode)
    image.save(path := tmp_path / ("a.tif" if mode == "F" else "a.png"))
    assert torch.equal(Photo.open(path, PLAIN).pixels, Photo.open(image, PLAIN).pixels)


def test_what_is_transparent_lies_over_the_colour_that_is_asked_for() -> None:
    photo = Photo.open(in_mode("RGBA"), PLAIN, ground="#000064")
    assert photo.pixels[:, 0].tolist() == [[10, 20, 30], [2, 4, 86]]
    assert "laid over #000064 where it is transparent" in photo.steps


# There and back


def ramp(height: int, width: int) -> Image.Image:
    """A photo whose colours tell where its pixels are."""
    rows, columns = (np.arange(n) + 0.5 for n in (height, width))
    return Image.fromarray(
        np.stack(
            [
                np.broadcast_to(rows[:, None] / height * 255, (height, width)),
                np.broadcast_to(columns / width * 255, (height, width)),
                np.full((height, width), 255.0),
            ],
            -1,
        )
        .round()
        .astype(np.uint8)
    )


@few
@given(
    st.integers(20, 90),
    st.integers(20, 90),
    st.integers(24, 60),
    st.integers(24, 60),
    st.sampled_from(["center", "squash", "border"]),
    st.sampled_from([0.8, 1.0]),
)
def test_the_model_sees_what_lies_at_its_points_of_the_photo(
    height: int, width: int, rows: int, columns: int, mode: str, crop_pct: float
) -> None:
    """By colours alone: the input is timm's own, and a photo of a ramp shows where each pixel of it came from."""
    config = timm.data.resolve_data_config(
        PLAIN | {"input_size": (3, rows, columns), "crop_mode": mode, "crop_pct": crop_pct, "interpolation": "bilinear"}
    )
    x = timm.data.create_transform(**config, is_training=False)(ramp(height, width))
    photo = Photo.open(ramp(height, width), config)
    for row in range(0, rows, 5):
        for column in range(0, columns, 5):
            y, z = photo.to_photo(((row + 0.5) / rows, (column + 0.5) / columns))
            shown = bool(x[2, row, column] > 0.99)
            reach = 2 / min(height, width)  # at the border of the photo colours are those of its last pixels
            if reach < y < 1 - reach and reach < z < 1 - reach:
                assert shown
                assert abs(x[0, row, column] - y) < 0.02
                assert abs(x[1, row, column] - z) < 0.02
            elif not (-reach < y < 1 + reach and -reach < z < 1 + reach):
                assert not shown


@few
@given(side, side, side, side, st.integers(2, 17), st.sampled_from(["center", "squash", "border", "none"]), st.data())
def test_a_map_of_one_patch_lies_on_the_pixels_of_that_patch(
    height: int, width: int, rows: int, columns: int, patch: int, crop: str, data: Any
) -> None:
    rows, columns = max(rows, patch), max(columns, patch)
    config = PLAIN | {"input_size": (3, rows, columns), "crop_pct": 0.9, "crop_mode": "center" if crop == "none" else crop}
    options: Any = {"crop": "none", "size": (rows, columns)} if crop == "none" else {}
    photo = Photo.open(noise(height, width), config, **options)
    model = nn.Sequential()
    model.patch_embed = nn.Conv2d(3, 1, patch, patch)
    grid = (rows // patch, columns // patch)
    keys = whole_grid(grid)
    tokens = Geometry(model, "", model, (1, rows, columns)).measured(keys, keys)[1]
    chosen = data.draw(st.tuples(st.integers(0, grid[0] - 1), st.integers(0, grid[1] - 1)))
    picture = torch.zeros(1, 2, *grid)
    picture[..., chosen[0], chosen[1]] = 1
    placed = photo.place(tokens.stretch(picture, photo.input_size))
    assert placed.shape == (1, 2, height, width)

    def under(pixel: int, pixels: int, axis: int) -> int | None:
        """The patch under the centre of a pixel, by fractions."""
        at = Fraction(2 * pixel + 1, 2 * pixels) * photo.resized[axis] - photo.corner[axis]
        inside = 0 <= at < grid[axis] * patch
        return int(at // patch) if inside else None

    down, across = [under(i, height, 0) for i in range(height)], [under(i, width, 1) for i in range(width)]
    expected = [[float("nan") if None in (r, c) else float((r, c) == chosen) for c in across] for r in down]
    torch.testing.assert_close(placed[0, 1], torch.tensor(expected), rtol=0, atol=0, equal_nan=True)
    row, column = (data.draw(st.integers(0, n - 1)) for n in (height, width))
    point = ((row + 0.5) / height, (column + 0.5) / width)
    if None in (down[row], across[column]):
        with pytest.raises(TokenError, match=r"did not see the point|where no patch does"):
            tokens.index(photo.to_input(point))
    else:
        assert tokens.index(photo.to_input(point)) == down[row] * grid[1] + across[column]  # type: ignore[operator]
        there = photo.to_photo(photo.to_input(point))
        assert there == pytest.approx(point)
        assert all(low <= p <= high for low, p, high in zip(photo.seen[:2], there, photo.seen[2:]))


def test_a_point_that_the_model_did_not_see_is_refused_with_what_it_saw() -> None:
    photo = Photo.open(noise(50, 100), PLAIN)
    assert photo.to_input((0.5, 0.5)) == (0.5, 0.5)
    with pytest.raises(
        TokenError, match=r"did not see the point \(0.5, 0.1\).*0.000 to 1.000 of the height and 0.250 to 0.750.*crop='none'"
    ):
        photo.to_input((0.5, 0.1))
    with pytest.raises(TokenError, match=r"\(0.5, 1.5\) is not on the photo"):
        photo.to_input((0.5, 1.5))


def test_a_photo_says_what_was_done_to_it() -> None:
    photo = Photo.open(np.full((50, 100), 700, np.uint16), PLAIN)
    said = "values of 16 bits scaled from 700 to 700; resized to 32 x 64; its middle of 32 x 32 shown to the model"
    assert repr(photo) == f"Photo(50 x 100, {said}; model's input 32 x 32)"


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.int64, torch.bool])
def test_pictures_of_any_kind_are_placed_and_keep_their_gradient(dtype: torch.dtype) -> None:
    photo = Photo.open(noise(6, 12), PLAIN | {"input_size": (3, 6, 6)})
    placed = photo.place(torch.ones(2, 2, dtype=dtype))
    assert placed.isnan().sum() == 6 * 6
    assert placed.nansum() == 6 * 6
    picture = torch.ones(1, 3, 3, requires_grad=True)
    photo.place(picture, (60, 120)).nansum().backward()
    assert torch.equal(picture.grad, torch.full((1, 3, 3), 400.0))
