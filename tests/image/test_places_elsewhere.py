"""Where the tokens of models outside timm lie: what moves with a point of the image is the token that is named for it."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import elsewhere
from support.elsewhere import CASES, Case, image, made, transformers_model
from torch import Tensor, nn

from hookattn import AttentionMap, AttentionRecorder, TokenError


def moved_alone(before: Tensor, after: Tensor) -> Tensor:
    """(pieces, keys) by how much each key's share moved on its own in most rows, and not because a row was normalised anew."""
    moved = (after.log() - before.log()).nan_to_num(0.0, 0.0, 0.0)
    alone = (moved - moved.median(-1, keepdim=True).values).abs().masked_fill(before == 0, math.nan)
    return alone.flatten(1, 2).nanmedian(1).values.nan_to_num()


def first_map(model: nn.Module, case: Case, x: Tensor) -> AttentionMap:
    inputs = tuple(x if a is case.inputs[0] else a[:1] for a in case.inputs)
    named = {key: x if key == "pixel_values" else a[:1] if isinstance(a, Tensor) else a for key, a in case.named.items()}
    with AttentionRecorder(model) as rec, torch.no_grad():
        model(*inputs, **named)
    m: AttentionMap = rec.maps[0]
    return m


TWICE = {name for name in CASES if name.replace(", eager", ", sdpa") in set(CASES) - {name}}


UNSEEN = {"vit_pytorch crossformer": "runs in float32 alone", "vit_pytorch levit": "shares of zero"}


@pytest.mark.parametrize("name", [n for n, case in CASES.items() if case.grid is not None and n not in {*UNSEEN, *TWICE}])
@pytest.mark.filterwarnings("ignore")
def test_what_moves_with_a_point_of_the_image_is_the_token_that_lies_there(name: str) -> None:
    model, case = made(name)
    model.double()
    x = (case.inputs[0] if case.inputs else case.named["pixel_values"])[:1].double()
    m = first_map(model, case, x)
    before = m[...]
    tokens = m.tokens
    assert (tokens.prefix, tokens.grid_size) == (case.prefix, case.grid)
    (rows, columns), (height, width) = tokens.grid_size, x.shape[-2:]
    for row, column in [
        (0, 0),
        (rows - 1, columns - 1),
        (rows // 2, columns // 3),
        (1, columns // 2),
        (rows // 3, columns - 2),
    ]:
        y, left = int((row + 0.5) * height / rows), int((column + 0.5) * width / columns)
        touched = x.clone()
        touched[:, :, y - 1 : y + 1, left - 1 : left + 1] += 1
        piece, key = divmod(int(moved_alone(before, first_map(model, case, touched)[...]).argmax()), before.shape[-1])
        near = [
            tokens.select((r, c))[0]
            for r in range(max(0, row - case.slack), min(rows, row + case.slack + 1))
            for c in range(max(0, column - case.slack), min(columns, column + case.slack + 1))
        ]
        assert torch.stack(near).any(0)[piece, key], ((row, column), (piece, key))


PREFIX = {"cls": ("cls_token", "class_token", "class_embedding"), "dist": ("distillation_token",)}


PREFIX["reg"] = ("register_tokens", "reg_token")


@pytest.mark.parametrize("name", [n for n, case in CASES.items() if case.prefix and "jumbo" not in n and n not in TWICE])
@pytest.mark.filterwarnings("ignore")
def test_a_prefix_token_moves_with_the_parameter_it_is_named_for(name: str) -> None:
    model, case = made(name)
    model.double()
    x = (case.inputs[0] if case.inputs else case.named["pixel_values"])[:1].double()
    before = first_map(model, case, x)[...]
    for kind, parameters in PREFIX.items():
        wanted = [i for i, prefix in enumerate(case.prefix) if prefix.startswith(kind)]
        token = next((p for n, p in model.named_parameters() if n.split(".")[-1] in parameters), None)
        if not wanted:
            continue
        assert token is not None
        with torch.no_grad():
            token.add_(torch.randn_like(token))
        moved = moved_alone(before, first_map(model, case, x)[...])[0]
        with torch.no_grad():
            before = first_map(model, case, x)[...]
        assert moved.topk(len(wanted)).indices.sort().values.tolist() == wanted


def test_the_second_block_of_a_swin_is_shifted_and_put_back() -> None:
    """With the first block silenced, a point of the image moves one token of the second."""
    for name in ("torchvision swin", "torchvision swin, padded", "torchvision swin v2"):
        model, case = made(name)
        first = model.features[1][0]  # type: ignore[index]
        with torch.no_grad():
            for parameter in first.attn.proj.parameters():
                parameter.zero_()
        model.double()
        x = case.inputs[0][:1].double()

        def shifted(x: Tensor, model: nn.Module = model) -> AttentionMap:
            with AttentionRecorder(model) as rec, torch.no_grad():
                model(x)
            m: AttentionMap = rec.maps[1]
            return m

        before, tokens = shifted(x)[...], shifted(x).tokens
        for row, column in [(0, 0), (15, 23), (7, 8), (2, 21), (14, 1)]:
            touched = x.clone()
            touched[:, :, row * 4 + 1 : row * 4 + 3, column * 4 + 1 : column * 4 + 3] += 1
            moved = moved_alone(before, shifted(touched)[...])
            assert (moved > 1e-9).nonzero().tolist() == tokens.select((row, column))[0].nonzero().tolist()


@pytest.mark.filterwarnings("ignore")
def test_a_swin_that_small_images_have_changed_for_good_still_tells_where_earlier_tokens_lie() -> None:
    pytest.importorskip("transformers")
    model = transformers_model(
        "SwinModel", {**elsewhere.SWIN, "depths": [2], "num_heads": [2], "window_size": 4}, "sdpa"
    )().eval()

    def second(size: int) -> AttentionMap:
        with AttentionRecorder(model) as rec, torch.no_grad():
            model(image(size, size))
        m: AttentionMap = rec.maps[1]
        return m

    large = second(64)
    assert large.tokens.places is not None
    places = large.tokens.places.tolist()
    assert places[0][0][0] == 2 * 16 + 2
    assert second(16).tokens.windows == 1
    assert large.tokens.places is not None
    assert large.tokens.places.tolist() == places
    later = second(64).tokens.places
    assert later is not None
    assert later[0, 0, 0] == 0


@pytest.mark.parametrize("name", [name for name in CASES if CASES[name].grid is None])
@pytest.mark.filterwarnings("ignore")
def test_tokens_that_are_no_grid_of_the_image_are_refused(name: str) -> None:
    model, case = made(name)
    with AttentionRecorder(model) as rec, torch.no_grad():
        model(*case.inputs, **case.named)
    with pytest.raises(TokenError):
        rec.maps[0].image("mean")


def test_patches_that_were_dropped_are_not_taken_for_a_coarser_grid() -> None:
    pytest.importorskip("vit_pytorch")
    for module, cls in (("vit_with_patch_dropout", "ViT"), ("simple_vit_with_patch_dropout", "SimpleViT")):
        package = importlib.import_module(f"vit_pytorch.{module}")
        model = getattr(package, cls)(image_size=64, **elsewhere.SMALL, patch_dropout=0.75).train()
        with AttentionRecorder(model) as rec, torch.no_grad():
            model(elsewhere.SQUARE)
        assert rec.maps[0].shape[-1] in (4, 5)
        with pytest.raises(TokenError, match="chosen at random"):
            rec.maps[0].image("mean")


@pytest.mark.parametrize("name", ["transformers CLIPModel", "open_clip CLIP"])
@pytest.mark.filterwarnings("ignore")
def test_words_are_no_patches_however_many_there_are(name: str) -> None:
    model, case = made(name)
    words = torch.arange(32).reshape(2, 16)  # as many as there are patches
    with AttentionRecorder(model) as rec, torch.no_grad():
        if case.named:
            model(**{**case.named, "input_ids": words})
        else:
            model(case.inputs[0], words)
    towers = {name.split(".")[0]: m for name, m in rec.maps.items()}
    assert len(towers) == 2
    for name, m in towers.items():
        if name.startswith("vis"):
            assert m.tokens.grid_size == (4, 4)
            continue
        assert m.shape[-1] == 16
        with pytest.raises(TokenError, match="may be words"):
            m.image("mean")


@pytest.mark.filterwarnings("ignore")
def test_images_that_come_as_patches_lie_on_grids_of_their_own() -> None:
    transformers = pytest.importorskip("transformers")
    tiny = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_patches": 16}
    model = transformers.Siglip2VisionModel(transformers.Siglip2VisionConfig(**tiny, patch_size=4)).eval()
    patches = torch.randn(2, 12, 48)
    shapes, mask = torch.tensor([[3, 4], [2, 5]]), torch.ones(2, 12, dtype=torch.long)
    mask[1, 10:] = 0
    with AttentionRecorder(model) as rec, torch.no_grad():
        model(pixel_values=patches, pixel_attention_mask=mask, spatial_shapes=shapes)
    m = rec.maps[0]
    assert m.tokens.grid_size == (3, 5)
    picture, rows = m.image((1, 3)), m[...].mean(1)
    torch.testing.assert_close(picture[0, :3, :4], rows[0, 7].reshape(3, 4))
    torch.testing.assert_close(picture[1, :2], rows[1, 8, :10].reshape(2, 5))
    assert float(picture[0, :, 4].sum() + picture[1, 2].sum()) == 0


@pytest.mark.parametrize(("frames", "known"), [(4, False), (2, True), (8, True)])
@pytest.mark.filterwarnings("ignore")
def test_frames_are_not_taken_for_as_many_patches(frames: int, known: bool) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = transformers.TimesformerModel(
        transformers.TimesformerConfig(**sizes, image_size=32, patch_size=16, num_frames=frames)
    ).eval()
    with AttentionRecorder(model) as rec, torch.no_grad():
        model(torch.randn(2, frames, 3, 32, 32))
    over_time, over_space = rec.maps[:]
    assert over_time.shape == (8, 2, frames, frames)
    assert over_space.shape == (2 * frames, 2, 5, 5)
    with pytest.raises(TokenError):
        over_time.image("mean")
    if known:
        assert over_space.tokens.grid_size == (2, 2)
        assert over_space.axes[0] == "batch"
    else:
        assert over_time.axes[0] == "sequence"
        with pytest.raises(TokenError, match="may be frames of a clip or patches of a frame"):
            over_space.image("mean")


class Clips(nn.Module):
    """Attention over the patches of each frame; of clips, which may come in a dict, and by a method of single images."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed, self.attn = nn.Conv2d(3, 8, 16, 16), nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, clip: Tensor | dict[str, Tensor]) -> Tensor:
        return self.see((clip["pixel_values"] if isinstance(clip, dict) else clip).flatten(0, 1))

    def see(self, images: Tensor) -> Tensor:
        x = self.patch_embed(images).flatten(2).mT
        return self.attn(x, x, x)[0]  # type: ignore[no-any-return]


@pytest.mark.parametrize("wrap", [lambda clip: clip, lambda clip: {"pixel_values": clip}])
def test_frames_are_those_of_the_call_however_they_come(wrap: Callable[[Tensor], Any]) -> None:
    model, clip = Clips().eval(), torch.randn(1, 4, 3, 32, 32)
    with AttentionRecorder(model) as rec, torch.no_grad():
        model(wrap(clip))
    with pytest.raises(TokenError, match="may be frames of a clip or patches of a frame"):
        _ = rec.maps[0].tokens
    with AttentionRecorder(model) as rec, torch.no_grad():
        model(wrap(clip))
        model.see(clip[0])  # no clip, but four images
    assert rec.maps[0].tokens.grid_size == (2, 2)


class OwnStem(nn.Module):
    """Cuts patches by itself, with words of its own that a layer of einops has, too."""

    def __init__(self, pattern: Any, axes_lengths: Any) -> None:
        super().__init__()
        self.pattern, self.axes_lengths, self.embed = pattern, axes_lengths, nn.Linear(3 * 64, 8)

    def forward(self, x: Tensor) -> Tensor:
        patches = x.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 1, 4, 5)
        return self.embed(patches.flatten(3).flatten(1, 2))  # type: ignore[no-any-return]


@pytest.mark.parametrize("told", [(5, None), (torch.zeros(2), {}), ("(h p) (w q) ->", 8), ("(h p) (w q)", {"p": 4, "q": 4})])
def test_words_of_a_stem_that_are_no_pattern_are_not_taken_for_one(told: tuple[Any, Any]) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.to_patch_embedding, self.attn = OwnStem(*told), nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            x = self.to_patch_embedding(x)
            return self.attn(x, x, x)[0]  # type: ignore[no-any-return]

    model = Model().eval()
    with AttentionRecorder(model) as rec, torch.no_grad():
        model(torch.randn(1, 3, 32, 32))
    assert rec.maps[0].tokens.grid_size == (4, 4)
