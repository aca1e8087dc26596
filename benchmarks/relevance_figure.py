"""The picture of rollouts and relevance in the README: the demo's model on held-out scenes.

usage: python benchmarks/relevance_figure.py [--out benchmarks/figures/relevance.jpg]
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import torch
from command import plain_parser
from grid import Picture, draw_grid
from torch import Tensor

from hookattn import AttentionRecorder
from hookattn.analysis import grad_rollout, relevance, rollout
from hookattn.cli import demo
from hookattn.figures.plot import overlay

SEEDS = (3, 11, 12)


def row_of(scene: demo.Scene) -> list[Picture]:
    """What each method lights up of a scene."""
    model = demo.load()
    with AttentionRecorder(model, gradients=True) as rec:
        logits = model(demo.to_input(scene.image[None]))
        logits.max().backward()
    label, grid = demo.SHAPES[int(logits.argmax())], rec.maps[-1].tokens.grid_size
    joint = {
        "rollout": rollout(rec),
        f"grad_rollout of {label!r}": grad_rollout(rec),
        f"relevance of {label!r}": relevance(rec),
    }
    lights: dict[str, Tensor | None] = {"scene": None, "last layer, mean of heads": rec.maps[-1].image("cls")[0]}
    lights |= {caption: rows[0, 0, 1:].unflatten(-1, grid) for caption, rows in joint.items()}
    return [(caption, partial(overlay, np.asarray(scene.image), light)) for caption, light in lights.items()]


def main() -> None:
    parser = plain_parser(__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("figures") / "relevance.jpg")
    out = parser.parse_args().out
    torch.manual_seed(0)
    draw_grid([row_of(demo.draw(seed)) for seed in SEEDS], out)


if __name__ == "__main__":
    main()
