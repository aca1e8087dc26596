"""The command line, run as a user runs it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file, save_model
from typer.testing import CliRunner, Result

import hookattn
from hookattn.cli import demo
from hookattn.cli.app import app


def run(*args: str | Path) -> Result:
    return CliRunner().invoke(app, [str(a) for a in args])


def is_a_picture(path: Path) -> bool:
    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert("RGB"))
    # colours as numbers, of which numpy finds the unique ones far faster than of rows
    return min(pixels.shape[:2]) > 300 and len(np.unique(pixels @ np.array([1, 2**8, 2**16]))) > 1000


def test_demo_writes_a_picture_and_verifies_every_map(tmp_path: Path) -> None:
    result = run("demo", "-o", tmp_path / "new" / "demo.png")
    assert result.exit_code == 0, result.output
    assert "scene 7 shows a ring; the model says ring" in result.output
    assert result.output.count("1 x 4 x 145 x 145") == 5
    assert is_a_picture(tmp_path / "new" / "demo.png")


def test_record_reads_any_model_from_a_file_of_weights(tmp_path: Path, photo: Path) -> None:
    weights = tmp_path / "weights.safetensors"
    save_file(timm.create_model("test_vit").state_dict(), str(weights))
    out = tmp_path / "out.png"
    result = run("record", photo, "--model", "test_vit", "--checkpoint", weights, "-o", out)
    assert result.exit_code == 0, result.output
    assert "photo.png, 120 x 90: resized to 192 x 144 (crop none)" in result.output
    assert "photo.png at 192 x 144: 6 maps of test_vit, 1 x 2 x 109 x 109" in result.output
    assert is_a_picture(out)


@pytest.mark.parametrize("query", [(), ("--query", "cls")])
def test_record_writes_the_maps_themselves(tmp_path: Path, photo: Path, query: tuple[str, ...]) -> None:
    weights = tmp_path / "weights.safetensors"
    save_file(timm.create_model("test_vit").state_dict(), str(weights))
    out = tmp_path / "new" / "maps.safetensors"
    result = run("record", photo, "--model", "test_vit", "--checkpoint", weights, "--json", "-o", out, *query)
    assert result.exit_code == 0, result.output
    assert "hookattn.load takes it" in result.output
    maps = hookattn.load(out)
    assert (maps.model, len(maps), maps[0].shape) == ("test_vit", 6, (1, 2, 109, 109))
    torch.testing.assert_close(maps[0].rows("cls").sum(-1), torch.ones(1, 2))
    if query:
        with pytest.raises(hookattn.UnreadableError, match="was saved without row 1"):
            maps[0][...]


@pytest.mark.parametrize("query", ["2,3", "-1"])
def test_record_draws_the_layers_and_the_query_that_were_asked_for(tmp_path: Path, photo: Path, query: str) -> None:
    weights = tmp_path / "weights.safetensors"
    save_file(timm.create_model("test_vit").state_dict(), str(weights))
    out = tmp_path / "out.png"
    asked = ("--layers", "blocks.[01].attn,-1", "--query", query, "--img-size", "96", "--crop", "center")
    result = run("record", photo, "-m", "test_vit", "-c", weights, *asked, "-o", out)
    assert result.exit_code == 0, result.output
    assert "its middle of 96 x 96 shown to the model (crop center)" in result.output
    assert "at 96 x 96: 3 maps of test_vit, 1 x 2 x 37 x 37" in result.output
    assert is_a_picture(out)


@pytest.mark.parametrize(
    ("args", "answers"),
    [
        ((), ["turned upright (EXIF orientation 6); resized to 144 x 192 (crop none)", "at 144 x 192", "1 x 2 x 109 x 109"]),
        (("--img-size", "64,96"), ["resized to 64 x 96; widened by 12% (crop none)", "at 64 x 96", "1 x 2 x 25 x 25"]),
    ],
)
def test_record_shows_the_whole_photo_or_says_what_it_cuts_off(
    tmp_path: Path, args: tuple[str, ...], answers: list[str]
) -> None:
    weights, photo = tmp_path / "weights.safetensors", tmp_path / "turned.jpg"
    save_file(timm.create_model("test_vit").state_dict(), str(weights))
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(demo.draw(3, 120).image[:, :90]).save(photo, exif=exif)
    result = run("record", photo, "-m", "test_vit", "-c", weights, "--layers", "-1", *args, "-o", tmp_path / "out.png")
    assert result.exit_code == 0, result.output
    assert all(answer in result.output for answer in answers), result.output
    assert is_a_picture(tmp_path / "out.png")


def test_record_says_what_a_model_does_not_take(tmp_path: Path, photo: Path) -> None:
    weights = tmp_path / "weights.safetensors"
    save_model(timm.create_model("levit_128s", num_classes=0), str(weights))
    given = ("record", photo, "-m", "levit_128s", "-c", weights, "-o", tmp_path / "out.png")
    assert "takes no images of 256 x 192" in run(*given, "--crop", "none").output
    assert "did not see the point (0.05, 0.5) of the photo" in run(*given, "--crop", "center", "--query", "0.05,0.5").output
    assert not (tmp_path / "out.png").exists()


@pytest.mark.parametrize(
    ("args", "answer"),
    [
        (("-m", "test_vit", "--img-size", "0"), "--img-size '0' is no size"),
        (("-m", "test_vit", "--img-size", "2,3,4"), "--img-size '2,3,4' is no size: a number of pixels such as 224"),
        (("-m", "test_vit", "--crop", "left"), "crop='left' is no choice"),
        (("-m", "test_vitt"), "timm has no model 'test_vitt'. Did you mean test_vit"),
        (("-m", "test_vit", "-q", "x"), "No such option"),
        (("-m", "test_vit", "--query", "clss"), "there is no 'clss' token. There is: query='cls'"),
        (("-m", "test_vit", "--query", "40,2"), "there is no patch (40, 2)"),
        (("-m", "test_vit", "--layers", "blocks.9"), "no attention module is called 'blocks.9'. Did you mean"),
        (
            (
                "-m",
                "test_resnet",
            ),
            "ResNet ran and was watched: none of its modules called",
        ),
    ],
)
def test_record_says_what_is_wrong(tmp_path: Path, photo: Path, args: tuple[str, ...], answer: str) -> None:
    weights = tmp_path / "weights.safetensors"
    save_file(timm.create_model("test_resnet" if "test_resnet" in args else "test_vit").state_dict(), str(weights))
    result = run("record", photo, *args, "-c", weights, "-o", tmp_path / "out.png")
    assert result.exit_code != 0
    assert answer in result.output
    assert not (tmp_path / "out.png").exists()


def test_record_says_what_to_do_without_the_hub(photo: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub.constants as hub

    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path))
    result = run("record", photo, "--model", "vit_tiny_patch16_224")
    assert result.exit_code == 1
    assert "could not be fetched" in result.output
    assert "--checkpoint FILE" in result.output
    assert "hookattn demo" in result.output


def test_record_says_when_a_file_is_no_image(tmp_path: Path) -> None:
    path = tmp_path / "text.png"
    path.write_text("no image")
    weights = tmp_path / "weights.safetensors"
    save_file(timm.create_model("test_vit").state_dict(), str(weights))
    result = run("record", path, "-m", "test_vit", "-c", weights)
    assert result.exit_code == 1
    assert "is no image that can be read" in result.output


def test_inspect_says_who_calls_what_with_what() -> None:
    result = run("inspect", "vit_small_patch14_reg4_dinov2.lvd142m", "--batch", "16")
    assert result.exit_code == 0, result.output
    one_line = "blocks.0.attn to blocks.11.attn, 12 alike  Attention  attention  16 x 6 x 1374 x 1374  tokens"
    assert f"{one_line}  1 cls + 4 reg + 37 x 37  12 x 691.4 MiB  yes" in result.output
    assert "all maps of vit_small_patch14_reg4_dinov2.lvd142m at batch 16: 8.1 GiB in float32" in result.output
    assert "timm/models/vision_transformer.py:" in result.output
    assert "self.attn(self.norm1(x)" in result.output
    assert "blocks.11.attn: x is what blocks.11.norm1 made of the output of blocks.10" in result.output


def test_inspect_lists_what_is_replayed_and_what_is_no_map() -> None:
    result = run("inspect", "lamhalobotnet50ts_256")
    assert "stages.2.1.self_attn to stages.2.5.self_attn, 3 alike  HaloAttn" in result.output
    assert "not a map: stages.1.1.self_attn, LambdaLayer: its softmax runs over positions alone" in result.output


def test_inspect_runs_a_model_on_the_cpu_that_lies_there_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    here, make = timm.create_model("test_vit"), timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, **options: here if name == "test_vit" else make(name, **options))
    result = run("inspect", "test_vit")
    assert result.exit_code == 0, result.output
    assert "all maps of test_vit at batch 1" in result.output


def test_inspect_says_why_there_is_nothing() -> None:
    result = run("inspect", "resnet18")
    assert result.exit_code == 1
    assert "ResNet ran and was watched: none of its modules called" in result.output


def test_the_demo_model_reads_scenes_it_has_never_seen() -> None:
    model = demo.load()
    scenes = [demo.draw(seed) for seed in range(48)]
    with torch.no_grad():
        guesses = model(demo.to_input(np.stack([s.image for s in scenes]))).argmax(-1)
    assert (guesses == torch.tensor([s.label for s in scenes])).float().mean() >= 0.9


def test_a_scene_is_the_same_whenever_it_is_drawn() -> None:
    first, again, other = demo.draw(5), demo.draw(5), demo.draw(6)
    assert np.array_equal(first.image, again.image)
    assert np.array_equal(first.mask, again.mask)
    assert not np.array_equal(first.image, other.image)
    assert 0.01 < first.mask.mean() < 0.2


@pytest.mark.parametrize(
    ("model", "layers", "answer"),
    [
        ("test_vit3", "blocks.0.*,attn_pool", "2 maps of test_vit3, 1 x 3 x 109 x 109, 1 x 3 x 1 x 109"),
        (
            "xcit_nano_12_p16_224",
            "blocks.0.attn,cls_attn_blocks.*",
            "left out of the picture, no grid of patches over the whole image: blocks.0.attn",
        ),
    ],
)
def test_record_draws_what_there_is_to_draw(tmp_path: Path, photo: Path, model: str, layers: str, answer: str) -> None:
    weights = tmp_path / "weights.safetensors"
    save_model(timm.create_model(model, num_classes=0), str(weights))
    result = run("record", photo, "-m", model, "--layers", layers, "-c", weights, "-o", tmp_path / "out.png")
    assert result.exit_code == 0, result.output
    assert answer in result.output
    assert is_a_picture(tmp_path / "out.png")
