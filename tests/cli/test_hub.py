"""Models of a hub: their own weights, or one line that says what to type; nothing is waited for that does not answer."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import open_clip
import pytest
import timm
import torch
import transformers
import zarr
from open_clip.push_to_hf_hub import save_for_hf
from PIL import Image
from safetensors.torch import load_file, save_file
from support.hub import Client, Hub, serving

CLIP = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 48, "layers": 2, "width": 64, "patch_size": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1},
}
# how each library is told of a repository, and of a folder
NAMED = {"timm": "hf-hub:", "vit": "transformers:", "clip": "open_clip:hf-hub:"}
HERE = {"timm": "local-dir:", "vit": "transformers:", "clip": "open_clip:local-dir:"}
# a repository that is none of its kind
OTHERS = {
    "hf-hub:": ("owner/bare", "its repository has no config.json: is it one of another library"),
    "transformers:": ("owner/bare", "Unrecognized model in owner/bare"),
    "open_clip:hf-hub:": ("owner/vit", "its repository has no open_clip_config.json: is it one of another library"),
}


def save_models(root: Path) -> None:
    """A model of each library, as it saves them; and one of open_clip without its weights."""
    torch.manual_seed(0)
    timm.models.save_for_hf(timm.create_model("test_vit", num_classes=0), root / "timm", safe_serialization=True)
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=48, patch_size=16
    )
    transformers.ViTModel(config).save_pretrained(root / "vit")
    transformers.ViTImageProcessor(size={"height": 48, "width": 48}).save_pretrained(root / "vit")
    clip = open_clip.model.CLIP(**CLIP)
    open_clip.model.set_model_preprocess_cfg(clip, {"size": 48, "mean": (0.5,) * 3, "std": (0.5,) * 3})
    tokenizer = SimpleNamespace(save_pretrained=lambda folder: None)
    save_for_hf(clip, tokenizer, CLIP, root / "clip", safe_serialization=True)
    (root / "bare").mkdir()
    (root / "bare/open_clip_config.json").write_bytes((root / "clip/open_clip_config.json").read_bytes())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("hub")
    save_models(root)
    Image.linear_gradient("L").convert("RGB").resize((80, 60)).save(root / "photo.png")
    return root


@pytest.fixture(scope="module")
def hub(folder: Path) -> Iterator[Hub]:
    with serving() as hub:
        for each in (*NAMED, "bare"):
            hub.push("models", f"owner/{each}", folder / each)
        hub.push("models", "owner/closed", folder / "timm")
        hub.gated.add("owner/closed")
        yield hub


@pytest.mark.parametrize("kind", NAMED)
def test_a_model_of_the_hub_gives_the_maps_of_its_weights(kind: str, hub: Hub, client: Client, folder: Path) -> None:
    typed = {"far": f"{NAMED[kind]}owner/{kind}", "near": f"{HERE[kind]}{folder / kind}"}
    for where, name in typed.items():
        client.run("record", folder / "photo.png", "-m", name, "-o", folder / f"{where}.safetensors")
    far, near = (load_file(folder / f"{where}.safetensors") for where in typed)
    assert len(far) >= 2
    assert far.keys() == near.keys()
    assert all(torch.equal(far[name], near[name]) for name in far)
    store = folder / f"{kind}.zarr"
    client.run("extract", folder / "photo.png", "-m", typed["far"], "--what", "entropy", "--workers", 0, "-o", store)
    assert zarr.open_group(store, mode="r").attrs["hookattn"]["model_revision"] == hub.head("models", f"owner/{kind}")
    with hub.away():  # it was fetched before
        client.run("record", folder / "photo.png", "-m", typed["far"], "-o", folder / "again.safetensors")
    assert load_file(folder / "again.safetensors").keys() == far.keys()
    assert "Retrying" not in client.said


@pytest.mark.parametrize("prefix", NAMED.values())
def test_what_the_hub_does_not_give_is_answered_with_what_to_type(prefix: str, hub: Hub, client: Client, folder: Path) -> None:
    def refusal(name: str) -> str:
        return client.refusal("record", folder / "photo.png", "-m", prefix + name, "-o", folder / "out.png")

    assert f"the weights of {prefix}owner/none could not be fetched: the hub has no repo" in (told := refusal("owner/none"))
    assert "check the name; if it is a private one, type `hf auth login`, or set HF_TOKEN" in told
    assert f"--model {prefix}owner/none --checkpoint FILE" in told
    assert "it is gated: ask for access on its page of the hub, then type `hf auth login`" in refusal("owner/closed")
    assert "Repo id must be in the form" in refusal("a/b/c")
    assert OTHERS[prefix][1] in refusal(OTHERS[prefix][0])
    if prefix == "hf-hub:":
        assert "it is no model of timm; one of transformers is --model transformers:owner/vit" in refusal("owner/vit")
    elif prefix == "transformers:":
        assert "it is a model of timm, --model hf-hub:owner/timm" in refusal("owner/timm")
    assert "the config of" in client.refusal("inspect", f"{prefix}owner/none")
    with hub.away():
        hub.asked.clear()
        assert f"was not fetched before, and the hub ({hub.endpoint}) does not answer: try again with" in refusal("owner/new")
        assert "the hub (" in client.refusal("inspect", f"{prefix}owner/new")
    assert "Retrying" not in client.said
    assert not (folder / "out.png").exists()


@pytest.mark.parametrize("kind", ["timm", "vit"])
def test_a_model_is_asked_for_at_a_commit(kind: str, hub: Hub, client: Client, folder: Path) -> None:
    moved = folder / f"moved {kind}"
    shutil.copytree(folder / kind, moved)
    state = {key: value * 2 for key, value in load_file(moved / "model.safetensors").items()}
    save_file(state, moved / "model.safetensors", {"format": "pt"})
    old = hub.push("models", f"owner/moving-{kind}", folder / kind)
    hub.push("models", f"owner/moving-{kind}", moved)
    name = f"{NAMED[kind]}owner/moving-{kind}@{old}"
    found = {}
    for where, typed in {"kept": name, "near": f"{HERE[kind]}{folder / kind}"}.items():
        client.run("record", folder / "photo.png", "-m", typed, "-o", folder / f"{where}.safetensors")
        found[where] = load_file(folder / f"{where}.safetensors")
    assert all(torch.equal(found["kept"][each], found["near"][each]) for each in found["near"])
    store = folder / f"moving {kind}.zarr"
    client.run("extract", folder / "photo.png", "-m", name, "--what", "entropy", "--workers", 0, "-o", store)
    facts = zarr.open_group(store, mode="r").attrs["hookattn"]
    assert (facts["run"]["model"]["name"], facts["model_revision"]) == (name.partition("@")[0], old)
    assert client.ask("run", "inspect", name)[0] == 0
    assert "branch, tag or commit: check what follows the @" in client.refusal("inspect", name[:-40] + "0" * 40)


def test_open_clip_makes_up_no_weights(client: Client, folder: Path) -> None:
    for name in ("hf-hub:owner/bare", f"local-dir:{folder / 'bare'}"):
        told = client.refusal("record", folder / "photo.png", "-m", f"open_clip:{name}", "-o", folder / "out.png")
        assert f"Required pretrained weights (`model_name='{name}'" in told


def test_a_file_of_weights_needs_the_config_of_the_hub_alone(hub: Hub, client: Client, folder: Path) -> None:
    hub.asked.clear()
    weights = folder / "timm/model.safetensors"
    given = ["record", folder / "photo.png", "-c", weights, "-o", folder / "out.safetensors", "-m"]
    client.run(*given, "hf-hub:owner/timm")
    assert not any("model.safetensors" in each for each in hub.asked)
    assert "the hub has no repository of this name" in client.refusal(*given, "hf-hub:owner/none")


def test_offline_only_what_was_fetched_is_there(hub: Hub, client: Client, folder: Path) -> None:
    (folder / "photos").mkdir()
    (folder / "photos/photo.png").write_bytes((folder / "photo.png").read_bytes())
    commit = hub.push("datasets", "owner/photos", folder / "photos")
    record = ["record", folder / "photo.png", "-m", "hf-hub:owner/timm", "-o"]
    client.run(*record, folder / "on.safetensors")
    photos = client.ask("look", "datasets:owner/photos")
    offline = Client(hub, folder / "home", HF_HUB_OFFLINE="1")
    hub.asked.clear()
    offline.run(*record, folder / "off.safetensors")
    assert load_file(folder / "on.safetensors").keys() == load_file(folder / "off.safetensors").keys()
    assert offline.ask("look", "datasets:owner/photos") == photos
    assert photos["address"] == f"datasets:owner/photos@{commit}"
    for told in (offline.refusal(*record[:3], "hf-hub:owner/new"), offline.ask("look", "datasets:owner/new")["error"]):
        assert "it was not fetched before, and HF_HUB_OFFLINE is set: unset it to fetch it" in told
    told = offline.ask("look", "hf://datasets/owner/photos")["error"]
    assert "'hf://datasets/owner/photos' lies on the hub, and HF_HUB_OFFLINE is set: unset it, or type datasets:" in told
    offline.close()
    assert not hub.asked
