"""Sizes of feature maps, of images inside models, and of windows that are resized."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from support.image import SWIN, VIT, Size, build
from support.inside import size_after
from support.reading import record
from timm.layers import Attention
from torch import Tensor, nn

from hookattn import AttentionRecorder, TokenError
from hookattn.analysis import mean_attention_distance


def test_windows_without_the_block_that_cut_them_lie_nowhere() -> None:
    model = build("swin_tiny_patch4_window7_224", **SWIN, img_size=(40, 72))
    m = record(nn.Sequential(model.layers[0].blocks[1].attn), torch.randn(30, 16, 24).double()).maps[0]
    with pytest.raises(TokenError):
        m.image("mean")
    with AttentionRecorder(model) as rec, torch.no_grad():
        model.layers[0].blocks[1].attn(torch.randn(30, 16, 24).double())
    with pytest.raises(TokenError, match="was called, but not the SwinTransformerBlock around it"):
        rec.maps[0].image("mean")


def test_windows_are_known_where_no_image_was_seen() -> None:
    block = build("swin_tiny_patch4_window7_224", **SWIN, img_size=(40, 72)).layers[0].blocks[1]
    m = record(nn.Sequential(nn.Identity(), block), torch.randn(2, 10, 18, 24).double()).maps[0]
    assert m.axes[0] == "batch * windows"
    assert m.image((3, 4)).shape == (2, 10, 18)


@pytest.mark.filterwarnings("ignore")  # of timm's resampling
@pytest.mark.parametrize("size", [(64, 64), (96, 64)])
def test_an_input_size_that_was_set_anew_is_the_one_that_counts(size: Size) -> None:
    model = build("swin_tiny_patch4_window7_224", **SWIN, img_size=(48, 64))
    model.set_input_size(img_size=size, window_size=(3, 5))
    for m in record(model, torch.randn(2, 3, *size).double()).maps.values():
        assert m.tokens.grid_size in [(size[0] // 4, size[1] // 4), (size[0] // 8, size[1] // 8)]
        assert m.image("mean").shape == (2, *m.tokens.grid_size)


def test_features_only_models_tell_the_same() -> None:
    for name, options, count in (("swin_tiny_patch4_window7_224", SWIN, 4), ("vit_tiny_patch16_224", VIT, 1)):
        model = build(name, **options, img_size=(64, 96), features_only=True, out_indices=[0])
        maps = record(model, torch.randn(2, 3, 64, 96).double()).maps
        assert 1 <= len(maps) <= count
        for m in maps.values():
            rows, columns = m.tokens.grid_size
            assert rows * 3 == columns * 2
            assert m.image((1, 2)).shape == (2, rows, columns)


class Towers(nn.Module):
    """Two models, each with images of its own."""

    def __init__(self, left: nn.Module, right: nn.Module) -> None:
        super().__init__()
        self.left, self.right = left, right

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return self.left(a), self.right(b)


def test_two_towers_each_have_their_own_grid() -> None:
    left = build("vit_tiny_patch16_224", **VIT, img_size=(64, 96))
    right = build("swin_tiny_patch4_window7_224", **SWIN, img_size=(48, 32))
    with AttentionRecorder(Towers(left, right)) as rec, torch.no_grad():
        rec.model(torch.randn(2, 3, 64, 96).double(), torch.randn(3, 3, 48, 32).double())
    assert rec.maps["left.blocks.0.attn"].image("cls").shape == (2, 4, 6)
    assert rec.maps["right.layers.0.blocks.1.attn"].image((5, 7)).shape == (3, 12, 8)


@pytest.mark.parametrize("size", [(7, 12), (16, 9), (1, 5)])
@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(2, 2, 3, 2, 1),
        nn.Conv2d(2, 2, (3, 1), (2, 3), (1, 0)),
        nn.Conv2d(2, 2, 3, padding="same"),
        nn.Conv2d(2, 2, 1, padding="valid"),
        nn.Conv2d(2, 2, 3, 1, 2, dilation=2),
        nn.MaxPool2d(3, 2, 1),
        nn.AvgPool2d(2, 2, ceil_mode=True),
        nn.AvgPool2d(3, 2, 1, ceil_mode=True),
        nn.AvgPool2d(1, 2),
        nn.AdaptiveAvgPool2d(7),
        nn.AdaptiveAvgPool2d((None, 3)),
        nn.Sequential(nn.ZeroPad2d((1, 0, 2, 0)), nn.Conv2d(2, 2, 2), nn.ReLU(), nn.Conv2d(2, 2, 3, 2, 1)),
        timm.layers.create_conv2d(2, 2, 3, stride=2, padding="same"),
        timm.layers.create_pool2d("avg", 2, stride=2, padding="same"),
        timm.layers.create_pool2d("max", 3, stride=2, padding="same"),
        timm.layers.create_pool2d("max", 3, stride=2),
    ],
    ids=str,
)
def test_a_size_after_a_layer_is_what_comes_out_of_it(layer: nn.Module, size: Size) -> None:
    assert size_after((2, *size), layer) == tuple(layer(torch.randn(1, 2, *size)).shape[2:])
    assert size_after(size, None) == size


@pytest.mark.parametrize("keep", ["inputs", "maps"])
@pytest.mark.filterwarnings("ignore")  # of timm, when it resizes
def test_a_picture_is_that_of_the_forward_when_windows_are_resized_later(keep: Any) -> None:
    sizes: Any = {"window_size": 4, "embed_dim": 24, "depths": (2, 2), "num_heads": (2, 4)}
    model = timm.create_model("swin_tiny_patch4_window7_224", img_size=32, **sizes).eval()
    with AttentionRecorder(model, keep=keep) as rec, torch.no_grad():
        model(torch.randn(2, 3, 32, 32))
    m = rec.maps["layers.1.blocks.1.attn"]
    before = m.image((1, 1))
    model.set_input_size((64, 64), window_size=(4, 4))
    assert model.layers[1].blocks[1].shift_size != (0, 0)
    assert torch.equal(m.tokens.select((1, 1)).nonzero(), torch.tensor([[0, 0, 5]]))
    if keep == "maps":
        assert torch.equal(m.image((1, 1)), before)


class Cutting(nn.Module):
    """A convolution that leaves out what fills no patch, and attention."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.Sequential(nn.Conv2d(3, 48, 16, 16, padding=1))
        self.attn = Attention(48, num_heads=3)

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.attn(self.patch_embed(images).flatten(2).mT)
        return out


def test_what_is_remembered_of_a_cut_is_of_images_of_that_size_and_of_that_step() -> None:
    model, images = Cutting().eval(), [torch.randn(1, 3, *size) for size in ((48, 48), (46, 47), (48, 48), (53, 50))]

    def told(rec: AttentionRecorder, x: Tensor) -> Any:
        model(x)
        m = rec.maps[0]
        assert m.tokens.grid_size == (3, 3)
        return m.tokens.extent, m.tokens.seen, m.tokens.prefix, mean_attention_distance(m).tolist()

    with torch.no_grad(), AttentionRecorder(model) as rec:
        for step in (16, 15, 16):
            model.patch_embed[0].stride = (step, step)  # type: ignore[assignment]
            for x in images:
                with AttentionRecorder(model) as fresh:
                    expected = told(fresh, x)
                assert told(rec, x) == expected
    assert expected[1] == (48 / 53, 48 / 50)
