"""The same twelve images, as encoded bytes, in every kind of source that they can come from."""

from __future__ import annotations

import http.server
import io
import re
import tarfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from torch.utils.data import Dataset

MODES = ("RGB", "L", "RGBA", "P", "1", "CMYK")
ENDINGS = {"CMYK": "jpg", "L": "webp"}
CLASSES = ["cat", "dog", "owl"]


def draw(seed: int) -> tuple[str, bytes]:
    """The name of an image, which is its place in the order, and its file."""
    mode = MODES[seed % len(MODES)]
    values = np.random.default_rng(seed).integers(0, 256, (5 + seed, 17 - seed, 3), dtype=np.uint8)
    ending, file = ENDINGS.get(mode, "png"), io.BytesIO()
    Image.fromarray(values).convert(mode).save(file, {"jpg": "JPEG"}.get(ending, ending))
    return f"{CLASSES[seed // 4]}/{seed:02}.{ending}", file.getvalue()


IMAGES = dict(map(draw, range(12)))
LABELS = [name.split("/")[0] for name in IMAGES]


def in_folder(root: Path) -> Any:
    """Photos in folders of their classes, among what is no photo."""
    for name, data in IMAGES.items():
        (root / name).parent.mkdir(exist_ok=True, parents=True)
        (root / name).write_bytes(data)
    (root / "notes.txt").write_text("no photo")
    (root / ".hidden.png").write_bytes(b"")
    return root


def in_files(root: Path) -> Any:
    """The files themselves, as a shell gives them."""
    return [in_folder(root) / name for name in IMAGES]


def in_list(root: Path) -> Any:
    """Paths in a file beside them, with labels."""
    in_folder(root / "photos")
    lines = [f"./photos/{name}\t{name.split('/')[0]}" for name in IMAGES]
    (root / "list.txt").write_bytes("\r\n".join(["", *lines, ""]).encode("utf-8-sig"))
    return str(root / "list.txt")


def write_tar(file: Any, members: Mapping[str, bytes], kind: int = tarfile.PAX_FORMAT) -> None:
    """A tar archive of files of these names."""
    with tarfile.open(fileobj=file, mode="w", format=kind) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def samples(names: Sequence[str]) -> dict[str, bytes]:
    """Members of an archive: images, what they are labelled, and what nobody asks for."""
    found: dict[str, bytes] = {}
    for name in names:
        key, _, ending = name.partition(".")
        more = {"cls": f"{key.split('/')[0]}\n".encode(), ending.upper(): IMAGES[name], "json": b"{}"}
        found |= {f"./{key}.{ending}": data for ending, data in more.items()}
    return found


def in_shards(root: Path) -> Any:
    """Three archives, in the two formats that are around."""
    names = list(IMAGES)
    root.mkdir(parents=True, exist_ok=True)
    for n in range(3):
        with open(root / f"photos-{n:03}.tar", "wb") as file:
            write_tar(file, samples(names[4 * n : 4 * n + 4]), tarfile.GNU_FORMAT if n else tarfile.PAX_FORMAT)
    return f"{root}/photos-{{000..002}}.tar"


def in_folder_of_shards(root: Path) -> Any:
    in_shards(root)
    return root


def table_of(names: Sequence[str], **columns: Any) -> pa.Table:
    """Images as Hugging Face writes them, and other columns."""
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    rows = [{"bytes": IMAGES[name], "path": name} for name in names]
    return pa.table({"width": pa.array(range(len(names))), "image": pa.array(rows, kind), **columns})


def in_tables(root: Path) -> Any:
    """Two files of several groups of rows, one of which is empty."""
    names = list(IMAGES)
    root.mkdir(parents=True, exist_ok=True)
    for n, part in enumerate((names[:7], [], names[7:])):
        table = table_of(part, label=pa.array([name.split("/")[0] for name in part], pa.string()))
        pq.write_table(table, root / f"part-{n}.parquet", row_group_size=3)
    return f"{root}/*.parquet"


def in_table_of_bytes(root: Path) -> Any:
    """A file without names, with labels that are numbers of classes."""
    root.mkdir(parents=True, exist_ok=True)
    features = datasets.Features({"picture": datasets.Value("binary"), "label": datasets.ClassLabel(names=CLASSES)})
    rows = {"picture": list(IMAGES.values()), "label": [CLASSES.index(label) for label in LABELS]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(root / "bytes.parquet")
    return root


def dataset_of(names: Sequence[str]) -> datasets.Dataset:
    """A data set of Hugging Face."""
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=CLASSES)})
    rows = [{"image": {"bytes": IMAGES[n], "path": n}, "label": CLASSES.index(n.split("/")[0])} for n in names]
    return datasets.Dataset.from_list(rows, features=features)


def in_saved(root: Path) -> Any:
    """Of one split."""
    dataset_of(list(IMAGES)).save_to_disk(str(root))
    return root


def in_saved_splits(root: Path) -> Any:
    """Of two splits, of which one is asked for."""
    names = list(IMAGES)
    datasets.DatasetDict({"train": dataset_of(names), "test": dataset_of(names[:2])}).save_to_disk(str(root))
    return f"datasets:{root}:train"


def in_named(root: Path) -> Any:
    """A folder in the layout of the hub, which is loaded as a name of it would be."""
    (root / "data").mkdir(parents=True)
    dataset_of(list(IMAGES)).to_parquet(root / "data" / "train-00000-of-00001.parquet")
    return f"datasets:{root}:train"


def to_memory(root: Path, address: str) -> str:
    """Copy a folder to where only fsspec finds it."""
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    memory.pseudo_dirs[:] = [""]
    memory.put(str(root), address, recursive=True)
    return address


class Parts(http.server.SimpleHTTPRequestHandler):
    """A folder on the web, from a server that sends parts of files if `sends_parts`."""

    sends_parts = True

    def log_message(self, *args: Any) -> None:
        pass

    def send_head(self) -> Any:
        path = Path(self.translate_path(self.path))
        if not self.sends_parts or not path.is_file():
            return super().send_head()
        data, asked = path.read_bytes(), re.findall(r"\d+", self.headers.get("Range", ""))
        first, last = map(int, asked or (0, len(data) - 1))
        self.send_response(206 if asked else 200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(data[first : last + 1])))
        self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
        self.end_headers()
        return io.BytesIO(data[first : last + 1])


@contextmanager
def on_the_web(root: Path) -> Iterator[str]:
    """The address of a folder, while it can be had from a server."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Parts, directory=str(root)))
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


class Read(Dataset[tuple[int, bytes]]):
    """What workers of a loader read, in processes of their own."""

    def __init__(self, images: Any) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[int, bytes]:
        return index, self.images.read(index)


LOCAL: dict[str, Callable[[Path], Any]] = {
    "folder": in_folder,
    "files": in_files,
    "list": in_list,
    "shards": in_shards,
    "folder of shards": in_folder_of_shards,
    "tables": in_tables,
    "table of bytes": in_table_of_bytes,
    "saved": in_saved,
    "saved splits": in_saved_splits,
    "named": in_named,
}
