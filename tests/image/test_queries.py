"""Queries that are no patches, and keys that are fewer than there were."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import timm
import torch
from einops import rearrange
from support.image import DAVIT, VIT, build
from support.models import small, tiny
from support.reading import record
from torch import Tensor, nn

from hookattn import TokenError


class Dropping(nn.Module):
    """Attention that is handed fewer tokens than there are."""

    def __init__(self, attention: nn.Module, tokens: int) -> None:
        super().__init__()
        self.attention, self.tokens = attention, tokens

    def forward(self, x: Tensor, *args: Any, **options: Any) -> Tensor:
        return torch.cat((self.attention(x[:, : x.shape[1] - self.tokens]), x[:, x.shape[1] - self.tokens :]), dim=1)


@pytest.mark.parametrize("name", ["vit", "vit_registers", "deit_distilled", "beit_shared", "eva_no_rope", "parallel_things"])
def test_dropped_tokens_are_not_taken_for_a_grid_without_prefix(name: str) -> None:
    model, x = tiny(name)
    model(x)
    attention = next(n for n, m in model.named_modules() if n.endswith("attn"))
    holder, _, child = attention.rpartition(".")
    prefix = model.num_prefix_tokens
    setattr(model.get_submodule(holder), child, Dropping(model.get_submodule(attention), prefix))
    m = record(model, x, layers=f"{attention}.attention").maps[0]
    assert m.shape[3] == 16
    with pytest.raises(TokenError, match=rf"16 tokens are no grid of patches over .* with {prefix} prefix tokens"):
        m.image("mean")


def choose_a_quarter(block: nn.Module) -> None:
    """Hand a block its class token and a quarter of its patches, those of the largest norm, as pruning and merging do."""
    forward = block.forward

    def pruned(x: Tensor, *args: Any, **options: Any) -> Any:
        patches = x[:, 1:]
        kept = patches.norm(dim=-1).topk(patches.shape[1] // 4).indices
        x = torch.cat((x[:, :1], patches.gather(1, kept[..., None].expand(-1, -1, x.shape[-1]))), dim=1)
        return forward(x, *args, **options)

    block.forward = pruned


def pruned_models() -> dict[str, tuple[nn.Module, nn.Module]]:
    """Models without a pyramid, each with its second block."""
    from_timm = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2)
    found = {"timm": (from_timm, from_timm.blocks[1])}
    if has("torchvision"):
        from torchvision.models import VisionTransformer

        vit = VisionTransformer(64, 16, 2, 2, 32, 32)
        found["torchvision"] = vit, vit.encoder.layers[1]
    if has("transformers"):
        from transformers import ViTConfig, ViTModel

        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
        model = ViTModel(ViTConfig(**sizes, image_size=64))
        found["transformers"] = model, model.layers[1] if hasattr(model, "layers") else model.encoder.layer[1]
    return found


def has(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


@pytest.mark.parametrize("mixes", [False, True])
@pytest.mark.parametrize("library", pruned_models())
@pytest.mark.filterwarnings("ignore")
def test_patches_that_were_chosen_are_not_taken_for_a_coarser_grid(library: str, mixes: bool) -> None:
    model, block = pruned_models()[library]
    if mixes:
        model.mix = nn.Conv2d(8, 8, 3, padding=1)  # which leaves a grid as it is
    choose_a_quarter(block)
    model.eval()
    maps = record(model, torch.randn(2, 3, 64, 64)).maps
    assert [m.shape[-1] for m in maps.values()] == [17, 5]
    assert maps[0].tokens.grid_size == (4, 4)
    with pytest.raises(TokenError, match="5 tokens are no grid of patches over an image of 64 x 64 pixels"):
        maps[1].image("mean")


def test_tokens_of_vit_pytorch_that_were_merged_are_not_taken_for_a_coarser_grid() -> None:
    merging = pytest.importorskip("vit_pytorch.vit_with_patch_merger")
    sizes = {"image_size": 64, "patch_size": 16, "num_classes": 2, "dim": 32, "depth": 2, "heads": 2, "mlp_dim": 32}
    maps = record(merging.ViT(**sizes, patch_merge_layer=1, patch_merge_num_tokens=4), torch.randn(2, 3, 64, 64)).maps
    with pytest.raises(TokenError, match="4 tokens are no grid"):
        maps["transformer.layers.1.0"].image("mean")


class Joining(nn.Module):
    """Two stages, between which four tokens become a wider one, by a reshape."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed, self.join = nn.Conv2d(3, 16, 8, 8), nn.Linear(64, 32)
        self.first = nn.MultiheadAttention(16, 2, batch_first=True)
        self.second = nn.MultiheadAttention(32, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = rearrange(self.patch_embed(x), "b c h w -> b (h w) c")
        x = self.first(x, x, x)[0]
        x = self.join(rearrange(x, "b (h i w j) c -> b (h w) (i j c)", h=4, i=2, j=2))
        return self.second(x, x, x)[0]  # type: ignore[no-any-return]


def test_stages_that_join_tokens_by_a_reshape_still_lie_on_a_coarser_grid() -> None:
    maps = record(Joining(), torch.randn(2, 3, 64, 64)).maps
    assert [m.tokens.grid_size for m in maps.values()] == [(8, 8), (4, 4)]


@pytest.mark.parametrize(("rate", "left"), [(0.4375, 9), (0.75, 4)])
def test_patch_dropout_leaves_no_grid(rate: float, left: int) -> None:
    """Not even where a square is left, or the patches that a coarser grid would have."""
    model, x = tiny("vit", patch_drop_rate=rate)
    model.train()
    m = record(model, x).maps[0]
    assert m.shape[3] == 1 + left
    with pytest.raises(TokenError, match=f"{1 + left} tokens are no grid of patches over an image of 64 x 64 pixels"):
        m.image("cls")


def test_a_class_token_between_branches_looks_at_the_patches_of_the_other() -> None:
    rec = record(build("crossvit_tiny_240", img_size=(120, 240), depth=[[1, 1, 0]]), torch.randn(2, 3, 120, 240).double())
    sizes = {name: m.tokens.grid_size for name, m in rec.maps.items()}
    assert sizes == {
        "blocks.0.blocks.0.0.attn": (10, 20),
        "blocks.0.blocks.1.0.attn": (7, 14),
        "blocks.0.fusion.0.attn": (7, 14),
        "blocks.0.fusion.1.attn": (10, 20),
    }
    m = rec.maps["blocks.0.fusion.1.attn"]
    assert m.query_tokens.prefix == m.tokens.prefix == ("cls",)
    torch.testing.assert_close(m.image("cls"), m[:, :, 0, 1:].mean(1).reshape(2, 10, 20))


def test_a_crop_of_the_image_lies_nowhere() -> None:
    model = build("crossvit_tiny_240", img_size=120, depth=[[1, 1, 0]], crop_scale=True)
    rec = record(model, torch.randn(2, 3, 120, 120).double())
    assert rec.maps["blocks.0.blocks.0.0.attn"].image("cls").shape == (2, 10, 10)
    for name in ("blocks.0.blocks.1.0.attn", "blocks.0.fusion.0.attn"):
        with pytest.raises(TokenError, match="112 x 112 pixels that were cropped out"):
            rec.maps[name].image("cls")


@pytest.mark.parametrize("name", ["xcit_nano_12_p16_224", "cait_xxs24_224"])
def test_class_attention_looks_at_all_patches(name: str) -> None:
    model = build(name, img_size=(64, 96), depth=1)
    m = record(model, torch.randn(2, 3, 64, 96).double()).maps[-1]
    assert (m.query_tokens.prefix, m.tokens.prefix, m.tokens.grid_size) == (("cls",), ("cls",), (4, 6))
    torch.testing.assert_close(m.image("cls"), m[:, :, 0, 1:].mean(1).reshape(2, 4, 6))


@pytest.mark.parametrize(("class_token", "first"), [(True, "cls"), (False, "pool")])
def test_attention_pooling_of_features_has_one_token_more(class_token: bool, first: str) -> None:
    options = {"in_features": 32, "feat_size": (4, 4), "head_dim": 16, "class_token": class_token}
    m = record(build("timm.layers.attention_pool2d.AttentionPool2d", **options), torch.randn(2, 32, 4, 4).double()).maps[0]
    assert m.tokens.prefix == (first,)
    torch.testing.assert_close(m.image(first), m[:, :, 0, 1:].mean(1).reshape(2, 4, 4))
    torch.testing.assert_close(m.image((2, 3)), m[:, :, 12, 1:].mean(1).reshape(2, 4, 4))


@pytest.mark.parametrize("include", [True, False])
def test_a_latent_pools_the_prefix_tokens_if_the_model_says_so(include: bool) -> None:
    options = {"img_size": (64, 96), "global_pool": "map", "class_token": False, "reg_tokens": 2}
    model = build("vit_tiny_patch16_224", **VIT, **options, pool_include_prefix=include)
    m = record(model, torch.randn(2, 3, 64, 96).double()).maps["attn_pool"]
    assert m.tokens.prefix == (("reg0", "reg1") if include else ())
    assert m.query_tokens.prefix == ("latent0",)
    torch.testing.assert_close(m.image("latent0"), m[:, :, 0, 2 * include :].mean(1).reshape(2, 4, 6))


@pytest.mark.parametrize(
    ("name", "options", "attention"),
    [
        ("xcit_nano_12_p16_224", {"img_size": 64, "depth": 1}, "blocks.0.attn"),
        ("davit_tiny", DAVIT, "stages.0.blocks.0.1.attn"),
        ("edgenext_xx_small", {}, "stages.1.blocks.1.xca"),
    ],
)
def test_channels_lie_nowhere(name: str, options: dict[str, Any], attention: str) -> None:
    m = record(build(name, **options), torch.randn(2, 3, 64, 64).double(), layers=attention).maps[0]
    assert m.axes == ("batch", "head", "channel", "channel")
    with pytest.raises(TokenError, match="from channels to channels"):
        m.image("mean")


def test_a_pooling_latent_looks_at_patches_and_is_no_token_itself() -> None:
    model, x = small("vit_base_patch16_siglip_224", depth=1, embed_dim=48, num_heads=3)
    m = record(model, x).maps["attn_pool"]
    assert m.shape == (2, 3, 1, 16)
    assert m.tokens.prefix == ()
    assert m.tokens.grid_size == (4, 4)
    expected = m[...][:, :, 0].reshape(2, 3, 4, 4)
    for query in ("mean", 0, -1):
        torch.testing.assert_close(m.image(query, heads=None), expected)
    for query in ("cls", (0, 0), 1, -2):
        with pytest.raises(TokenError, match=r"not among the queries: this map has 1.*16 tokens.*query='mean'.*i from 0 to 0"):
            m.image(query)


def test_class_attention_has_the_class_token_as_its_only_query() -> None:
    model, x = small("cait_xxs24_224", depth=2)
    rec = record(model, x)
    among_patches, of_class = rec.maps["blocks.0.attn"], rec.maps["blocks_token_only.0.attn"]
    assert among_patches.shape == (2, 4, 16, 16)
    assert among_patches.tokens.prefix == ()
    assert of_class.shape == (2, 4, 1, 17)
    assert of_class.tokens.prefix == ("cls",)
    expected = of_class[...][:, :, 0, 1:].reshape(2, 4, 4, 4)
    for query in ("cls", "mean", 0):
        torch.testing.assert_close(of_class.image(query, heads=None), expected)
    with pytest.raises(TokenError, match="not among the queries: this map has 1"):
        of_class.image((0, 0))
    with pytest.raises(TokenError, match="no 'cls' token"):
        among_patches.image("cls")
    torch.testing.assert_close(among_patches.image((1, 2)), among_patches[...][:, :, 6].mean(1).reshape(2, 4, 4))


class _Halves(nn.Module):
    """Attention of one's own that sees the left and the right half of the tokens apart, and nobody knows."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        return self.attention(x.unflatten(1, (2, -1)).flatten(0, 1), **options).unflatten(0, (-1, 2)).flatten(1, 2)


def test_windows_of_an_unknown_kind_lie_nowhere_and_the_message_says_so() -> None:
    model, x = tiny("vit", class_token=False, global_pool="avg")
    for block in model.blocks:
        block.attn = _Halves(block.attn)
    m = record(model, x).maps[0]
    assert m.shape == (4, 3, 8, 8)
    assert m.axes == ("sequence", "head", "query", "key")
    for reading in (lambda: m.tokens, m.image, lambda: m.image(0)):
        with pytest.raises(TokenError, match=r"sees 2 images as 4 pieces \(windows"):
            reading()
