"""The picture of rollouts and relevance in the README: the demo's model on held-out scenes.

usage: python benchmarks/relevance_figure.py [--out benchmarks/figures/relevance.jpg]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from hookattn import AttentionRecorder
from hookattn.analysis import grad_rollout, relevance, rollout
from hookattn.cli import demo
from hookattn.figures.plot import overlay

SEEDS = (3, 11, 12)
CELL, GAP, LINE = 1.5, 0.05, 0.2  # inches


def rows_of(scene: demo.Scene) -> tuple[dict[str, Tensor | None], str]:
    """What each method lights up of a scene, (rows, columns) each, and the class the gradients are of."""
    model = demo.load()
    with AttentionRecorder(model, gradients=True) as rec:
        logits = model(demo.to_input(scene.image[None]))
        logits.max().backward()
    joint = {"rollout": rollout(rec), "grad_rollout": grad_rollout(rec), "relevance": relevance(rec)}
    grid = rec.maps[-1].tokens.grid_size
    shown: dict[str, Tensor | None] = {"scene": None, "last layer, mean of heads": rec.maps[-1].image("cls")[0]}
    return shown | {name: r[0, 0, 1:].unflatten(-1, grid) for name, r in joint.items()}, demo.SHAPES[int(logits.argmax())]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("figures") / "relevance.jpg")
    out = parser.parse_args().out
    torch.manual_seed(0)
    scenes = [demo.draw(seed) for seed in SEEDS]
    pictures = [rows_of(scene) for scene in scenes]
    columns = len(pictures[0][0])
    width, height = columns * (CELL + GAP) - GAP, len(scenes) * (CELL + GAP + LINE) - GAP
    figure = Figure(figsize=(width, height), dpi=150, facecolor="white")
    for row, (scene, (shown, label)) in enumerate(zip(scenes, pictures)):
        for column, (caption, light) in enumerate(shown.items()):
            x, y = column * (CELL + GAP), LINE + row * (CELL + GAP + LINE)
            axes = figure.add_axes((x / width, 1 - (y + CELL) / height, CELL / width, CELL / height))
            axes.set_axis_off()
            overlay(axes, np.asarray(scene.image), light)
            caption = f"{caption} of {label!r}" if "rel" in caption or "grad" in caption else caption
            figure.text(x / width, 1 - (y - LINE / 2) / height, caption, fontsize=6.5, color="#6e6e73", va="center")
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, pil_kwargs={"quality": 88})
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
