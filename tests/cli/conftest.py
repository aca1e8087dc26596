"""Files that the tests of the command line give it."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
from PIL import Image
from safetensors.torch import save_file

from hookattn.cli import demo


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    Image.fromarray(demo.draw(3, 120).image[:, :90]).save(path)
    return path


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Those of timm's test_vit, with queries and keys so large that heads differ."""
    path = tmp_path_factory.mktemp("weights") / "weights.safetensors"
    state = timm.create_model("test_vit").state_dict()
    save_file({k: v * 20 if k.endswith("qkv.weight") else v for k, v in state.items()}, str(path))
    return path
