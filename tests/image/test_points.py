"""Which patch lies under a point of an image, against what the layers before it see.

The oracle knows nothing of strides or paddings: it changes one pixel of an image and sees which queries and keys are others
than before, in a model whose attention gives nothing, so that tokens know their own place alone. How far apart cells are is
read off where they begin to see.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import transformers
from support.image import SHRUNK, SWIN, VIT, build
from support.inside import form_of
from support.models import randomise
from support.places import HIERA, SVT
from support.reading import record
from torch import Tensor, nn

from hookattn import AttentionMap, TokenError
from hookattn.image import Geometry, Tokens, whole_grid

SIZE = (57, 83)


def hugging_face(name: str, **options: Any) -> nn.Module:
    config = getattr(transformers, f"{name}Config")(**options)
    model = getattr(transformers, f"{name}Model")._from_config(config)
    return randomise(model).double().eval()


def timms(name: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: build(name, **options)


HF_SWIN: dict[str, Any] = {"embed_dim": 16, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4, "image_size": (30, 39)}
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, int], Any]] = {
    "vit": (timms("vit_tiny_patch16_224", **VIT, img_size=SIZE), SIZE, ["blocks.0.attn"]),
    "vit, patches that are not square": (
        timms("vit_tiny_patch16_224", **VIT, patch_size=(8, 16), img_size=SIZE),
        SIZE,
        ["blocks.0.attn"],
    ),
    "vit, padded": (
        timms("vit_tiny_patch16_224", **VIT, dynamic_img_size=True, dynamic_img_pad=True),
        SIZE,
        ["blocks.0.attn"],
    ),
    "swin": (
        timms("swin_tiny_patch4_window7_224", **SWIN, img_size=(61, 87)),
        (61, 87),  # 15 x 21 patches and a rest, which the next stage pads
        ["layers.0.blocks.1.attn", "layers.1.blocks.0.attn"],
    ),
    "pvt": (timms("pvt_v2_b0", **SHRUNK), SIZE, ["stages.0.blocks.0.attn", "stages.2.blocks.0.attn"]),
    "mvit": (timms("mvitv2_tiny"), (33, 45), ["stages.1.blocks.1.attn"]),
    "twins": (timms("twins_svt_small", **SVT), SIZE, ["blocks.0.0.attn", "blocks.1.0.attn", "blocks.2.0.attn"]),
    "hiera": (timms("hiera_tiny_224", **HIERA), (64, 96), ["blocks.0.attn", "blocks.2.attn"]),
    "levit": (timms("levit_128s", img_size=64), (64, 64), ["stages.0.blocks.0.attn"]),
    "swin of transformers": (lambda: hugging_face("Swin", **HF_SWIN), (30, 39), None),
}


def give_nothing(module: nn.Module, args: Any, output: Any) -> Any:
    return (torch.zeros_like(output[0]), *output[1:]) if isinstance(output, tuple) else torch.zeros_like(output)


def cross(size: tuple[int, int]) -> list[tuple[int, int]]:
    """The pixels of a row and of a column through the middle."""
    height, width = size
    return [(y, width // 2) for y in range(height)] + [(height // 2, x) for x in range(width)]


def maps_of_pixels(model: nn.Module, size: tuple[int, int], layers: Any) -> list[AttentionMap]:
    """Maps of a batch of one image: the first as it is, each other with one pixel of the cross changed."""
    pixels = cross(size)
    x = torch.randn(1, 3, *size).double().repeat(len(pixels) + 1, 1, 1, 1)
    for i, (row, column) in enumerate(pixels, start=1):
        x[i, :, row, column] += 1 + torch.rand(3)
    names = record(model, x[:1]).maps
    # mixers of neighbours are as silent as attention
    silent = [model.get_submodule(name) for name in names] + [m for n, m in model.named_modules() if n.endswith("mlp")]
    hooks = [module.register_forward_hook(give_nothing) for module in silent]
    maps = record(model, x, layers=layers).maps[:]
    for hook in hooks:
        hook.remove()
    return maps


def what_sees(m: AttentionMap, tokens: Tokens, part: Tensor, images: int) -> list[set[tuple[int, int]]]:
    """For each pixel the places on the grid whose queries (or keys) are others than those of the first image."""
    own = part.unflatten(0, (images, -1)).transpose(2, 3).flatten(3)  # (images, windows, tokens, values)
    moved = ((own[1:] - own[0]).abs() > 1e-9 * own.abs().max()).any(-1)
    places, columns = tokens.patches[0], tokens.grid_size[1]
    numbered = [places[each[:, -places.shape[1] :]] for each in moved]
    return [{(int(p) // columns, int(p) % columns) for p in each if p >= 0} for each in numbered]


def steps_of(seen: list[set[tuple[int, int]]], axis: int) -> int | None:
    """How far apart the rows (axis 0) or columns of a grid begin to see, by the pixels of one line; None if they are few."""
    begin: dict[int, int] = {}
    for pixel, places in enumerate(seen):
        for place in places:
            begin.setdefault(place[axis], pixel)
    # those that begin at the border would begin elsewhere without it
    steps = {b - a for a, b in pairwise(sorted(pixel for pixel in begin.values() if pixel))}
    assert len(steps) < 2, begin
    return steps.pop() if steps else None


@pytest.mark.parametrize("name", MODELS)
def test_a_point_names_the_patch_that_sees_it(name: str) -> None:
    make, size, layers = MODELS[name]
    maps = maps_of_pixels(make(), size, layers)
    pixels = cross(size)
    assert maps
    for m in maps:
        form = form_of(m)
        for tokens, part in ((m.query_tokens, form.q), (m.tokens, form.k)):
            seen = what_sees(m, tokens, part, len(pixels) + 1)
            compare(tokens, size, pixels, seen, m.name)


def compare(tokens: Tokens, size: tuple[int, int], pixels: list[Any], seen: list[set[tuple[int, int]]], name: str) -> None:
    steps = steps_of(seen[: size[0]], 0), steps_of(seen[size[0] :], 1)
    for pixel, places in zip(pixels, seen):
        found = place_at(tokens, tuple((p + 0.5) / n for p, n in zip(pixel, size)))
        assert place_at(tokens, tuple(p / n for p, n in zip(pixel, size))) == found  # its upper left corner is its own
        if not places or found is None:
            past = any(step and p >= n * step for p, n, step in zip(pixel, tokens.grid_size, steps))
            assert found is None, (name, pixel)
            assert not places or past or None in steps, (name, pixel)
        else:
            assert found in places, (name, pixel)
            assert all(p // step == at for p, at, step in zip(pixel, found, steps) if step), (name, pixel, found, steps)


def place_at(tokens: Tokens, point: Any) -> tuple[int, int] | None:
    try:
        return divmod(tokens.index(point) - tokens.num_prefix_tokens, tokens.grid_size[1])
    except TokenError:
        return None


@pytest.mark.parametrize("size", [(33, 33), (57, 83), (64, 96), (129, 65)])
@pytest.mark.parametrize("name", ["pvt_v2_b0", "twins_svt_small"])
def test_cells_are_as_large_as_the_model_says_its_stages_shrink_images(name: str, size: tuple[int, int]) -> None:
    model = build(name, **(SHRUNK if name == "pvt_v2_b0" else SVT))
    stages: dict[int, set[tuple[float, ...]]] = {}
    for m in record(model, torch.randn(1, 3, *size).double()).maps.values():
        tokens = m.query_tokens
        cell = tuple(round(e * s / n, 6) for e, s, n in zip(tokens.extent, size, tokens.grid_size))
        stages.setdefault(int(m.name.split(".")[1]), set()).add(cell)
    shrinks = [info["reduction"] for info in model.feature_info]  # type: ignore[union-attr]
    assert stages == {stage: {(shrinks[stage],) * 2} for stage in range(len(stages))}


def test_the_pixels_of_a_rest_have_no_patch() -> None:
    """159 pixels are 9 patches of 16 and a rest of 15: there is no answer for the rest, and the right one elsewhere."""
    m = record(build("vit_tiny_patch16_224", **VIT, img_size=159), torch.randn(1, 3, 159, 159).double()).maps[0]
    for pixel in range(159):
        point = (pixel / 159, (pixel + 0.5) / 159)
        if pixel < 144:
            assert torch.equal(m.image(point), m.image((pixel // 16, pixel // 16)))
        else:
            with pytest.raises(TokenError, match=r"patches end at \(0\.906, 0\.906\)"):
                m.image(point)
    drawn, patches = m.image("cls", size=159), m.image("cls")
    torch.testing.assert_close(drawn[:, :144, :144], patches.repeat_interleave(16, 1).repeat_interleave(16, 2))
    assert drawn[:, 144:].isnan().all()
    assert drawn[:, :, 144:].isnan().all()


@pytest.mark.parametrize("side", [16, 14, 8])
@pytest.mark.parametrize("grid", [(3, 4), (9, 2), (1, 1), (27, 61)])
def test_the_border_of_an_image_belongs_to_its_last_patch(grid: tuple[int, int], side: int) -> None:
    model = nn.Sequential()
    model.patch_embed = nn.Conv2d(3, 1, side, side)
    height, width = grid[0] * side, grid[1] * side
    whole, rest = (
        Geometry(model, "", model, (1, height, w)).measured(tokens := whole_grid(grid), tokens)[0] for w in (width, width + 1)
    )
    assert whole.index((1.0, 1.0)) == len(whole) - 1
    for x in (1.0, width / (width + 1)):
        with pytest.raises(TokenError, match="the rest, which fills none, is left out"):
            rest.index((1.0, x))


@pytest.mark.parametrize("query", [(0.5, 0.5), (0, 0)])
def test_tokens_without_patches_have_none_at_a_point(query: Any) -> None:
    with pytest.raises(TokenError, match=r"there are no patches, so none at .*query='cls'"):
        Tokens(("cls",), (0, 0)).index(query)
