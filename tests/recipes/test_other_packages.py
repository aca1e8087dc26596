"""Attention that no recipe describes: a map is the one that was formed, in the axes of the source of its module, or refused."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from support.models import randomise
from support.other_packages import CASES, formed_by_layer, image, made, numbers
from torch import Tensor, nn

from hookattn import AttentionRecorder, UnreadableError

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("name", CASES)
def test_a_map_is_the_one_that_was_formed_or_it_is_refused(name: str) -> None:
    model, case = made(name)
    with AttentionRecorder(model) as rec, torch.no_grad():
        torch.manual_seed(0)
        case.call(model)
    with formed_by_layer(model, rec.layers) as formed:
        torch.manual_seed(0)
        case.call(model)
    with AttentionRecorder(model, keep="maps") as kept, torch.no_grad():
        torch.manual_seed(0)
        case.call(model)
    skipped = [layer for layer, reason in rec.skipped.items() if "not named like attention" not in reason]  # routers, bins
    classes = {layer: type(model.get_submodule(layer.partition("#")[0])).__name__ for layer in [*rec.maps, *skipped]}
    for layer in skipped:
        with pytest.raises(UnreadableError, match=case.refused[classes[layer]]):
            rec.maps[layer][...]
    for layer, m in rec.maps.items():
        got, expected = m[...], case.axes.get(classes[layer], lambda each: each[0])(formed[layer])
        assert m.shape == got.shape == expected.shape
        torch.testing.assert_close(got, expected, rtol=0, atol=2e-5)
        assert torch.equal(kept.maps[layer][...], got)
        m.verify()
    assert Counter(classes[layer] for layer in rec.maps) == case.maps
    assert {classes[layer] for layer in skipped} == set(case.refused)


# peft: low-rank additions


class Net(nn.Module):
    """Attention of PyTorch's own between two projections."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.attn, self.outer = nn.Linear(8, 24), nn.MultiheadAttention(24, 3, batch_first=True), nn.Linear(24, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        y: Tensor = self.outer(x + self.attn(x, x, x, need_weights=False)[0])
        return y


def own_map(weight: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    """By hand, of weights with the addition in them, for three heads."""
    q, k, _ = nn.functional.linear(x, weight, bias).unflatten(-1, (3, 3, -1)).permute(2, 0, 3, 1, 4)
    return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)


@pytest.mark.parametrize("state", ["added", "merged", "unmerged"])
def test_low_rank_additions_of_timm_are_in_the_map(state: str) -> None:
    peft, timm = pytest.importorskip("peft"), pytest.importorskip("timm")
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2, embed_dim=48, num_heads=3, num_classes=4)
    model = randomise(peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["qkv", "proj"], lora_alpha=4))).eval()
    if state != "added":
        model.merge_adapter()
    if state == "unmerged":
        model.unmerge_adapter()
    seen: list[Tensor] = []
    block = model.base_model.model.blocks[1]
    block.attn.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with AttentionRecorder(model) as rec, torch.no_grad():
        model(image(64, 64))
    layer = block.attn.qkv
    base, (down, up) = layer.base_layer, (getattr(layer, f"lora_{which}")["default"].weight for which in "AB")
    weight = base.weight if state == "merged" else base.weight + 2 * up @ down
    torch.testing.assert_close(rec.maps[1][...], own_map(weight, base.bias, seen[0]), rtol=0, atol=1e-5)
    rec.verify()


@pytest.mark.parametrize("state", ["added", "merged", "unmerged"])
def test_low_rank_additions_to_torch_are_in_the_map(state: str) -> None:
    """Its wrapper merges while it runs, and takes that back: the parameter is another one during the call."""
    peft = pytest.importorskip("peft")
    model = randomise(peft.get_peft_model(Net(), peft.LoraConfig(r=2, target_modules=["attn"], lora_alpha=4))).eval()
    if state != "added":
        model.merge_adapter()
    if state == "unmerged":
        model.unmerge_adapter()
    x = numbers(2, 5, 8)
    layer, inner = model.base_model.model.attn, model.base_model.model.inner
    base, (down, up) = layer.base_layer, (getattr(layer, f"lora_{which}")["default"].weight for which in "AB")
    weight = base.in_proj_weight if state == "merged" else base.in_proj_weight + 2 * up @ down
    expected = own_map(weight, base.in_proj_bias, inner(x))
    with AttentionRecorder(model, keep="maps") as kept, torch.no_grad():
        model(x)
    torch.testing.assert_close(kept.maps[0][...], expected, rtol=0, atol=1e-5)
    with AttentionRecorder(model) as rec, torch.no_grad():
        model(x)
    names = [name for name, _ in model.named_parameters()]
    torch.testing.assert_close(rec.maps[0][...], expected, rtol=0, atol=1e-5)
    rec.verify()
    assert [name for name, _ in model.named_parameters()] == names


# what nothing names attention


def test_modules_that_form_a_map_under_another_name_are_named_with_the_layers_that_read_them() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "max_token_length": 5}
    sizes |= {"num_character_labels": 6, "num_bpe_labels": 7, "num_wordpiece_labels": 8}
    config = transformers.MgpstrConfig(image_size=[16, 32], patch_size=4, **sizes)
    model = randomise(transformers.MgpstrForSceneTextRecognition(config)).eval()
    with AttentionRecorder(model) as rec, torch.no_grad():
        model(image(16, 32))
    unnamed = ["char_a3_module", "bpe_a3_module", "wp_a3_module"]
    assert list(rec.skipped) == unnamed
    assert "MgpstrA3Module: it takes a softmax" in rec.skipped["bpe_a3_module"]
    assert "layers=[..., 'bpe_a3_module'] reads it" in rec.skipped["bpe_a3_module"]
    with AttentionRecorder(model, layers=[*rec.layers, *unnamed]) as rec, torch.no_grad():
        output = model(image(16, 32), output_a3_attentions=True)
    assert not rec.skipped
    for name, own in zip(unnamed, output.a3_attentions):
        torch.testing.assert_close(rec.maps[name][:, 0], own, rtol=0, atol=1e-6)
    rec.verify()


# rows that are the same


class HeadsThirdAttention(nn.Module):
    """Takes its softmax as (batch, queries, heads, keys)."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(12, 36)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 3, 4)).unbind(2)
        attention = (torch.einsum("bqhd,bkhd->bqhk", q, k) + mask).softmax(-1)
        return (attention.transpose(1, 2) @ v.transpose(1, 2)).transpose(1, 2).flatten(2)


def test_rows_that_were_the_same_in_one_call_are_not_mistaken_in_the_next() -> None:
    """Masks leave one key of the first call."""
    module, x = randomise(HeadsThirdAttention(), 0.3), numbers(2, 5, 12)
    for hidden in (float("-inf"), 0.0):
        mask = torch.zeros(2, 1, 1, 5)
        mask[1, ..., 1:] = hidden
        with AttentionRecorder(module) as rec, torch.no_grad():
            module(x, mask)
        q, k, _ = module.qkv(x).unflatten(-1, (3, 3, 4)).permute(2, 0, 3, 1, 4)
        torch.testing.assert_close(rec.maps[0][...], (q @ k.mT + mask).softmax(-1), rtol=0, atol=1e-5)
