"""Train the demo's Vision Transformer on generated scenes and write its weights into the package.

usage: python benchmarks/train_demo.py [--steps 3200] [--scenes 40000] [--out hookattn/cli/demo/weights.safetensors]

An hour on 2 busy CPU cores. Held-out scenes (seeds below `FIRST_SEED`) are never trained on; what the weights reach on
them is printed by `benchmarks/demo_quality.py`. A class loss on every patch, faded out over the first 70 % of the steps,
teaches the patch tokens what the class token then has to look for: without it the model stays at chance for long.
"""

from __future__ import annotations

import math
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from command import plain_parser
from safetensors.torch import save_file
from torch import nn

from hookattn.cli import demo
from hookattn.cli.demo.model import WEIGHTS

FIRST_SEED = 10_000
BATCH = 64
LEARNING_RATE = 2e-3
DENSE_UNTIL = 0.7


def draw_pool(scenes: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images (n, h, w, 3) uint8, masks (n, h, w) bool and labels (n,) of the training scenes."""
    with ProcessPoolExecutor() as pool:
        drawn = list(pool.map(demo.draw, range(FIRST_SEED, FIRST_SEED + scenes), chunksize=256))
    images, masks, labels = zip(*drawn, strict=True)
    return torch.from_numpy(np.stack(images)), torch.from_numpy(np.stack(masks)), torch.tensor(labels)


def flip(images: torch.Tensor, masks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One of the eight symmetries of the square, the same for images (b, c, h, w) and masks (b, h, w)."""
    for dims in ((-1,), (-2,)):
        if torch.rand(()) < 0.5:
            images, masks = images.flip(dims), masks.flip(dims)
    if torch.rand(()) < 0.5:
        images, masks = images.transpose(-1, -2), masks.transpose(-1, -2)
    return images, masks


def patch_targets(masks: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """(b, patches) class of each patch: 0 for ground, 1 + label where the shape covers at least 15 % of it."""
    cover = F.avg_pool2d(masks[:, None].float(), 8).flatten(1)
    return torch.where(cover > 0.15, labels[:, None] + 1, 0)


def main() -> None:
    parser = plain_parser(__doc__)
    parser.add_argument("--steps", type=int, default=3200)
    parser.add_argument("--scenes", type=int, default=40_000)
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    args = parser.parse_args()

    torch.manual_seed(0)
    model, dense = demo.build().train(), nn.Linear(96, len(demo.SHAPES) + 1)
    parameters = [*model.parameters(), *dense.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.05, betas=(0.9, 0.98))
    balance = torch.tensor([0.15] + [1.0] * len(demo.SHAPES))
    start = time.time()
    images, masks, labels = draw_pool(args.scenes)
    print(f"{args.scenes} scenes drawn in {time.time() - start:.0f} s", flush=True)

    right = 0
    for step in range(args.steps):
        done = step / args.steps
        rate = LEARNING_RATE * min(1, (step + 1) / 150) * (0.5 + 0.5 * math.cos(math.pi * done))
        for group in optimizer.param_groups:
            group["lr"] = rate
        pick = torch.randint(len(images), (BATCH,))
        x, mask = flip(demo.to_input(images[pick].numpy()), masks[pick])
        tokens = model.forward_features(x)
        logits = model.forward_head(tokens)
        loss = F.cross_entropy(logits, labels[pick], label_smoothing=0.05)
        if done < DENSE_UNTIL:
            per_patch = dense(tokens[:, model.num_prefix_tokens :]).flatten(0, 1)
            target = patch_targets(mask, labels[pick]).flatten()
            loss = loss + (1 - done / DENSE_UNTIL) * F.cross_entropy(per_patch, target, weight=balance)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        right += int((logits.argmax(-1) == labels[pick]).sum())
        if step % 100 == 99:
            print(
                f"step {step + 1} of {args.steps}, {time.time() - start:.0f} s: accuracy {right / (100 * BATCH):.3f}",
                flush=True,
            )
            right = 0
            save(model, args.out)
    save(model, args.out)


def save(model: nn.Module, path: Path) -> None:
    """Weights in half precision: 1.3 MB instead of 2.5, and no difference that shows in the maps."""
    save_file({k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}, str(path))


if __name__ == "__main__":
    main()
