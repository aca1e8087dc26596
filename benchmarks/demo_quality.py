"""What the demo's model reaches on held-out scenes: accuracy, and how much of its attention is on the shape.

usage: python benchmarks/demo_quality.py [--scenes 500]

The seeds 0, 1, 2, ... are never trained on. A layer's figure is the class token's attention (mean of heads) that falls on the
shape's pixels, over the shape's share of the picture's area, both averaged over the scenes: 1 is attention spread evenly.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch

from hookattn import AttentionRecorder, demo


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=500)
    scenes = [demo.draw(seed) for seed in range(parser.parse_args().scenes)]

    model = demo.load()
    right, on_shape = 0, []
    for scene in scenes:
        with AttentionRecorder(model) as rec, torch.no_grad():
            logits = model(demo.to_input(scene.image[None]))
        right += int(logits.argmax()) == scene.label
        on_shape.append([demo.attention_on(m, scene.mask) for m in rec.maps.values()])

    area = np.mean([scene.mask.mean() for scene in scenes])
    shares = np.mean(on_shape, axis=0)
    print(f"{len(scenes)} held-out scenes, chance {1 / len(demo.SHAPES):.0%}: accuracy {right / len(scenes):.1%}")
    print(f"the shape covers {area:.1%} of a scene; of the class token's attention it gets")
    for name, share in zip(rec.maps, shares):
        print(f"  {name}: {share:.1%}, {share / area:.1f} times its area")
    print(f"best layer: {shares.max() / area:.1f} times")


if __name__ == "__main__":
    main()
