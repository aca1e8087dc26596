"""What Python costs around a model: the calls of functions, counted, and their time over that of the bare arithmetic.

usage: python benchmarks/overhead.py [--rounds 60] [--kinds "vit*,swin*"] [--out benchmarks/results/overhead-cpu.json]

On a GPU a model at batch 1 waits for Python, and Python can be measured without one. Calls of Python's and of C's functions are
counted by `sys.setprofile`, which gives the same number each time; a test holds them (tests/house/test_overhead.py). Times are
of one thread and one image, each the best of many rounds in turns, and mean something as ratios to what stands beside them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import timm
import torch
from command import matching
from torch import Tensor, nn

from hookattn import AttentionMap, AttentionRecorder


class ByHand(nn.Module):
    """Attention of nobody's, which has no recipe."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        a = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
        out: Tensor = self.out((a @ v).transpose(1, 2).flatten(2))
        return out


class HandAttention(ByHand):
    """Named like attention."""


def encoder(width: int = 384, heads: int = 6, depth: int = 12) -> nn.Module:
    """PyTorch's own."""
    layer = nn.TransformerEncoderLayer(width, heads, 4 * width, batch_first=True)
    return nn.TransformerEncoder(layer, depth, enable_nested_tensor=False).eval()


def by_hand(width: int = 384, heads: int = 6, depth: int = 12) -> nn.Module:
    """Layers that are replayed."""
    return nn.Sequential(*[HandAttention(width, heads) for _ in range(depth)]).eval()


Made = tuple[Any, Tensor]
KINDS: dict[str, Callable[..., Made]] = {  # a model, and one image or a sequence
    "vit_small_patch16_224": lambda **o: (timm.create_model("vit_small_patch16_224", **o).eval(), torch.randn(1, 3, 224, 224)),
    "vit_large_patch16_224": lambda **o: (timm.create_model("vit_large_patch16_224", **o).eval(), torch.randn(1, 3, 224, 224)),
    "swin_base_patch4_window7_224": lambda **o: (
        timm.create_model("swin_base_patch4_window7_224", **o).eval(),
        torch.randn(1, 3, 224, 224),
    ),
    "vit_small_patch16_dinov3": lambda **o: (
        timm.create_model("vit_small_patch16_dinov3", **o).eval(),
        torch.randn(1, 3, 256, 256),
    ),
    "nn.TransformerEncoder": lambda **o: (encoder(**o), torch.randn(1, 197, o.get("width", 384))),
    "no recipe": lambda **o: (by_hand(**o), torch.randn(1, 197, o.get("width", 384))),
}


def count_calls(run: Callable[[], Any]) -> int:
    """Calls of Python's and of C's functions while something runs."""
    count = 0

    def note(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(before)
    return count - 1  # of setprofile itself


def open_and_leave(model: nn.Module, **options: Any) -> None:
    with AttentionRecorder(model, **options):
        pass


def recorded(model: nn.Module, x: Tensor, **options: Any) -> AttentionRecorder:
    with AttentionRecorder(model, **options) as rec:
        model(x)
    return rec


READS: dict[str, Callable[[AttentionRecorder, AttentionMap], Any]] = {
    "row": lambda rec, m: m[:, :, 0],
    "map": lambda rec, m: m[...],
    "image": lambda rec, m: m.image("cls") if "cls" in m.tokens.prefix else m.image((0.5, 0.5)),
    "rec.rows": lambda rec, m: rec.rows(0),
}


@torch.no_grad()
def counted(model: nn.Module, x: Tensor) -> dict[str, float]:
    """Calls of functions: of a recorder that is opened and left, of a recorded call, and of what is read."""
    open_and_leave(model)
    rec = recorded(model, x)
    layers = len(rec.maps)
    found: dict[str, float] = {"layers": layers, "open and leave": count_calls(partial(open_and_leave, model))}
    bare = count_calls(partial(model, x))
    for title, options in (("recorded call", {}), ("call kept", {"keep": "maps"})):
        with AttentionRecorder(model, **options):
            model(x)
            found[title] = round((count_calls(partial(model, x)) - bare) / layers, 1)
    m = rec.maps[-1]
    for title, read in READS.items():
        try:
            read(rec, m)
        except Exception:
            continue
        found[title] = count_calls(partial(read, rec, m))
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    for kind in matching(sys.argv[1] if len(sys.argv) > 1 else "*", KINDS):
        print(kind, counted(*KINDS[kind]()))
