"""Models from elsewhere: loaded from folders, each with its own preprocessing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import timm
import torch
import transformers
from PIL import Image
from support.inside import load_model
from typer.testing import CliRunner

from hookattn.cli.app import app
from hookattn.image import Photo


def record(*args: str | Path) -> dict[str, Any]:
    result = CliRunner().invoke(app, ["record", "--json", *map(str, args)])
    assert result.exit_code == 0, result.output
    (told,) = json.loads(result.stdout)["photos"]
    found: dict[str, Any] = told
    return found


@pytest.fixture
def smooth(tmp_path: Path) -> Path:
    """A photo without edges, which resizes alike in all libraries."""
    y, x = np.mgrid[:96, :64] / 100
    path = tmp_path / "smooth.png"
    Image.fromarray((255 * np.stack([y, x, (y + x) / 2], -1)).astype("uint8")).save(path)
    return path


@pytest.mark.parametrize("kind", ["squashed", "cropped"])
def test_a_folder_of_transformers_is_read_with_its_own_preprocessing(kind: str, tmp_path: Path, smooth: Path) -> None:
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=48, patch_size=16
    )
    model, folder = transformers.ViTModel(config).eval(), tmp_path / "vit"
    if kind == "squashed":
        processor = transformers.ViTImageProcessor(size={"height": 48, "width": 48})
    else:
        processor = transformers.CLIPImageProcessor(size={"shortest_edge": 60}, crop_size={"height": 48, "width": 48})
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    found = load_model(f"transformers:{folder}", None, None, whole=False)
    with Image.open(smooth) as image:
        expected = processor(image, return_tensors="pt")["pixel_values"][0]
    assert (Photo.open(smooth, found).tensor - expected).abs().max() < 0.1
    told = record(smooth, "-m", f"transformers:{folder}", "-o", tmp_path / "out.png")
    assert [m["shape"] for m in told["maps"]] == [[1, 2, 10, 10]] * 2
    assert told["input_size"] == [48, 48]
    assert told["moved"] < 1e-4


def test_weights_that_transformers_does_not_find_are_an_error(tmp_path: Path, smooth: Path) -> None:
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, image_size=48, patch_size=16
    )
    model, folder, weights = transformers.ViTModel(config), tmp_path / "vit", tmp_path / "weights.pth"
    state = dict(model.state_dict())
    name = next(name for name in state if "query" in name or "q_proj" in name)
    model.save_pretrained(folder, state_dict={k: v for k, v in state.items() if k != name})
    transformers.ViTImageProcessor(size={"height": 48, "width": 48}).save_pretrained(folder)
    result = CliRunner().invoke(app, ["record", str(smooth), "-m", f"transformers:{folder}", "-o", str(tmp_path / "out.png")])
    assert result.exit_code == 1
    assert f"do not fit it: 1 missing: {name}" in result.stderr
    torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}}, weights)
    found = load_model(f"transformers:{folder}", weights, None, whole=False)
    assert torch.equal(found.state_dict()[name], state[name])


def test_the_image_tower_of_open_clip_is_read_with_a_file_of_the_whole(tmp_path: Path, smooth: Path) -> None:
    clip, weights = open_clip.create_model("ViT-S-32-alt").eval(), tmp_path / "clip.pth"
    torch.save({"state_dict": {f"module.{k}": v for k, v in clip.state_dict().items()}}, weights)
    found = load_model("open_clip:ViT-S-32-alt", weights, None, whole=False)
    shown = Photo.open(smooth, found)
    told = open_clip.get_model_preprocess_cfg(clip)
    with Image.open(smooth) as image:
        expected = open_clip.transform.image_transform_v2(open_clip.transform.PreprocessCfg(**told), is_train=False)(image)
    assert (shown.tensor - expected).abs().max() < 0.02
    with torch.no_grad():
        assert torch.allclose(found(shown.tensor[None]), clip.encode_image(shown.tensor[None]), atol=1e-5)
    told = record(smooth, "-m", "open_clip:ViT-S-32-alt", "-c", weights, "--layers", "-1", "-o", tmp_path / "out.png")
    assert [m["name"] for m in told["maps"]] == ["transformer.resblocks.11.attn"]


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_a_model_runs_in_the_dtype_that_was_asked_for(dtype: str, smooth: Path, weights: Path, tmp_path: Path) -> None:
    told = record(smooth, "-m", "test_vit", "-c", weights, "--dtype", dtype, "--layers", "-1", "-o", tmp_path / "out.png")
    assert told["moved"] < (1e-10 if dtype == "float64" else 0.1)


def test_several_photos_and_folders_get_a_picture_each(photo: Path, weights: Path, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ("b.jpg", "a.png", "photo.webp"):
        Image.new("RGB", (40, 40), "red").save(folder / name)
    (folder / "broken.png").write_text("no image")
    (folder / "notes.txt").write_text("no photo")
    given = ["record", str(photo), str(folder), "-m", "test_vit", "-c", str(weights), "--layers", "-1"]
    result = CliRunner().invoke(app, [*given, "--json", "-o", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert [Path(each["picture"]).name for each in told["photos"]] == ["photo.png", "a.png", "b.png", "photo-2.png"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["a.png", "b.png", "photo-2.png", "photo.png"]
    assert list(told["left_out"]) == [str(folder / "broken.png")]
    assert "broken.png is no image that can be read" in result.stderr


def test_a_folder_of_timm_keeps_its_own_preprocessing(smooth: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    config = {"mean": (0.1, 0.2, 0.3), "std": (0.5, 0.6, 0.7), "crop_pct": 1.0}
    model = timm.create_model("test_vit", pretrained_cfg_overlay=config)
    timm.models.save_for_hf(model, folder, safe_serialization=True)
    found = load_model(f"local-dir:{folder}", None, None, whole=False)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(found))
    with Image.open(smooth) as image:
        expected = transform(image)
    assert (Photo.open(smooth, found, crop="center").tensor - expected).abs().max() < 0.02
    assert torch.equal(found.get_parameter("cls_token"), model.get_parameter("cls_token"))
