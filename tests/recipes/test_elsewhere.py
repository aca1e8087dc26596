"""Models outside timm: all maps are found, are those the model formed, and lie where the image says."""

from __future__ import annotations

import importlib

import pytest
import torch
from support.elsewhere import CASES, alike, made, tensors, without_flex
from support.inside import find_recipe, list_recipes
from support.oracle import formed

from hookattn import AttentionRecorder, UnreadableError
from hookattn.testing import check_recipe


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore")
def test_every_map_of_the_model_is_found_and_is_the_one_that_was_formed(name: str) -> None:
    model, case = made(name)
    with torch.no_grad():
        torch.manual_seed(0)
        before = tensors(model(*case.inputs, **case.named))
    torch.manual_seed(0)
    with AttentionRecorder(model) as rec, torch.no_grad():
        recorded = tensors(model(*case.inputs, **case.named))
    assert alike(before, recorded)
    torch.manual_seed(0)
    with formed() as expected, without_flex(name):
        model(*case.inputs, **case.named)
    assert len(rec.maps) == case.maps == len(expected)
    for m, own in zip(rec.maps.values(), expected):
        if case.axes is not None:
            own = own.movedim(case.axes.split().index("w"), 1).flatten(0, 1)
        torch.testing.assert_close(m[...], own.reshape(m.shape).float(), rtol=0, atol=1e-5)
    if "vit_nd" not in name:
        assert rec.verify() < 1e-3
        return
    with pytest.raises(UnreadableError, match="nothing in its forward to put a map into"):  # a kernel of its own
        rec.verify()


EAGER = [name for name in CASES if name.endswith(", sdpa")]


@pytest.mark.parametrize("name", EAGER)
@pytest.mark.filterwarnings("ignore")
def test_maps_under_sdpa_are_those_that_transformers_gives_without_it(name: str) -> None:
    model, case = made(name)
    config = type(model.config)(**{**model.config.to_dict(), "attn_implementation": "eager"})
    eager = type(model)._from_config(config, attn_implementation="eager").eval()
    eager.load_state_dict(model.state_dict())
    torch.manual_seed(0)
    with AttentionRecorder(model.double()) as rec, torch.no_grad():
        model(**{**case.named, "pixel_values": case.named["pixel_values"].double()})
    torch.manual_seed(0)
    with torch.no_grad():
        out = eager.double()(**{**case.named, "pixel_values": case.named["pixel_values"].double(), "output_attentions": True})
    given = [own for own in out.attentions if own is not None]
    maps = rec.maps[1::2] if name.startswith("transformers SwinModel") else rec.maps[:]  # Swin gives the last of each stage
    assert len(maps) >= len(given) >= 2
    for m, own in zip(maps, given):
        torch.testing.assert_close(m[...], own.reshape(m.shape), rtol=0, atol=1e-6)  # their softmax is in float32


# Ways to call


@pytest.mark.parametrize("name", ["transformers Dinov2WithRegistersModel, sdpa", "transformers CLIPModel", "open_clip CLIP"])
@pytest.mark.filterwarnings("ignore")
def test_maps_kept_while_the_model_runs_are_the_same(name: str) -> None:
    model, case = made(name)
    with AttentionRecorder(model) as late, torch.no_grad():
        model(*case.inputs, **case.named)
    with AttentionRecorder(model, keep="maps") as kept, torch.no_grad():
        model(*case.inputs, **case.named)
    assert list(late.maps) == list(kept.maps)
    for a, b in zip(late.maps.values(), kept.maps.values()):
        assert torch.equal(a[...], b[...])


@pytest.mark.parametrize(
    "name", ["torchvision swin", "transformers DINOv3ViTModel, sdpa", "open_clip visual", "vit_pytorch vit"]
)
@pytest.mark.filterwarnings("ignore")
def test_autocast_changes_neither_output_nor_precision(name: str) -> None:
    model, case = made(name)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        before = tensors(model(*case.inputs, **case.named))
        with AttentionRecorder(model) as rec:
            assert alike(before, tensors(model(*case.inputs, **case.named)))
    with AttentionRecorder(model) as exact, torch.no_grad():
        model(*case.inputs, **case.named)
    m = rec.maps[0]
    assert m.dtype == torch.float32
    torch.testing.assert_close(m[...].sum(-1), torch.ones(m.shape[:-1]))
    torch.testing.assert_close(m[...], exact.maps[0][...], rtol=0, atol=0.1)
    rec.verify()


# Encoders of transformers that have a recipe


@pytest.mark.parametrize("name", [name for name in list_recipes() if name.startswith("transformers.")])
def test_encoders_of_transformers_are_read_by_recipe(name: str) -> None:
    """In float64; their own softmax would be in float32."""
    pytest.importorskip("transformers")
    place, _, cls = name.rpartition(".")
    try:
        module = importlib.import_module(place)
        attention = getattr(module, cls)
    except (ImportError, AttributeError):
        pytest.skip(f"this version of transformers has no {cls}")
    kind = max((name for name in vars(module) if name.endswith("Config") and name != "PreTrainedConfig"), key=len)
    config = getattr(module, kind)(hidden_size=32, num_attention_heads=4)
    config._attn_implementation = "sdpa"
    built, version = attention(config), importlib.import_module("transformers").__version__
    if version.startswith("4.") and not (hasattr(built, "is_causal") and find_recipe(built)):
        pytest.skip(f"{cls} of transformers 4 is run again, or what it holds is read")
    check_recipe(built, torch.randn(2, 9, 32))


def test_what_a_recipe_does_not_describe_is_run_again() -> None:
    """Masks of text towers."""
    model, case = made("transformers CLIPModel")
    name = "text_model.encoder.layers.0.self_attn"
    assert find_recipe(model.get_submodule(name)) is not None
    for options in ({}, {"keep": "maps"}):
        with AttentionRecorder(model, name, **options) as rec, torch.no_grad():
            model(*case.inputs, **case.named)
        m = rec.maps[0]
        assert m.shape == tuple(m[...].shape)
        assert torch.equal(m[...], m[...].tril())
    with pytest.raises(UnreadableError, match="does not describe"):
        check_recipe(model.get_submodule(name), torch.randn(2, 5, 32), attention_mask=torch.zeros(2, 1, 5, 5))
