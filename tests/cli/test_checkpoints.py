"""Files of weights: what fits is loaded, whatever it is wrapped in; what does not is an error."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from support.inside import load_model
from torch import Tensor, nn
from typer.testing import CliRunner, Result

from hookattn.cli.app import app

State = dict[str, Tensor]


@pytest.fixture(scope="module")
def source() -> nn.Module:
    model: nn.Module = timm.create_model("test_vit").eval()
    return model


def prefixed(state: State, prefix: str) -> State:
    return {f"{prefix}{name}": value for name, value in state.items()}


def scaled(state: State) -> State:
    return {name: 2 * value for name, value in state.items()}


# what a file holds, by how it is told of; the right weights are those of the model, the others twice as large
WRAPPED: dict[str, Callable[[State], Any]] = {
    "as they are": lambda s: s,
    "took 'state_dict' of it": lambda s: {"state_dict": s, "epoch": 3, "args": Namespace(lr=0.1)},
    "took 'state_dict_ema' of it": lambda s: {"state_dict": scaled(s), "state_dict_ema": s},
    "took 'model_ema' of it": lambda s: {"model": scaled(s), "model_ema": s},
    "took 'model' of it, stripped 'module.' from names": lambda s: {"model": prefixed(s, "module.")},
    "took 'teacher' of it, stripped 'backbone.' from names": lambda s: {
        "student": prefixed(scaled(s), "module.backbone."),
        "teacher": prefixed(s, "backbone."),
    },
    "took 'state_dict' of it, stripped 'teacher.' from names and left out": lambda s: {
        "state_dict": {**prefixed(scaled(s), "student.backbone."), **prefixed(s, "teacher.backbone.")}
    },
    "stripped '_orig_mod.' from names, stripped 'module.' from names": lambda s: prefixed(s, "_orig_mod.module."),
    "stripped 'model.' from names, stripped 'encoder.' from names and left out 1 others": lambda s: {
        **prefixed(s, "model.encoder."),
        "model.decoder.weight": torch.zeros(2),
    },
    "not used: decoder_embed.bias": lambda s: {**s, "decoder_embed.bias": torch.zeros(1)},
}


@pytest.mark.parametrize("said", WRAPPED)
def test_weights_are_found_in_what_training_scripts_write(
    said: str, source: nn.Module, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "weights.pth"
    torch.save(WRAPPED[said](dict(source.state_dict())), path)
    model = load_model("test_vit", path, None, whole=True)
    loaded = model.state_dict()
    assert len(loaded) > 50
    for name, value in loaded.items():
        assert torch.equal(value, source.state_dict()[name]), name
    assert f"weights of weights.pth: {said}" in capsys.readouterr().out


def test_a_file_without_a_head_fits_and_position_embeddings_are_resampled(source: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file({k: v for k, v in source.state_dict().items() if not k.startswith("head")}, str(path))
    model = load_model("test_vit", path, 96, whole=False)
    assert source.get_parameter("pos_embed").shape[1] == 101
    assert model.get_parameter("pos_embed").shape[1] == 37
    assert torch.equal(model.get_parameter("cls_token"), source.get_parameter("cls_token"))


def test_names_of_the_original_files_of_dinov2_are_converted(tmp_path: Path) -> None:
    name = "vit_small_patch14_reg4_dinov2"
    model = timm.create_model(name, img_size=28, num_classes=0, depth=12)
    original = {k.replace("reg_token", "register_tokens"): v for k, v in model.state_dict().items()}
    # the original has a position for the class token, to which its own part of cls_token is added
    pos = original["pos_embed"]
    original["pos_embed"] = torch.cat([torch.zeros_like(pos[:, :1]), pos], 1)
    path = tmp_path / "dinov2.pth"
    torch.save({**original, "mask_token": torch.zeros(1, 384)}, path)
    loaded = load_model(name, path, 28, whole=False)
    assert torch.equal(loaded.get_parameter("reg_token"), model.get_parameter("reg_token"))
    assert torch.equal(loaded.get_parameter("blocks.3.attn.qkv.weight"), model.get_parameter("blocks.3.attn.qkv.weight"))


def record(photo: Path, weights: Path) -> Result:
    out = photo.with_name("out.png")
    return CliRunner().invoke(app, ["record", str(photo), "-m", "test_vit", "-c", str(weights), "-o", str(out)])


class Pickled:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("executed"),))


# what a file holds, or its bytes, and what is answered
UNFIT: dict[str, tuple[Callable[[State], Any], list[str]]] = {
    "nothing fits": (lambda s: prefixed(s, "other."), ["does not fit the model", "missing: ", "unexpected: other.cls_token"]),
    "no qkv": (
        lambda s: {k: v for k, v in s.items() if "qkv" not in k},
        ["does not fit the model: 12 missing: blocks.0.attn.qkv.weight, blocks.0.attn.qkv.bias"],
    ),
    "one missing behind a prefix": (
        lambda s: prefixed({k: v for k, v in s.items() if k != "cls_token"}, "module."),
        ["(stripped 'module.' from names): 1 missing: cls_token. Nothing was loaded"],
    ),
    "one too many": (lambda s: {**s, "blocks.6.attn.qkv.weight": torch.zeros(1)}, ["1 unexpected: blocks.6.attn.qkv.weight"]),
    "another width": (
        lambda s: {**s, "blocks.0.attn.proj.bias": torch.zeros(3)},
        ["1 of another shape: blocks.0.attn.proj.bias (3 for 64)"],
    ),
    "a pickle that runs code": (lambda s: {"state_dict": s, "more": Pickled()}, ["would run code that is in it"]),
    "a module": (lambda s: nn.Linear(2, 2), ["would run code that is in it"]),
    "a tensor": (lambda s: torch.zeros(3), ["holds no weights by name, but Tensor"]),
    "no tensors": (lambda s: {"a": 1}, ["holds no weights by name, but dict"]),
    "text": (lambda s: b"no weights at all", ["is no file of weights that can be read"]),
    "cut off": (lambda s: b"PK\x03\x04" + bytes(100), ["is no file of weights that can be read"]),
    "empty": (lambda s: b"", ["is no file of weights that can be read"]),
    "broken safetensors": (lambda s: b"\xff\x00\x00\x00\x00\x00\x00\x00{", ["is no file of weights that can be read"]),
}


@pytest.mark.parametrize("kind", UNFIT)
def test_what_does_not_fit_is_an_error_in_one_line(
    kind: str, source: nn.Module, photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make, answers = UNFIT[kind]
    held, path = make(dict(source.state_dict())), tmp_path / "weights.pth"
    path.write_bytes(held) if isinstance(held, bytes) else torch.save(held, path)
    result = record(photo, path)
    assert result.exit_code == 1, result.output
    assert result.stderr.count("\n") == 1
    assert all(answer in result.stderr for answer in answers), result.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["photo.png", "weights.pth"]


def test_a_folder_of_timm_in_which_weights_are_missing_is_an_error(source: nn.Module, photo: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    timm.models.save_for_hf(source, folder, safe_serialization=True)
    state = {k: v for k, v in source.state_dict().items() if "norm1" not in k}
    save_file(state, str(folder / "model.safetensors"))
    result = CliRunner().invoke(app, ["record", str(photo), "-m", f"local-dir:{folder}", "-o", str(tmp_path / "out.png")])
    assert result.exit_code == 1
    assert "do not fit it: 12 missing: blocks.0.norm1.weight" in result.stderr
    assert not (tmp_path / "out.png").exists()
    save_file(dict(source.state_dict()), str(folder / "model.safetensors"))
    result = CliRunner().invoke(
        app, ["record", str(photo), "-m", f"local-dir:{folder}", "--json", "-o", str(tmp_path / "out.png")]
    )
    assert result.exit_code == 0, result.output
    assert [m["shape"] for m in json.loads(result.stdout)["photos"][0]["maps"]] == [[1, 2, 109, 109]] * 6
