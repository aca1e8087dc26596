"""Draw the entropy of each head of DINOv2, and how far it looks, over twelve photos of scikit-image, from a store.

usage: python benchmarks/dataset_figure.py CHECKPOINT [--out benchmarks/figures/dataset.jpg]

CHECKPOINT is a file of weights that timm loads into vit_small_patch14_reg4_dinov2.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import skimage.data
import timm
import xarray
from command import plain_parser, save_figure

from hookattn.extraction import extract

PHOTOS = "astronaut camera chelsea clock_motion coffee coins hubble_deep_field ihc moon motorcycle_left retina rocket"


def main() -> None:
    parser = plain_parser(__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("figures") / "dataset.jpg")
    args = parser.parse_args()
    given = {"pretrained": True, "pretrained_cfg_overlay": {"file": str(args.checkpoint)}}
    model = timm.create_model("vit_small_patch14_reg4_dinov2", num_classes=0, img_size=224, **given).eval()
    there = {path.stem: path for path in Path(skimage.data.__file__).parent.iterdir()}
    figure, panels = plt.subplots(1, 2, figsize=(9, 4), layout="constrained", sharey=True)
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "run.zarr"
        print(extract(model, [there[name] for name in PHOTOS.split()], store, what="entropy,distance"))
        with xarray.open_zarr(store) as run:
            for axes, name in zip(panels, ("entropy", "distance")):
                run[name].mean("image").plot(ax=axes, x="head", y="depth", yincrease=False, cmap="magma")
    panels[1].set_ylabel("")
    save_figure(figure, args.out)


if __name__ == "__main__":
    main()
