"""The code of the README runs, and prints what its comments say."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]


def readme_blocks() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)


def test_the_code_of_the_readme_prints_what_its_comments_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("cat/0.png", "dog/0.png", "dog/1.png"):  # the reader's photos
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (60, 40), "teal").save(tmp_path / "photos" / name)
    scope: dict[str, object] = {"__name__": "readme"}
    blocks = readme_blocks()
    assert len(blocks) >= 3
    for block in blocks:
        if "hookattn.extraction" in block and find_spec("zarr") is None:  # zarr 3 needs Python 3.11
            continue
        exec(compile(block, "README.md", "exec"), scope)
        for line in capsys.readouterr().out.splitlines():
            said = re.sub(r"#[#\s]*", "", block)
            place = re.search(r"timm/models/vision_transformer\.py:", line)  # the line number is timm's own affair
            assert (place.group() if place else line.strip()) in said
