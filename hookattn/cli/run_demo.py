"""`hookattn demo`: a small trained model on a scene drawn for the occasion."""

from __future__ import annotations

from pathlib import Path

import torch

from ..recording.recorder import AttentionRecorder
from . import demo as small
from .files import PICTURES, check_out
from .output import console, join_sizes, make_table
from .picture import save_picture


def run_demo(out: Path, seed: int) -> None:
    """Record the demo's model on a scene and draw what its class token attends to."""
    out = check_out(out, PICTURES)
    model, scene = small.load(), small.draw(seed)
    with AttentionRecorder(model) as rec, torch.no_grad():
        logits = model(small.to_input(scene.image[None]))
    guess = small.SHAPES[int(logits.argmax())]
    sure = logits.softmax(-1).max()
    console.print(f"scene {seed} shows a {small.SHAPES[scene.label]}; the model says {guess} ({sure:.0%} sure)")
    console.print(f"{len(rec.maps)} maps recorded, scaled_dot_product_attention on; each put back into its module:\n")
    table = make_table("layer", "map", "output moves by", "class token on the shape")
    for m in rec.maps.values():
        on_shape = small.attention_on(m, scene.mask)
        times = on_shape / scene.mask.mean()
        table.add_row(m.name, join_sizes(m.shape), f"{m.verify():.1e}", f"{on_shape:.0%}, {times:.1f} x its area")
    console.print(table)
    save_picture(scene.image, rec.maps, "cls", out, f"a {guess}, seen by 5 layers of 4 heads")
