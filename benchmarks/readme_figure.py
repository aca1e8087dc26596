"""Draw the picture on the README's first screen: DINOv2 ViT-S/14 on photos of scikit-image.

usage: python benchmarks/readme_figure.py CHECKPOINT [--out benchmarks/figures/dinov2.jpg]

CHECKPOINT is a file of weights that timm loads into vit_small_patch14_reg4_dinov2. Needs scikit-image for the photos.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import timm
import torch
from matplotlib.figure import Figure
from PIL import Image
from skimage import data

from hookattn import AttentionRecorder
from hookattn.figures.plot import COLOURS, overlay, shown_image

PHOTOS = ("astronaut", "chelsea", "coffee")
LAYER = "blocks.7.attn"
HEADS = 4
CELL, GAP, LINE = 1.3, 0.05, 0.2  # inches


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("figures") / "dinov2.jpg")
    args = parser.parse_args()

    model = timm.create_model(
        "vit_small_patch14_reg4_dinov2",
        pretrained=True,
        num_classes=0,
        pretrained_cfg_overlay={"file": str(args.checkpoint)},
    ).eval()
    config = timm.data.resolve_model_data_config(model)
    transform = timm.data.create_transform(**config, is_training=False)
    images = torch.stack([transform(Image.fromarray(getattr(data, name)())) for name in PHOTOS])
    with AttentionRecorder(model, layers=LAYER) as rec, torch.no_grad():
        model(images)
    heads = rec.maps[LAYER].image("cls", heads=None)  # (photos, heads, rows, columns)
    print(f"{rec.maps[LAYER]}; put back, it moves the output by {rec.verify():.1e}")

    columns = 2 + HEADS
    width, height = columns * (CELL + GAP) - GAP, len(PHOTOS) * (CELL + GAP) - GAP + LINE
    figure = Figure(figsize=(width, height), dpi=150, facecolor="white")
    titles = ["photo", f"{LAYER}, mean of heads", *(f"head {h}" for h in range(HEADS))]
    for row in range(len(PHOTOS)):
        pixels = shown_image(images[row], config["mean"], config["std"])
        for column in range(columns):
            x, y = column * (CELL + GAP), LINE + row * (CELL + GAP)
            axes = figure.add_axes((x / width, 1 - (y + CELL) / height, CELL / width, CELL / height))
            axes.set_axis_off()
            if column < 2:
                overlay(axes, pixels, heads[row].mean(0) if column else None)
            else:
                head = heads[row, column - 2]
                axes.imshow(head, cmap=COLOURS, vmin=0, vmax=float(head.quantile(0.995)), interpolation="bicubic")
            if row == 0:
                figure.text(x / width, 1 - LINE / 2 / height, titles[column], fontsize=6, color="#6e6e73", va="center")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out, pil_kwargs={"quality": 88})
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
