"""Data sets of a hub: the images, names and labels that a folder of them has, in the commit that a run was begun with."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest
import timm
import zarr
from support.hub import Client, Hub, serving
from support.sources import CLASSES, IMAGES, LABELS, dataset_of, in_folder, in_shards, write_tar
from support.stores import everything, same

NAMES, HASHES = list(IMAGES), [hashlib.sha256(data).hexdigest() for data in IMAGES.values()]
BROKEN = 9
README = """---
configs:
- config_name: big
  data_files:
  - {split: train, path: big/train-*}
  - {split: test, path: big/test-*}
- config_name: small
  data_files:
  - {split: train, path: small/train-*}
  - {split: test, path: small/test-*}
---
"""


def in_configs(root: Path) -> Path:
    """Tables of two configurations, of two splits each."""
    for config, names in (("big", NAMES), ("small", NAMES[:5])):
        (root / config).mkdir(parents=True)
        for split, part in (("train", names), ("test", names[-2:])):
            dataset_of(part).to_parquet(root / config / f"{split}-00000-of-00001.parquet")
    (root / "README.md").write_text(README)
    return root


def in_webdataset(root: Path) -> Path:
    """Two archives; `datasets` wants images of one kind, and classes by number."""
    root.mkdir()
    names = [name for name in NAMES if name.endswith("png")]
    for n in range(2):
        members = {}
        for name in names[n::2]:
            members |= {name: IMAGES[name], name.replace("png", "cls"): str(CLASSES.index(name.split("/")[0])).encode()}
        with open(root / f"train-{n:03}.tar", "wb") as file:
            write_tar(file, members)
    return root


def with_rows(root: Path, images: dict[str, bytes]) -> Path:
    """A table of one split."""
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=CLASSES)})
    rows = [{"image": {"bytes": data, "path": name}, "label": name.split("/")[0]} for name, data in images.items()]
    root.mkdir()
    datasets.Dataset.from_list(rows, features=features).to_parquet(root / "train-00000-of-00001.parquet")
    return root


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    datasets.disable_progress_bars()
    root = tmp_path_factory.mktemp("hub")
    for name in ("model", "other"):
        timm.models.save_for_hf(timm.create_model("test_vit", num_classes=0), root / name, safe_serialization=True)
    in_folder(root / "plain")
    return root


@pytest.fixture(scope="module")
def hub(folder: Path) -> Iterator[Hub]:
    with serving() as hub:
        hub.push("models", "owner/tiny", folder / "model")
        hub.push("datasets", "owner/plain", folder / "plain")
        hub.push("datasets", "owner/tables", in_configs(folder / "tables"))
        hub.push("datasets", "owner/closed", folder / "tables")
        hub.push("datasets", "owner/web", in_webdataset(folder / "web"))
        in_shards(folder / "shards")
        hub.push("datasets", "owner/shards", folder / "shards")
        hub.gated.add("owner/closed")
        yield hub


def pick(numbers: Sequence[int]) -> dict[str, Any]:
    return {
        "names": [NAMES[n] for n in numbers],
        "labels": [LABELS[n] for n in numbers],
        "hashes": [HASHES[n] for n in numbers],
    }


def test_names_labels_and_bytes_are_those_of_the_files(client: Client, hub: Hub) -> None:
    for typed, numbers in {
        "datasets:owner/plain": range(12),
        "datasets:owner/plain:train[2:5]": range(2, 5),
        "datasets:owner/tables:big:train": range(12),
        "datasets:owner/tables:small:train[:40%]": range(2),
        "datasets:owner/tables:small:test": range(3, 5),
        "hf://datasets/owner/plain": range(12),
        "hf://datasets/owner/tables/big/train-*.parquet": range(12),
    }.items():
        found = client.ask("look", typed)
        assert {name: found.get(name) for name in ("names", "labels", "hashes")} == pick(list(numbers)), (typed, found)
    web = client.ask("look", "datasets:owner/web")
    order = [n for part in (0, 1) for n in [n for n, name in enumerate(NAMES) if name.endswith("png")][part::2]]
    assert (web["names"], web["hashes"]) == (pick(order)["names"], pick(order)["hashes"])
    assert [CLASSES[int(label)] for label in web["labels"]] == pick(order)["labels"]
    shards = client.ask("look", "hf://datasets/owner/shards/photos-{000..002}.tar")
    assert (shards["labels"], shards["hashes"]) == (LABELS, HASHES)


def test_what_is_not_there_is_answered_with_what_to_type(client: Client, hub: Hub) -> None:
    log_in = "If it is gated, ask for access on its page of the hub; to be known there, type `hf auth login`, or set HF_TOKEN."
    for typed, expected in {
        "datasets:owner/none": f"'owner/none' doesn't exist on the Hub or cannot be accessed. (DatasetNotFoundError). {log_in}",
        "datasets:owner/closed:big:train": "is a gated dataset on the Hub. You must be authenticated to access it. (Data",
        "datasets:owner/tables": "Please pick one among the available configs: ['big', 'small']",
        "datasets:owner/tables:train": "type datasets:NAME:SPLIT or datasets:NAME:CONFIG:SPLIT",
        "datasets:owner/tables:bgi:train": "BuilderConfig 'bgi' not found. Available: ['big', 'small']",
        "datasets:owner/tables:big:trian": "Unknown split \"trian\". Should be one of ['train', 'test']",
        "datasets:owner/tables:big": "datasets:NAME:CONFIG:SPLIT",
        "datasets:owner/plain@v2:train": "Revision 'v2' doesn't exist for dataset 'owner/plain'",
        "datasets:owner/plain@:train": "'datasets:owner/plain@:train' is no data set: write datasets:NAME",
        "hf://datasets/owner/plain/none.tar": "there is no 'hf://datasets/owner/plain/none.tar'.",
    }.items():
        assert expected in (told := client.ask("look", typed)["error"]), told
        assert "\n" not in told
    assert "the hub has no repository" in client.refusal("extract", "datasets:owner/plain", "-m", "hf-hub:owner/none")
    told = client.ask("look", "hf://datasets/owner/closed/big/*.parquet")["error"]
    assert "big/*.parquet' cannot be read: it is gated: ask for access on its page of the hub, then type `hf auth" in told
    with hub.away():
        told = client.ask("look", "hf://datasets/owner/plain")["error"]
        assert f"lies on the hub ({hub.endpoint}), which does not answer: try again with a network" in told
        told = client.ask("look", "datasets:owner/new")["error"]
        assert f"it was not fetched before, and the hub ({hub.endpoint}) does not answer: try again with a network" in told
    assert "Retrying" not in client.said


def test_a_run_goes_on_at_the_commit_it_was_begun_with(client: Client, hub: Hub, folder: Path) -> None:
    images = {**IMAGES, NAMES[BROKEN]: b"no image"}
    old = hub.push("datasets", "owner/moves", with_rows(folder / "old", images))
    for name, data in images.items():
        (folder / "near" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "near" / name).write_bytes(data)
    given = ["-m", "hf-hub:owner/tiny", "--block", 4, "--batch", 2, "-o"]
    far, near = folder / "far.zarr", folder / "near.zarr"
    assert f"{NAMES[BROKEN]} cannot be read" in client.refusal("extract", "datasets:owner/moves", "--strict", *given, far)

    new = hub.push("datasets", "owner/moves", with_rows(folder / "new", {**images, NAMES[0]: IMAGES[NAMES[1]]}))
    told = client.refusal("extract", "datasets:owner/moves", *given, far)
    assert f"images.revision: {old} | {new}" in told
    assert f"The data set has moved on: datasets:NAME@{old} is what it was." in told
    told = client.run("extract", f"datasets:owner/moves@{old}", *given, far)
    assert (told["images"], told["resumed"], list(told["left_out"])) == (12, 8, [NAMES[BROKEN]])

    client.run("extract", folder / "near", "-m", f"local-dir:{folder / 'model'}", *given[2:], near)
    assert same(everything(far), everything(near))
    facts, others = (zarr.open_group(each, mode="r").attrs["hookattn"] for each in (far, near))
    assert facts["run"]["model"]["name"] == "hf-hub:owner/tiny"
    assert facts["run"]["model"]["weights"] == others["run"]["model"]["weights"]
    assert facts["run"]["images"] == {**others["run"]["images"], "revision": old}
    assert facts["source"]["paths"] == [f"datasets:owner/moves@{old}"]
    shown = client.ask("run", *map(str, ("show", far, "--image", NAMES[0], "-o", folder / "shown.png")))
    assert shown[0] == 0
    assert "without the photo" not in shown[1]  # which main has no more

    assert facts["model_revision"] == (kept := hub.head("models", "owner/tiny"))
    hub.push("models", "owner/tiny", folder / "other")
    typed = ["extract", f"datasets:owner/moves@{old}", "-m"]
    assert "There | asked for now: model.weights: " in client.refusal(*typed, "hf-hub:owner/tiny", *given[2:], far)
    assert client.run(*typed, f"hf-hub:owner/tiny@{kept}", *given[2:], far)["resumed"] == 12

    with hub.away():  # of what was fetched, the package takes the last
        found = client.ask("look", "datasets:owner/moves")
        assert found["address"] == f"datasets:owner/moves@{new}"
        told = client.ask("look", f"datasets:owner/moves@{old}")["error"]
        assert f"was fetched last at {new}, not at '{old}': type datasets:owner/moves@{new}, or try again" in told
