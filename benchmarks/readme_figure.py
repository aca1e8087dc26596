"""Draw the picture on the README's first screen: DINOv2 ViT-S/14 on photos of scikit-image.

usage: python benchmarks/readme_figure.py CHECKPOINT [--out benchmarks/figures/dinov2.jpg]

CHECKPOINT is a file of weights that timm loads into vit_small_patch14_reg4_dinov2. Needs scikit-image for the photos.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from command import plain_parser
from grid import Picture, draw_grid
from PIL import Image
from skimage import data
from torch import Tensor

from hookattn import AttentionRecorder
from hookattn.figures.plot import COLOURS, overlay, shown_image

PHOTOS = ("astronaut", "chelsea", "coffee")
LAYER = "blocks.7.attn"
HEADS = 4


def draw_head(axes: Any, head: Tensor) -> None:
    axes.imshow(head, cmap=COLOURS, vmin=0, vmax=float(head.quantile(0.995)), interpolation="bicubic")


def main() -> None:
    parser = plain_parser(__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("figures") / "dinov2.jpg")
    args = parser.parse_args()

    overlay_of_cfg = {"file": str(args.checkpoint)}
    name = "vit_small_patch14_reg4_dinov2"
    model = timm.create_model(name, pretrained=True, num_classes=0, pretrained_cfg_overlay=overlay_of_cfg).eval()
    config = timm.data.resolve_model_data_config(model)
    transform = timm.data.create_transform(**config, is_training=False)
    images = torch.stack([transform(Image.fromarray(getattr(data, name)())) for name in PHOTOS])
    with AttentionRecorder(model, layers=LAYER) as rec, torch.no_grad():
        model(images)
    heads = rec.maps[LAYER].image("cls", heads=None)  # (photos, heads, rows, columns)
    print(f"{rec.maps[LAYER]}; put back, it moves the output by {rec.verify():.1e}")

    rows: list[list[Picture]] = []
    for image, each in zip(images, heads):
        pixels = shown_image(image, config["mean"], config["std"])
        row: list[Picture] = [("photo", partial(overlay, image=pixels))]
        row += [(f"{LAYER}, mean of heads", partial(overlay, image=pixels, attention=each.mean(0)))]
        row += [(f"head {h}", partial(draw_head, head=each[h])) for h in range(HEADS)]
        rows.append(row if not rows else [("", draw) for _, draw in row])
    draw_grid(rows, args.out)


if __name__ == "__main__":
    main()
