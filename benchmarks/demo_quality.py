"""What the demo's model reaches on held-out scenes: accuracy, and how much of its attention is on the shape.

usage: python benchmarks/demo_quality.py [--scenes 500]

The seeds 0, 1, 2, ... are never trained on. A layer's figure is the class token's attention (mean of heads) that falls on the
shape's pixels, over the shape's share of the picture's area, both averaged over the scenes: 1 is attention spread evenly.
Rollouts and relevance are the class token's row over the patches, divided by its sum; their gradients are those of the
predicted class.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from command import plain_parser

from hookattn import AttentionRecorder
from hookattn.analysis import grad_rollout, relevance, rollout
from hookattn.cli import demo

METHODS = {"rollout": rollout, "grad_rollout": grad_rollout, "relevance": relevance}


def share_on(row: torch.Tensor, scene: demo.Scene, grid: tuple[int, int]) -> float:
    """Share of a row over the patches that falls on the shape's pixels."""
    per_patch = F.adaptive_avg_pool2d(torch.from_numpy(scene.mask).float()[None, None], grid).flatten()
    return float((row / row.sum() * per_patch).sum())


def main() -> None:
    parser = plain_parser(__doc__)
    parser.add_argument("--scenes", type=int, default=500)
    scenes = [demo.draw(seed) for seed in range(parser.parse_args().scenes)]

    model = demo.load()
    right, on_shape, explained = 0, [], []
    for scene in scenes:
        with AttentionRecorder(model, gradients=True) as rec:
            logits = model(demo.to_input(scene.image[None]))
            logits.max().backward()
        right += int(logits.argmax()) == scene.label
        on_shape.append([demo.attention_on(m, scene.mask) for m in rec.maps.values()])
        grid = rec.maps[-1].tokens.grid_size
        explained.append([share_on(method(rec)[0, 0, 1:], scene, grid) for method in METHODS.values()])

    area = np.mean([scene.mask.mean() for scene in scenes])
    shares = np.mean(on_shape, axis=0)
    print(f"{len(scenes)} held-out scenes, chance {1 / len(demo.SHAPES):.0%}: accuracy {right / len(scenes):.1%}")
    print(f"the shape covers {area:.1%} of a scene; of the class token's attention it gets")
    for name, share in zip(rec.maps, shares):
        print(f"  {name}: {share:.1%}, {share / area:.1f} times its area")
    print(f"best layer: {shares.max() / area:.1f} times; all layers:")
    for name, share in zip(METHODS, np.mean(explained, axis=0)):
        print(f"  {name}: {share:.1%}, {share / area:.1f} times its area")


if __name__ == "__main__":
    main()
