"""Images that come as patches, each with a grid of its own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.image import GEMMA, SIZES, VIT, as_patches, build, naflex
from support.reading import record

from hookattn import TokenError


@pytest.mark.parametrize("prefix", [(), ("cls",), ("cls", "reg0", "reg1")])
def test_images_of_their_own_grids_lie_each_on_its_own(prefix: tuple[str, ...]) -> None:
    rec, _ = naflex(class_token="cls" in prefix, reg_tokens=max(0, len(prefix) - 1))
    for m in (rec.maps["blocks.0.attn"], rec.maps["attn_pool"]):
        assert m.tokens.grid_size == (4, 5)
        names = m.tokens.prefix
        assert names == (prefix if m.name == "blocks.0.attn" else ())
        attention = m[...].mean(1)[:, 0, len(names) :]
        picture = m.image(0)
        whole_size = m.image(0, size=(8, 9))
        for i, (rows, columns) in enumerate(SIZES):
            expected = torch.zeros(4, 5, dtype=attention.dtype)
            expected[:rows, :columns] = attention[i, : rows * columns].reshape(rows, columns)
            torch.testing.assert_close(picture[i], expected)
            small = expected[None, None, :rows, :columns]
            torch.testing.assert_close(whole_size[i], F.interpolate(small, (8, 9), mode="nearest-exact")[0, 0])
            assert (attention[i, rows * columns :] == 0).all()  # padding gets nothing


def test_a_point_lies_on_another_patch_in_each_image() -> None:
    m = naflex()[0].maps["blocks.0.attn"]
    for point in ((0.0, 0.0), (0.6, 0.5), (1.0, 1.0)):
        picture = m.image(point)
        for i, (rows, columns) in enumerate(SIZES):
            patch = min(int(point[0] * rows), rows - 1) * columns + min(int(point[1] * columns), columns - 1)
            expected = m[i, :, patch, : rows * columns].mean(0).reshape(rows, columns)
            torch.testing.assert_close(picture[i, :rows, :columns], expected)
    with pytest.raises(TokenError, match="not among the tokens of every image"):
        m.image((3, 2))


def test_means_of_images_of_their_own_grids_are_of_their_own_patches() -> None:
    m = naflex()[0].maps["blocks.0.attn"]
    for i, (rows, columns) in enumerate(SIZES):
        expected = m[i, :, : rows * columns, : rows * columns].mean((0, 1)).reshape(rows, columns)
        torch.testing.assert_close(m.image("mean")[i, :rows, :columns], expected)


def test_patches_whose_coordinates_mark_them_as_padding_lie_nowhere() -> None:
    model = build("gemma4_vit_167m", **(VIT | GEMMA))
    batch = as_patches([torch.rand(3, 16 * h, 16 * w, dtype=torch.float64) for h, w in ((3, 6), (6, 3))], 16, 20)
    batch["patch_coord"][~batch.pop("patch_valid")] = -1
    m = record(model, batch).maps[0]
    assert m.tokens.grid_size == (6, 6)
    torch.testing.assert_close(m.image((2, 2))[0, :3], m[0, :, 14, :18].mean(0).reshape(3, 6))
    torch.testing.assert_close(m.image((2, 2))[1, :, :3], m[1, :, 8, :18].mean(0).reshape(6, 3))
