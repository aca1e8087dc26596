"""Pictures of models whose layers see windows, or the image in several sizes."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from support.inside import rollout_image

from hookattn import AttentionRecorder, TokenError
from hookattn.figures.plot import overview
from hookattn.image import Photo


@pytest.fixture(scope="module")
def swin() -> Any:
    torch.manual_seed(0)
    sizes: Any = {"window_size": 4, "embed_dim": 24, "depths": (2, 2), "num_heads": (2, 4)}
    model = timm.create_model("swin_tiny_patch4_window7_224", img_size=64, **sizes).eval()
    with AttentionRecorder(model) as rec, torch.no_grad():
        model(torch.randn(2, 3, 64, 64))
    return rec.maps


@pytest.mark.parametrize("query", ["mean", (0.3, 0.9), (1.0, 0.0)])
def test_each_layer_is_drawn_on_its_own_grid_and_windows_are_no_rollout(swin: Any, query: Any) -> None:
    figure = overview(torch.rand(64, 64, 3).numpy(), swin[:], query)
    written = [text.get_text() for text in figure.texts]
    assert [each for each in written if each.startswith("head")] == ["head 0", "head 1", "head 2", "head 3"]
    assert not any("rollout" in each for each in written)
    panels = [axes.images[0].get_array() for axes in figure.axes[2:]]
    assert [panel.shape for panel in panels] == [(16, 16)] * 6 + [(8, 8)] * 10
    torch.testing.assert_close(torch.tensor(panels[4]), swin[1].image(query, heads=0)[0])


@pytest.mark.parametrize("query", [(3, 4), 7])
def test_a_patch_that_is_another_place_in_each_layer_is_refused(swin: Any, query: Any) -> None:
    with pytest.raises(TokenError, match=r"grids of 16 x 16, 8 x 8 patches.*query=\(0\.4, 0\.6\)"):
        overview(torch.rand(64, 64, 3).numpy(), swin[:], query)
    assert len(overview(torch.rand(64, 64, 3).numpy(), swin[:2], query).axes) == 2 + 2 * 3


def test_a_photo_is_drawn_whole_and_pale_where_the_model_saw_nothing(swin: Any) -> None:
    config = {"input_size": (3, 64, 64), "crop_pct": 1.0}
    photo = Photo.open(torch.rand(3, 50, 100), config)
    figure = overview(photo, swin[:], (0.3, 0.7))
    whole, mean, *panels = [axes.images[0].get_array() for axes in figure.axes]
    assert whole.shape == mean.shape == (50, 100, 3)
    for drawn in (whole, mean):
        assert (drawn[:, :25] > 0.74).all()
        assert (drawn[:, 75:] > 0.74).all()
    torch.testing.assert_close(torch.from_numpy(whole[:, 25:75]), photo.pixels[:, 25:75].double() / 255)
    assert all(panel.shape == (16, 33) for panel in panels)
    expected = swin[1].image((0.3, (0.7 - 0.25) / 0.5), heads=0, size=64)[:1]
    drawn = torch.tensor(panels[4])
    torch.testing.assert_close(drawn, photo.place(expected, (16, 33))[0], equal_nan=True)
    assert drawn[:, :8].isnan().all()
    assert not drawn[:, 9:24].isnan().any()
    with pytest.raises(TokenError, match="did not see the point"):
        overview(photo, swin[:], (0.3, 0.1))


def test_no_maps_are_no_picture() -> None:
    with pytest.raises(ValueError, match="no map to draw"):
        overview(torch.rand(8, 8, 3).numpy(), [])


def test_the_rollout_of_tokens_in_another_order_lies_where_they_do() -> None:
    """Hiera's tokens come unrolled; the rollout of one layer without residual is that layer's own picture."""
    torch.manual_seed(0)
    model = timm.create_model("hiera_tiny_224", img_size=128, embed_dim=24, stages=(1, 1, 3, 1)).eval()
    with AttentionRecorder(model, "blocks.4.attn") as rec, torch.no_grad():
        model(torch.randn(2, 3, 128, 128))
    m = rec.maps[0]
    assert m.tokens.places is not None
    own = m.image((3, 2), size=32)[0]
    mixed = rollout_image([m], (3, 2), (32, 32))
    itself = torch.zeros(1, 1, 8, 8)
    itself[..., 3, 2] = 1
    itself = torch.nn.functional.interpolate(itself, (32, 32), mode="nearest-exact")[0, 0]
    torch.testing.assert_close(mixed, 0.5 * own + 0.5 * itself)
