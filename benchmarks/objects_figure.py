"""Draw what the keys of DINOv2 take for the object, on four photos of scikit-image.

usage: python benchmarks/objects_figure.py CHECKPOINT [--out benchmarks/figures/objects.jpg]

CHECKPOINT is a file of weights that timm loads into vit_small_patch14_reg4_dinov2. Patches are split by the first principal
component of their keys, as Oquab et al. 2023, "DINOv2: learning robust visual features without supervision", do with features.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import timm
import torch
import torch.nn.functional as F
from command import plain_parser, save_figure
from skimage import data
from torch import Tensor

from hookattn import AttentionRecorder
from hookattn.image import Photo

PHOTOS = ("astronaut", "chelsea", "coffee", "rocket")
LAYER = "blocks.9.attn"


def split(keys: Tensor) -> Tensor:
    """(rows, columns) out of (channels, rows, columns): above zero on the side that has less of the border."""
    vectors = keys.flatten(1).T
    vectors = F.normalize(vectors - vectors.mean(0), dim=1)
    along = (vectors @ torch.linalg.svd(vectors, full_matrices=False).Vh[0]).view(keys.shape[1:])
    border = torch.cat([along[0], along[-1], along[:, 0], along[:, -1]])
    return -along * border.sum().sign()


def main() -> None:
    parser = plain_parser(__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("figures") / "objects.jpg")
    args = parser.parse_args()
    given = {"pretrained": True, "pretrained_cfg_overlay": {"file": str(args.checkpoint)}}
    model = timm.create_model("vit_small_patch14_reg4_dinov2", num_classes=0, dynamic_img_size=True, **given).eval()
    figure, panels = plt.subplots(1, len(PHOTOS), figsize=(11, 3), layout="constrained")
    for axes, name in zip(panels, PHOTOS):
        photo = Photo.open(getattr(data, name)(), model)
        with AttentionRecorder(model, LAYER) as rec, torch.no_grad():
            model(photo.tensor[None])
        found = split(rec.maps[LAYER].k.image()[0])
        placed = photo.place(F.interpolate(found[None, None], photo.input_size, mode="nearest")[0, 0])
        axes.imshow(photo.pixels)
        axes.imshow(torch.where(placed > 0, torch.nan, 1.0), cmap="gray", vmin=0, vmax=8, alpha=0.8)
        axes.set(xticks=[], yticks=[], title=f"{name}: {(found > 0).float().mean():.0%} of the patches")
    save_figure(figure, args.out)


if __name__ == "__main__":
    main()
