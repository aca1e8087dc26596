"""Draw the picture on the README's first screen: DINOv2 ViT-S/14 with registers on a photo of scikit-image.

usage: python benchmarks/readme_figure.py CHECKPOINT [--out benchmarks/figures/dinov2.jpg]

CHECKPOINT is a file of weights that timm loads into vit_small_patch14_reg4_dinov2. Needs scikit-image for the photo.
"""

from __future__ import annotations

from pathlib import Path

import timm
import torch
from command import plain_parser, save_figure
from skimage import data

from hookattn import AttentionRecorder
from hookattn.figures import plot
from hookattn.image import Photo

LAYER = "blocks.9.attn"
QUERIES = ["cls", (0.36, 0.32), (0.76, 0.55)]  # the class token, an eye, the nose


def main() -> None:
    parser = plain_parser(__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("figures") / "dinov2.jpg")
    args = parser.parse_args()

    given = {"pretrained": True, "pretrained_cfg_overlay": {"file": str(args.checkpoint)}}
    model = timm.create_model("vit_small_patch14_reg4_dinov2", num_classes=0, dynamic_img_size=True, **given).eval()
    photo = Photo.open(data.chelsea(), model)
    with AttentionRecorder(model, LAYER) as rec, torch.no_grad():
        model(photo.tensor[None])
    print(f"{rec.maps[LAYER]} of {photo}; put back, it moves the output by {rec.verify():.1e}")
    save_figure(plot.heads(rec.maps[LAYER], QUERIES, ["mean", *range(6)], photo), args.out)


if __name__ == "__main__":
    main()
