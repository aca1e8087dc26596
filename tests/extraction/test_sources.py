"""Where images come from: whatever holds them, it gives the same bytes in the same order, or says what is wrong with it."""

from __future__ import annotations

import io
import os
import pickle
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import datasets
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from support.inside import open_images
from support.sources import (
    IMAGES,
    LABELS,
    LOCAL,
    Parts,
    Read,
    dataset_of,
    in_folder,
    in_shards,
    in_tables,
    on_the_web,
    samples,
    table_of,
    to_memory,
    write_tar,
)
from torch.utils.data import ConcatDataset, DataLoader, RandomSampler

from hookattn import HookattnError
from hookattn.errors import MissingExtraError

BYTES, NAMES = list(IMAGES.values()), list(IMAGES)
KEYS = [f"photos-{n // 4:03}.tar/{name.split('.')[0]}" for n, name in enumerate(NAMES)]
BASES = [name.split("/")[1] for name in NAMES]
SEEN = {
    "folder": (NAMES, LABELS),
    "files": (NAMES, [""] * 12),
    "list": ([f"photos/{name}" for name in NAMES], LABELS),
    "shards": (KEYS, LABELS),
    "folder of shards": (KEYS, LABELS),
    "tables": (NAMES, LABELS),
    "table of bytes": ([f"bytes.parquet/{n}" for n in range(12)], LABELS),
    "saved": (BASES, LABELS),  # as `datasets` keeps of a path
    "saved splits": (BASES, LABELS),
    "named": (NAMES, LABELS),
}


@pytest.fixture(autouse=True)
def _keep_to_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    datasets.disable_progress_bars()


def read_all(images: Any) -> list[bytes]:
    return [images.read(n) for n in range(len(images))]


def refusal(source: Any, **options: Any) -> str:
    with pytest.raises(HookattnError) as caught:
        open_images(source, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(params=LOCAL)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_every_source_gives_the_same_images_in_the_same_order(kind: str, tmp_path: Path) -> None:
    images = open_images(LOCAL[kind](tmp_path / "x"))
    assert read_all(images) == BYTES
    assert (images.names, images.labels) == SEEN[kind]
    assert {str(Image.open(io.BytesIO(data)).mode) for data in read_all(images)} >= {"RGB", "L", "RGBA", "P", "1", "CMYK"} - {
        "L"
    }


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_workers_read_what_one_process_reads_in_any_order(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = open_images(LOCAL[kind](tmp_path / "x"))
    images.read(5)  # what is kept of it does not go along
    copy = pickle.loads(pickle.dumps(images))
    monkeypatch.chdir("/")  # nor does the folder that the process is in
    assert (copy.names, copy.labels, read_all(copy)) == (images.names, images.labels, BYTES)
    read = Read(copy)
    options: dict[str, Any] = {"batch_size": None, "num_workers": 2, "multiprocessing_context": "fork"}
    found = list(DataLoader(read, sampler=RandomSampler(read), **options))
    assert [n for n, _ in found] != list(range(12))
    assert dict(found) == dict(enumerate(BYTES))


def test_workers_that_are_started_anew_read_the_same(tmp_path: Path) -> None:
    read = ConcatDataset([Read(open_images(make(tmp_path / kind))) for kind, make in LOCAL.items()])
    found = list(DataLoader(read, batch_size=None, num_workers=1, multiprocessing_context="spawn"))
    assert [tuple(each) for each in found] == [*enumerate(BYTES)] * len(LOCAL)


@pytest.mark.parametrize("asked", ["", "/*.tar", "/photos-{000..002}.tar", "/photos-001.tar"])
def test_shards_elsewhere_are_read_in_parts(asked: str, tmp_path: Path) -> None:
    in_shards(tmp_path / "x")
    images = open_images(to_memory(tmp_path / "x", "memory://bucket/x") + asked)
    part = slice(4, 8) if "001" in asked else slice(None)
    assert (images.names, images.labels, read_all(images)) == (KEYS[part], LABELS[part], BYTES[part])


def test_tables_folders_and_lists_elsewhere_are_read(tmp_path: Path) -> None:
    in_tables(tmp_path / "x")
    tables = open_images(to_memory(tmp_path / "x", "memory://bucket/x"))
    assert (tables.names, tables.labels, read_all(pickle.loads(pickle.dumps(tables)))) == (NAMES, LABELS, BYTES)
    photos = open_images(to_memory(in_folder(tmp_path / "y"), "memory://bucket/y"))
    assert (photos.names, photos.labels, read_all(photos)) == (NAMES, LABELS, BYTES)
    fsspec.filesystem("memory").pipe("/bucket/y/notes.txt", "\n".join(NAMES).encode())
    listed = open_images("memory://bucket/y/notes.txt")
    assert (listed.names, read_all(listed)) == (NAMES, BYTES)
    (tmp_path / "far.txt").write_text("\n".join(f"memory://bucket/y/{name}\towl" for name in NAMES))
    far = open_images(tmp_path / "far.txt")
    assert far.names == [f"memory://bucket/y/{name}" for name in NAMES]
    assert (far.labels, read_all(far)) == (["owl"] * 12, BYTES)


def test_what_is_on_the_web_is_read_in_parts_where_its_server_sends_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_shards(tmp_path / "s")
    in_tables(tmp_path / "t")
    in_folder(tmp_path / "f")
    (tmp_path / "f/list.txt").write_text("\n".join(NAMES))
    with on_the_web(tmp_path) as address:
        shards = open_images(f"{address}/s/photos-{{000..002}}.tar?key=secret")
        assert (shards.names, shards.labels, read_all(shards)) == (KEYS, LABELS, BYTES)
        for typed in ("/f/", "/f/list.txt", "/t/part-{0..2}.parquet"):
            images = open_images(address + typed)
            assert (images.names, read_all(images)) == (NAMES, BYTES)
        assert open_images(f"{address}/f/{NAMES[2]}").read(0) == BYTES[2]
        monkeypatch.setattr(Parts, "sends_parts", False)
        told = f"{address}/s/photos-000.tar"
        with pytest.raises(
            HookattnError, match=r"gave 20480 bytes where .* sends no parts of files\. Open it anew, or fetch it"
        ):
            open_images(told).read(0)
        assert f"there is no '{address}/none.tar'." in refusal(f"{address}/none.tar")


ODD = [
    "a b.png",
    "x\u2028y.png",
    "\u00fc\u6f22.png",
    "line\nbreak.png",
    "[x]*?.png",
    "{1..2}.png",
    "w%20.PNG",
    'it\'s "so".png',
    "\udcff\udcfe.png",
]


def test_unusual_names_are_read_and_can_be_written_down(tmp_path: Path) -> None:
    folder = tmp_path / "odd \udcff"
    folder.mkdir()
    for n, name in enumerate(ODD):
        (folder / name).write_bytes(b"%d" % n)
    with open(tmp_path / "odd.tar", "wb") as file:
        write_tar(file, {name: b"%d" % n for n, name in enumerate(ODD)})
    (tmp_path / "odd.txt").write_bytes(b"\n".join(os.fsencode(f"{folder.name}/{n}") for n in ODD if "\n" not in n))
    told = [name.replace("\udcff\udcfe", "\\xff\\xfe") for name in ODD]
    photos = open_images(folder)
    assert dict(zip(photos.names, read_all(photos))) == {name: b"%d" % n for n, name in enumerate(told)}
    shard = open_images(tmp_path / "odd.tar")
    assert shard.names == [f"odd.tar/{name.split('.')[0] if name != '{1..2}.png' else '{1'}" for name in told]
    assert read_all(shard) == [b"%d" % n for n in range(len(ODD))]
    listed = open_images(tmp_path / "odd.txt")
    assert listed.names == ["odd \\xff/" + name for name in told if "\n" not in name]
    assert read_all(listed) == [b"%d" % n for n in range(len(ODD)) if n != ODD.index("line\nbreak.png")]
    for name in ODD:
        assert read_all(open_images(folder / name)) == [b"%d" % ODD.index(name)]


def test_what_is_given_together_is_named_from_the_folder_around_it(tmp_path: Path) -> None:
    for name in ("a/train/cat/1.png", "a/val/cat/1.png", "a/val/2.png", "c.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    (tmp_path / "a/val/more.txt").write_text("../../c.png\n2.png\tx\n")
    two = open_images(["a/train", "a/val"])
    assert (two.names, two.labels) == (["train/cat/1.png", "val/2.png", "val/cat/1.png"], ["cat", "", "cat"])
    more = open_images(["a/train", "c.png", "a/val/more.txt"])
    assert more.names == ["a/train/cat/1.png", "c.png", "../../c.png", "2.png"]
    assert more.labels == ["cat", "", "", "x"]
    assert read_all(more) == [b"a/train/cat/1.png", b"c.png", b"c.png", b"a/val/2.png"]
    assert "the name 'a/train/cat/1.png' is there twice: leave one" in refusal(["a/train", "a/train/cat/1.png", "c.png"])


def test_a_link_that_leads_nowhere_is_an_image_that_cannot_be_read(tmp_path: Path) -> None:
    in_folder(tmp_path / "x")
    (tmp_path / "x/other.txt").symlink_to("other.txt")
    targets = {"self.png": "self.png", "file.png": f"{NAMES[0]}/a.png", "long.png": "n" * 300}
    for name, target in targets.items():
        (tmp_path / "x" / name).symlink_to(target)
    images = open_images("x")
    assert {*images.names} - {*NAMES} == {*targets}
    for name in targets:
        with pytest.raises(HookattnError, match=rf"{name}' cannot be read: "):
            images.read(images.names.index(name))


def test_links_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    in_folder(tmp_path / "x")
    (tmp_path / "y").mkdir()
    (tmp_path / "y/z").symlink_to(tmp_path / "x")
    (tmp_path / "y/gone.png").symlink_to("nowhere")
    images = open_images("y")
    assert images.names == ["gone.png", *(f"z/{name}" for name in NAMES)]
    with pytest.raises(HookattnError, match=r"there is no .*gone\.png"):
        images.read(0)
    (tmp_path / "x/cat/loop").symlink_to(tmp_path / "y")
    assert "is a link to a folder around it" in refusal("y")


def test_what_cannot_be_read_stops_no_other(kind: str, tmp_path: Path) -> None:
    images = open_images(LOCAL[kind](tmp_path / "x"))
    gone = [tmp_path / "x" / "photos" / NAMES[3], tmp_path / "x" / NAMES[3], tmp_path / "x/photos-000.tar"]
    gone += [tmp_path / "x/part-0.parquet", tmp_path / "x/bytes.parquet"]
    for path in gone:
        path.unlink(missing_ok=True)
    if kind in ("saved", "saved splits", "named"):  # which are mapped into memory
        return
    with pytest.raises(HookattnError, match=r"there is no '.*x/.*' \(any more\)"):
        images.read(3)
    if kind != "table of bytes":
        assert images.read(11) == BYTES[11]


def test_a_shard_that_has_become_shorter_is_no_image(tmp_path: Path) -> None:
    images = open_images(in_shards(tmp_path / "x"))
    os.truncate(tmp_path / "x/photos-000.tar", 1100)
    with pytest.raises(HookattnError, match=r"photos-000.tar' gave \d+ bytes where \d+ were asked for"):
        images.read(0)


def test_no_cut_of_a_shard_goes_unseen(tmp_path: Path) -> None:
    file = io.BytesIO()
    write_tar(file, samples(NAMES[:2]))
    end = len(file.getvalue().rstrip(b"\0")) // 512 * 512 + 512
    for cut in [0, 100, *range(512, end + 1, 512), *range(700, end, 1024)]:
        (tmp_path / "cut.tar").write_bytes(file.getvalue()[:cut])
        assert "cut.tar' is no whole tar archive (" in refusal("cut.tar"), cut
    (tmp_path / "cut.tar").write_bytes(file.getvalue()[: end + 512])
    assert read_all(open_images("cut.tar")) == BYTES[:2]
    (tmp_path / "cut.tar").write_bytes(2 * file.getvalue())
    assert "there is more after its end" in refusal("cut.tar")
    broken = bytearray(file.getvalue())
    broken[broken.index(b"./cat/01.json")] ^= 1
    (tmp_path / "cut.tar").write_bytes(broken)
    assert "there is no end after" in refusal("cut.tar")


def test_of_samples_with_several_images_those_of_one_ending_are_taken(tmp_path: Path) -> None:
    with open(tmp_path / "pairs.tar", "wb") as file:
        write_tar(file, {"a/1.left.JPG": b"l", "a/1.right.jpg": b"r", "a/1.txt": b" a cat\n", "._1.jpg": b"x", "2.json": b""})
    assert "'pairs.tar/a/1' is there twice: of samples with several images, image='left.jpg' takes" in refusal("pairs.tar")
    images = open_images("pairs.tar", image="right.jpg", label=".TXT")
    assert (images.names, images.labels, images.read(0)) == (["pairs.tar/a/1"], ["a cat"], b"r")
    assert "ends as 'top.jpg'. Did you mean" in refusal("pairs.tar", image="top.jpg")
    assert "ends as 'cls'" in refusal("pairs.tar", image="left.jpg", label="cls")
    with tarfile.open("pairs.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("notes.json"))
    assert "has no images in it. Its members end in json" in refusal("pairs.tar")
    with tarfile.open("pairs.tar", "w") as tar:
        link = tarfile.TarInfo("b.jpg")
        link.type, link.linkname = tarfile.LNKTYPE, "a.jpg"
        tar.addfile(link)
    assert "'b.jpg' in" in refusal("pairs.tar")
    assert "tar --dereference --hard-dereference" in refusal("pairs.tar")


def test_a_table_says_which_columns_it_has(tmp_path: Path) -> None:
    pq.write_table(
        table_of(NAMES, thumb=pa.array([b"t"] * 12, pa.large_binary()), kind=pa.array([*range(11), None])), "t.parquet"
    )
    assert "may be images: image, thumb. Choose one: image_column='image'" in refusal("t.parquet")
    images = open_images("t.parquet", image="thumb", label="kind")
    assert (images.names[1], images.labels[1:], images.read(1)) == ("t.parquet/1", [*map(str, range(1, 11)), ""], b"t")
    assert read_all(open_images("t.parquet", image="image")) == BYTES
    assert "column 'width' of" in refusal("t.parquet", image="width")
    assert "has no column 'images'. Did you mean 'image'?" in refusal("t.parquet", image="images")
    assert "no column 'labels' for labels" in refusal("t.parquet", image="image", label="labels")
    pq.write_table(pa.table({"width": [1], "url": ["x"]}), "n.parquet")
    assert "no column of '" in refusal("n.parquet")
    assert "holds images. There is: width (int64), url (string)." in refusal("n.parquet")
    pq.write_table(table_of([]), "n.parquet")
    assert "there are no rows" in refusal("n.parquet")
    (tmp_path / "n.parquet").write_bytes((tmp_path / "t.parquet").read_bytes()[:-9])
    assert "n.parquet' cannot be read: " in refusal("n.parquet")


def test_rows_without_an_image_or_names_of_their_own(tmp_path: Path) -> None:
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    rows = [{"bytes": b"1", "path": "a.png"}, {"bytes": None, "path": "a.png"}, None]
    pq.write_table(pa.table({"image": pa.array(rows, kind)}), "t.parquet")
    images = open_images("t.parquet")
    assert (images.names, images.read(0)) == ([f"t.parquet/{n}" for n in range(3)], b"1")
    for n in (1, 2):
        with pytest.raises(HookattnError, match=f"'t.parquet/{n}' has no bytes in column 'image'"):
            images.read(n)
    pq.write_table(table_of(NAMES[:2]), "u.parquet")
    assert open_images(["t.parquet", "u.parquet"]).names[3:] == ["u.parquet/0", "u.parquet/1"]
    with pytest.raises(IndexError):
        images.read(3)


def test_a_data_set_by_name_says_what_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets.DatasetDict({"train": dataset_of(NAMES), "test": dataset_of(NAMES[:2])}).save_to_disk("d")
    assert "'d' has several splits: type datasets:d:train. There is: train, test." in refusal("d")
    assert "'d' has no split 'trian'. Did you mean 'train'" in refusal("datasets:d:trian")
    monkeypatch.setenv("HOME", str(tmp_path))
    for typed in ("datasets:d:test", "datasets:~/d:test"):
        images = pickle.dumps(open_images(typed))
        with monkeypatch.context() as elsewhere:
            elsewhere.chdir("/")
            assert read_all(pickle.loads(images)) == BYTES[:2]
    assert "'datasets:d:test' has no column 'img'. Did you mean 'image'?" in refusal("datasets:d:test", image="img")
    assert "no column 'lable' for labels. Did you mean 'label'" in refusal("datasets:d:test", label="lable")
    assert "column 'label' of 'datasets:d:test' is ClassLabel: no image" in refusal("datasets:d:test", image="label")
    assert "give it alone" in refusal(["datasets:d:test", "datasets:d:train"])
    for odd in ("datasets:", "datasets:a:b:c:d", "datasets:a:"):
        assert "is no data set: write datasets:NAME" in refusal(odd)
    LOCAL["named"](tmp_path / "named")
    assert "cannot be loaded: Unknown split" in refusal("datasets:named:trian")
    assert read_all(open_images("datasets:named:train[2:5]")) == BYTES[2:5]


def test_a_data_set_of_paths_reads_them(tmp_path: Path) -> None:
    photos = in_folder(tmp_path / "x")
    images = open_images("datasets:x:train")
    assert (images.names[1], images.labels) == ("train/1", LABELS)
    assert read_all(images) == BYTES
    (photos / NAMES[1]).unlink()
    with pytest.raises(HookattnError, match=r"there is no '.*x/cat/01\.webp'"):
        images.read(1)
    features = datasets.Features({"image": datasets.Image()})
    datasets.Dataset.from_dict({"image": [None]}, features=features).save_to_disk("d")
    with pytest.raises(HookattnError, match="'rows/0' has no bytes and no path"):
        open_images("d").read(0)


def test_without_a_network_or_the_package_the_answer_is_one_line() -> None:
    code = """if True:
        import sys
        from hookattn import HookattnError
        from hookattn.extraction.sources.open_images import open_images
        for missing, typed in ((None, "datasets:nobody/nothing"), ("datasets", "datasets:x"), ("pyarrow", "x.parquet")):
            if missing:
                sys.modules[missing] = None
            try:
                open_images(typed)
            except HookattnError as error:
                print(type(error).__name__, error)
    """
    Path("x.parquet").touch()
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120)
    offline, package, table = ran.stdout.splitlines()
    assert offline.startswith("HookattnError the data set 'nobody/nothing' cannot be loaded: ")
    assert "datasets:FOLDER, of one that lies here, needs no network." in offline
    assert package.startswith("MissingExtraError data sets of Hugging Face")
    assert "pip install datasets" in package
    assert table == 'MissingExtraError Parquet files need pyarrow: pip install "hookattn[table]".'


def test_what_is_no_source_is_answered_with_what_to_type(tmp_path: Path) -> None:
    in_shards(tmp_path / "x")
    for name in (
        "empty/a.npy",
        "empty/b",
        "mixed/a.png",
        "mixed/b.tar",
        "a.zip",
        "a.csv",
        "a.tar.gz",
        "a.pdf",
        "list.txt",
        "none.txt",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "list.txt").write_text("moved/a.png\nmoved/b.png\n")
    said = {
        "nothing": "nothing'. A data set of Hugging Face is typed datasets:nothing.",
        "no*.jpg": "no*.jpg'.",
        "x/photos-{001..003}.tar": "photos-003.tar'.",
        "x/photos-{002..000}.tar": "counts down: write {000..002}",
        "": "not from an empty name",
        "empty": "empty' has no photos, .tar or .parquet files in it; there is: .npy, names without an ending.",
        "mixed": "several kinds of sources: photos ('" + str(tmp_path / "mixed/a.png"),
        "a.zip": "unpack it, and give the folder",
        "a.csv": "write a .txt of it",
        "a.tar.gz": "unpack it to a .tar",
        "a.pdf": "a.pdf' is no image that PIL knows",
        "list.txt": "list.txt' lists is there, such as 'moved/a.png': write a path a line, as seen from the list",
        "none.txt": "there are no photos in '",
        "memory://no/such.tar": "there is no 'memory://no/such.tar'",
        "what://no/such.tar": "'what://no/such.tar' cannot be read: Protocol not known: what",
    }
    for typed, expected in said.items():
        assert expected in refusal(typed), typed
    assert "several kinds of sources: .tar (" in refusal(["x", "mixed/a.png"])
    assert "no source of images is given" in refusal([])
    assert "photos in folders and lists have none" in refusal("mixed/a.png", label="label")


def test_a_folder_that_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_folder(tmp_path / "x")
    scan = os.scandir

    def refuse(path: str) -> Any:
        if path.endswith("dog/"):
            raise PermissionError(13, "Permission denied")
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert "x/dog/' cannot be read: [Errno 13] Permission denied (PermissionError)." in refusal("x")


def test_what_reaches_a_store_may_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    known = vars(sys.modules["fsspec.registry"])["_registry"]  # of what another test has imported
    monkeypatch.delitem(known, "gs", raising=False)
    with pytest.raises(MissingExtraError, match=r"'gs://bucket/a\.tar' is out of reach: .*gcsfs"):
        open_images("gs://bucket/a.tar")
