"""Pictures of windows, pooled keys and tokens in another order are those put together by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from support.image import MAXVIT, MVIT, SAM, SHRUNK, SWIN, Place, Size, build, marked, some_places, swin_places, the_class
from support.reading import record
from torch import Tensor

from hookattn import AttentionMap, TokenError
from hookattn.image import cut_windows


def naive(m: AttentionMap, places: Tensor, query: Place, area: int) -> Tensor:
    """(images, places): the picture of one query, by loops; `places` tells the place of every (window, token), -1 for none."""
    windows, count = places.shape
    attention = m[...].double().mean(1).unflatten(0, (-1, windows))
    number = query[0] * m.query_tokens.grid_size[1] + query[1]
    picture = torch.zeros(len(attention), area, dtype=torch.float64)
    for window in range(windows):
        for row in range(count):
            for key in range(count):
                if places[window, row] == number and places[window, key] >= 0:
                    picture[:, places[window, key]] += attention[:, window, row, key]
    return picture


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256", "swinv2_cr_tiny_224"])
@pytest.mark.parametrize("block", [0, 1])
def test_pictures_of_swin_are_those_put_together_by_hand(name: str, block: int) -> None:
    size = (40, 72) if name.startswith("swin_") else (64, 96)  # a shifted v2 needs whole windows in older timm
    model = build(name, **SWIN, img_size=size)
    rows, columns = size[0] // 4, size[1] // 4
    rec = record(model, torch.randn(2, 3, *size).double())
    m = rec.maps[block]
    places = swin_places(rec.model.get_submodule(m.name.removesuffix(".attn")), rows, columns)
    for query in some_places((rows, columns))[:6]:
        picture = naive(m, places, query, rows * columns).reshape(2, rows, columns)
        torch.testing.assert_close(m.image(query).double(), picture)
        assert (picture.sum((1, 2)) > 0).all()


@pytest.mark.parametrize("kind", ["block", "grid"])
def test_pictures_of_maxvit_are_those_put_together_by_hand(kind: str) -> None:
    reverse = the_class(f"timm.models.maxxvit.{'window' if kind == 'block' else 'grid'}_reverse")
    m = record(build("test_maxvit", **MAXVIT), torch.randn(2, 3, 64, 96).double()).maps[f"stages.0.blocks.0.attn_{kind}.attn"]
    windows, count = m.shape[0] // 2, m.shape[2]
    tokens = torch.arange(windows * count).reshape(windows, 2, 3, 1)
    lies = reverse(tokens, (2, 3), (16, 24))[0, ..., 0].flatten()
    places = torch.empty(windows * count, dtype=torch.long).scatter_(0, lies, torch.arange(windows * count))
    for query in some_places((16, 24))[:8]:
        picture = naive(m, places.reshape(windows, count), query, 16 * 24).reshape(2, 16, 24)
        torch.testing.assert_close(m.image(query).double(), picture)


def test_pictures_of_sam_leave_padding_out() -> None:
    unpartition = the_class("timm.models.vision_transformer_sam.window_unpartition")
    m = record(build("samvit_base_patch16_224", **SAM, img_size=(96, 112)), torch.randn(2, 3, 96, 112).double()).maps[0]
    lies = unpartition(torch.arange(64).reshape(4, 4, 4, 1), 4, (6, 7), (8, 8))[0, ..., 0].flatten()
    places = torch.full((64,), -1).scatter_(0, lies, torch.arange(42)).reshape(4, 16)
    for query in some_places((6, 7)):
        torch.testing.assert_close(m.image(query).double(), naive(m, places, query, 42).reshape(2, 6, 7))
    assert (m.image((5, 6)).sum((1, 2)) < 0.9).all()  # padding is attended to


def test_pictures_of_pooled_keys_lie_on_the_grid_of_the_keys() -> None:
    m = record(build("pvt_v2_b0", **SHRUNK), torch.randn(2, 3, 96, 160).double(), layers="stages.1.blocks.0.attn").maps[0]
    assert m.shape[2:] == (12 * 20, 3 * 5)
    expected = m[...].mean(1)[:, 7 * 20 + 11].reshape(2, 3, 5)
    torch.testing.assert_close(m.image((7, 11)), expected)
    assert m.image((7, 11), size=(96, 160)).shape == (2, 96, 160)


@pytest.mark.parametrize("prefix", [0, 1])
def test_pictures_of_mvit_lie_on_the_grid_of_the_keys(prefix: int) -> None:
    options = MVIT | {"kernel_q": (3, 3), "stride_q": (2, 2), "kernel_kv": (3, 3), "stride_kv": (4, 4)}
    name = "timm.models.mvitv2.MultiScaleAttention"
    model = build(name, [8, 12], **options, has_cls_token=bool(prefix))
    m = record(model, torch.randn(2, prefix + 96, 16).double()).maps[0]
    assert m.shape[2:] == (prefix + 24, prefix + 6)
    assert m.query_tokens.prefix == m.tokens.prefix == ("cls",) * prefix
    expected = m[...].mean(1)[:, prefix + 2 * 6 + 5, prefix:].reshape(2, 2, 3)
    torch.testing.assert_close(m.image((2, 5)), expected)
    torch.testing.assert_close(m.image((0.7, 0.9)), expected)


def test_a_key_of_nextvit_is_spread_over_the_tokens_it_is_made_of() -> None:
    options = {"in_chs": 64, "out_chs": 128, "drop_path": 0.0, "sr_ratio": 2}
    model = build("timm.models.nextvit.NextTransformerBlock", **options)
    m = record(model, torch.randn(2, 64, 7, 9).double()).maps[0]
    assert m.shape[2:] == (63, 15)
    row = m[:, :, 13].mean(1)
    expected = torch.zeros(2, 63, dtype=row.dtype)
    for key in range(15):
        expected[:, key * 4 : key * 4 + 4] = row[:, key, None] / 4
    torch.testing.assert_close(m.image((1, 4)), expected.reshape(2, 7, 9))
    torch.testing.assert_close(m.image("mean").sum((1, 2)), torch.ones(2, dtype=row.dtype))


@pytest.mark.parametrize("size", [(7, 9), (8, 12)])
@pytest.mark.parametrize("stride", [1, 2])
def test_a_place_of_outlook_attention_stands_in_every_window_around_it(size: Size, stride: int) -> None:
    options = {"dim": 12, "num_heads": 2, "stride": stride}
    model = build("timm.models.volo.OutlookAttention", **options)
    m = record(model, torch.randn(2, *size, 12).double()).maps[0]
    lies = model.inner.unfold(marked(*size).permute(0, 3, 1, 2))[0].long() - 1  # (places of a window, windows), by timm
    for query in some_places(size):
        number = query[0] * size[1] + query[1]
        windows = [(w, p) for w in range(lies.shape[1]) for p in range(9) if lies[p, w] == number]
        expected = torch.zeros(2, size[0] * size[1], dtype=torch.float64)
        for window, place in windows:
            for key in range(9):
                if lies[key, window] >= 0:
                    row = m[...].mean(1).unflatten(0, (2, -1))[:, window, place, key]
                    expected[:, lies[key, window]] += row / len(windows)
        torch.testing.assert_close(m.image(query), expected.reshape(2, *size))


def test_one_pair_of_a_map_is_one_place_of_one_picture() -> None:
    m = record(build("swin_tiny_patch4_window7_224", **SWIN, img_size=(40, 72)), torch.randn(2, 3, 40, 72).double()).maps[1]
    tokens, windows = m.tokens, m.tokens.windows
    assert tokens.places is not None
    for window, key in [(0, 0), (3, 7), (windows - 1, 0), (windows - 1, 15)]:
        rows = torch.zeros(2, windows, 1, len(tokens))
        rows[1, window, 0, key] = 1
        place = int(tokens.places[0, window, key])
        expected = torch.zeros(2, 1, 10, 18)
        if place >= 0:
            expected[1, 0, place // 18, place % 18] = 1
        assert torch.equal(tokens.lay_out(rows), expected)


@pytest.mark.parametrize("mutation", ["none", "no shift", "rows for columns", "pad before the shift", "strided"])
def test_the_oracle_sees_a_mutation(mutation: str) -> None:
    model = build("swin_tiny_patch4_window7_224", **SWIN, img_size=(40, 72))
    block = model.layers[0].blocks[1]
    true, shift = swin_places(block, 10, 18), (2, 2)
    if mutation == "pad before the shift":
        grid = F.pad(torch.arange(180).reshape(10, 18), (0, 2, 0, 2), value=-1).roll((-2, -2), (0, 1))
        places = rearrange(grid, "(h p) (w q) -> (h w) (p q)", p=4, q=4)
    elif mutation == "rows for columns":
        places = cut_windows((18, 10), (4, 4), shift).places[0]  # type: ignore[index]
    else:
        moved = (0, 0) if mutation == "no shift" else shift
        places = cut_windows((10, 18), (4, 4), moved, strided=mutation == "strided").places[0]  # type: ignore[index]
    assert torch.equal(places, true) == (mutation == "none")


def test_a_grid_that_is_resized_to_whole_patches_is_the_one_that_is_cut() -> None:
    options = {"in_chs": 16, "patch_size": 2, "transformer_depth": 1}
    m = record(build("timm.models.mobilevit.MobileVitBlock", **options), torch.randn(2, 16, 7, 9).double()).maps[0]
    assert m.shape[::2] == (2 * 4, 20)
    assert m.tokens.grid_size == (8, 10)
    picture = m.image((3, 5))
    assert (picture > 0).sum() == 2 * 20
    assert (picture[:, 1::2, 1::2] > 0).all()


@pytest.mark.parametrize("size", [(159, 96), (80, 95), (96, 64)], ids=str)
@pytest.mark.parametrize("architecture", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
def test_a_point_is_the_patch_under_it_where_patches_leave_a_rest_or_reach_over_the_border(
    architecture: str, size: Size
) -> None:
    """Patches have their size, wherever the image ends; a point where there is none is told."""
    patch = 16 if architecture.startswith("vit") else 4
    options = {"depth": 1} if patch == 16 else {**SWIN, "window_size": 2}
    m = record(build(architecture, **options, img_size=size), torch.randn(1, 3, *size).double()).maps[0]
    rows, columns = m.tokens.grid_size
    for y in range(0, size[0], 3):
        for x in (0, size[1] // 2, size[1] - 1):
            point = ((y + 0.5) / size[0], (x + 0.5) / size[1])
            row, column = y // patch, x // patch
            if row < rows and column < columns:
                assert m.tokens.index(point) == m.tokens.index((row, column))
            else:
                with pytest.raises(TokenError, match="where no patch does"):
                    m.tokens.index(point)
