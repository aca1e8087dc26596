"""Draw how much of a class token's row goes to class token and registers, in the map and in what these contribute.

usage: python benchmarks/contributions_figure.py CHECKPOINT [--out benchmarks/figures/contributions.png]

CHECKPOINT is a file of weights that timm loads into vit_small_patch14_reg4_dinov2. Needs scikit-image for four photos; a table
is printed, too.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import timm
import torch
from command import plain_parser, save_figure
from skimage import data
from torch import Tensor

from hookattn import AttentionMap, AttentionRecorder
from hookattn.analysis import contributions
from hookattn.image import Photo

PHOTOS = ("astronaut", "chelsea", "coffee", "rocket")
SHOWN = "blocks.11.attn"
READ = {
    "the map": lambda m: m,
    "norms of contributions": lambda m: contributions(m, heads="sum"),
    "projections of contributions": lambda m: contributions(m, "projection", heads="sum"),
}
PREFIX = {"class token": slice(0, 1), "four registers": slice(1, 5)}


def shares(m: AttentionMap) -> Tensor:
    """Of the class token's row, what goes to the class token and to registers: (of READ, of PREFIX)."""
    rows = [read(m).rows("cls")[0].mean(0) for read in READ.values()]
    return torch.stack([torch.stack([row[part].sum() / row.sum() for part in PREFIX.values()]) for row in rows])


def main() -> None:
    parser = plain_parser(__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("figures") / "contributions.png")
    args = parser.parse_args()
    given = {"pretrained": True, "pretrained_cfg_overlay": {"file": str(args.checkpoint)}}
    model = timm.create_model("vit_small_patch14_reg4_dinov2", num_classes=0, dynamic_img_size=True, **given).eval()

    found, pictures = [], []
    for name in PHOTOS:
        photo = Photo.open(getattr(data, name)(), model)
        with AttentionRecorder(model) as rec, torch.no_grad():
            model(photo.tensor[None])
        found.append(torch.stack([shares(m) for m in rec.maps.values()]))
        pictures.append([read(rec.maps[SHOWN]).image("cls")[0] for read in list(READ.values())[:2]])
    mean = torch.stack(found).mean(0)  # (layers, of READ, of PREFIX)

    print("layer", *[f"{part}: {how}" for part in PREFIX for how in READ], sep=" | ")
    for layer, row in enumerate(mean.transpose(1, 2).flatten(1).tolist()):
        print(layer, *[f"{100 * value:5.1f} %" for value in row], sep=" | ")
    save_figure(draw(mean, pictures), args.out)


def draw(mean: Tensor, pictures: list[list[Tensor]]) -> plt.Figure:
    """Shares by layer above, pictures of the last layer below."""
    figure = plt.figure(figsize=(11, 7.6), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=[1.1, 1])
    for axes, part, values in zip(above.subplots(1, 2, sharey=True), PREFIX, mean.unbind(2)):
        for how, line in zip(READ, values.T):
            axes.plot(range(len(line)), 100 * line, marker="o", markersize=4, label=how)
        axes.set(title=f"what the class token takes from the {part}", xlabel="block", xticks=range(len(values)))
        axes.axhline(0, color="grey", linewidth=0.5)
    above.axes[0].set_ylabel("share of its row, %")
    above.axes[0].legend()
    for axes, name, (of_map, of_norms) in zip(below.subplots(2, len(PHOTOS)).T, PHOTOS, pictures):
        for each, picture, label in zip(axes, (of_map, of_norms), ("map", "norms")):
            each.imshow(picture, cmap="magma", vmin=0)
            each.set(xticks=[], yticks=[], title=name if label == "map" else None)
            each.set_ylabel(label if name == PHOTOS[0] else None)
    below.suptitle(
        "the class token's row of the last layer over patches: the map, and norms of contributions", fontsize="medium"
    )
    return figure


if __name__ == "__main__":
    main()
