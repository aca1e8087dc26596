"""What Python does around a model, counted: no change makes a block, a call or a reading slower unseen."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from support.inside import forget_steps

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import overhead

# Calls of functions with Python 3.11, torch 2.14, timm 1.0.31: open and leave, recorded call, the same with keep="maps", the
# same with a function that reads a row, row, map, image, rows of all layers, the first such of a forward; a recorded call
# with a graph, one in inference mode, and a row there.
SEEN: dict[str, tuple[int, ...]] = {
    "vit_small_patch16_224": (3212, 68, 375, 485, 165, 158, 330, 1840, 3040, 74, 80, 181),
    "vit_large_patch16_224": (5648, 63, 370, 479, 165, 158, 330, 3676, 6028, 69, 75, 181),
    "swin_base_patch4_window7_224": (6472, 91, 429, 555, 188, 169, 458, 6863, 11543, 96, 105, 206),
    "vit_small_patch16_dinov3": (3370, 75, 485, 606, 281, 261, 495, 3232, 4420, 81, 92, 314),
    "nn.TransformerEncoder": (3682, 76, 381, 491, 214, 217, 83, 97, 253),
    "no recipe": (3703, 65, 1919, 2441, 1794, 1789, 70, 79, 1809),
}
MARGIN = 1.1


@pytest.mark.skipif(sys.version_info < (3, 11), reason="older versions of Python call more functions for the same")
@pytest.mark.parametrize("kind", SEEN)
def test_no_more_functions_are_called_than_before(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    forget_steps(monkeypatch)
    found = overhead.counted(*overhead.KINDS[kind](is_small=True))
    del found["layers"]
    assert len(found) == len(SEEN[kind])
    assert {title: n for (title, n), seen in zip(found.items(), SEEN[kind]) if n > MARGIN * seen} == {}
