"""What Python costs around a model: calls of functions, counted, and times over those of the bare arithmetic.

usage: python benchmarks/overhead.py [--rounds 30] [--kinds "vit*,swin*"] [--device cpu|cuda]
           [--out benchmarks/results/overhead-cpu.json]

On a GPU a model at batch 1 waits for Python, and Python can be measured without one. Calls of Python's and of C's functions are
counted by `sys.setprofile`, which gives the same number each time; tests/house/test_overhead.py holds them. Times are of one
thread and one image, in turns, and mean something beside what was measured in the same rounds: the bare arithmetic of one row
and of one map, and of the rows of all layers.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from command import RESULTS, matching, plain_parser, write_results
from machine import describe_machine, in_words, installed_versions
from measure import in_turns, spread, timed
from torch import Tensor, nn

from hookattn import AttentionMap, AttentionRecorder


class HandAttention(nn.Module):
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


Made = tuple[Any, Tensor]
WINDOWS = {"embed_dim": 16, "num_heads": (1, 2, 4, 8)}


def of_timm(name: str, size: int, small: dict[str, Any], *, is_small: bool) -> Made:
    """A model of timm, small in all but its layers if that is enough, and one image."""
    return timm.create_model(name, **(small if is_small else {})).eval(), torch.randn(1, 3, size, size)


def encoder(*, is_small: bool) -> Made:
    width, heads = (48, 3) if is_small else (384, 6)
    layer = nn.TransformerEncoderLayer(width, heads, 4 * width, batch_first=True)
    return nn.TransformerEncoder(layer, 12, enable_nested_tensor=False).eval(), torch.randn(1, 197, width)


def by_hand(*, is_small: bool) -> Made:
    width, heads = (48, 3) if is_small else (384, 6)
    return nn.Sequential(*[HandAttention(width, heads) for _ in range(12)]).eval(), torch.randn(1, 197, width)


NARROW = {"embed_dim": 48, "num_heads": 3}
KINDS: dict[str, Callable[..., Made]] = {
    "vit_small_patch16_224": partial(of_timm, "vit_small_patch16_224", 224, NARROW),
    "vit_large_patch16_224": partial(of_timm, "vit_large_patch16_224", 224, NARROW),
    "swin_base_patch4_window7_224": partial(of_timm, "swin_base_patch4_window7_224", 224, WINDOWS),
    "vit_small_patch16_dinov3": partial(of_timm, "vit_small_patch16_dinov3", 256, NARROW),
    "nn.TransformerEncoder": encoder,
    "no recipe": by_hand,
}
RECORDED: dict[str, dict[str, Any]] = {
    "recorded call": {},
    'recorded call, keep="maps"': {"keep": "maps"},
    "recorded call, a row reduced": {"keep": lambda m: m[:, :, 0]},
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


def open_and_leave(model: nn.Module) -> None:
    with AttentionRecorder(model):
        pass


def reads_of(rec: AttentionRecorder) -> dict[str, Callable[[], Any]]:
    """What is read, by name; of a model that sees no image there are fewer."""
    m: AttentionMap = rec.maps[-1]
    reads: dict[str, Callable[[], Any]] = {"row": lambda: m[:, :, 0], "map": lambda: m[...]}
    if m._geometry.image_size is not None:  # type: ignore[union-attr]
        query = "cls" if "cls" in m.tokens.prefix else (0, 0)
        reads["image"] = lambda: m.image(query)
        reads["rows of all layers"] = lambda: rec.rows(query)
    return reads


@torch.no_grad()
def counted(model: nn.Module, x: Tensor) -> dict[str, float]:
    """Calls of functions: of a recorder that is opened and left, of a recorded call, and of what is read."""
    open_and_leave(model)
    found: dict[str, float] = {"open and leave": count_calls(partial(open_and_leave, model))}
    bare = count_calls(partial(model, x))
    layers = len(AttentionRecorder(model).layers)
    for title, options in RECORDED.items():
        with AttentionRecorder(model, **options):
            model(x)
            found[title] = round((count_calls(partial(model, x)) - bare) / layers, 1)
    with AttentionRecorder(model) as rec:
        model(x)
    for title, read in reads_of(rec).items():
        read()
        found[title] = count_calls(read)
    if "rows of all layers" in found:
        with AttentionRecorder(model) as rec:
            run = partial(forward_and_rows, model, x, rec)
            run()
            recorded = count_calls(partial(model, x))
            found["rows of all layers, the first of a forward"] = count_calls(run) - recorded
    with torch.enable_grad(), AttentionRecorder(model):  # whose graph arguments are cut off from
        model(x)
        found["recorded call, with a graph"] = round((count_calls(partial(model, x)) - bare) / layers, 1)
    with torch.inference_mode(), AttentionRecorder(model) as rec:  # in which tensors have no version
        model(x)
        found["recorded call, inference mode"] = round((count_calls(partial(model, x)) - bare) / layers, 1)
        read = reads_of(rec)["row"]
        read()
        found["row, inference mode"] = count_calls(read)
    return {"layers": layers, **found}


def forward_and_rows(model: nn.Module, x: Tensor, rec: AttentionRecorder) -> None:
    model(x)
    rec.rows(0)


def bare_row(attention: Any, x: Tensor) -> Tensor:
    """The class token's row of timm's plain attention, as little as can be done for it."""
    heads, width = attention.num_heads, x.shape[-1]
    weight, bias = attention.qkv.weight, attention.qkv.bias
    q = F.linear(x[:, :1], weight[:width], bias[:width]).view(1, heads, -1) * attention.head_dim**-0.5
    absorbed = torch.bmm(q.transpose(0, 1), weight[width : 2 * width].view(heads, -1, width))
    return (absorbed.transpose(0, 1) @ x.mT).softmax(-1)


def bare_map(attention: Any, x: Tensor) -> Tensor:
    """All of its map."""
    heads, width = attention.num_heads, x.shape[-1]
    qk = F.linear(x, attention.qkv.weight[: 2 * width], attention.qkv.bias[: 2 * width])
    q, k = qk.view(x.shape[1], 2, heads, -1).permute(1, 2, 0, 3)
    return torch.baddbmm(q.new_empty(1, 1, 1), q, k.mT, beta=0, alpha=attention.head_dim**-0.5).softmax(-1)


@torch.no_grad()
def timed_vit(model: Any, x: Tensor, rounds: int) -> dict[str, Any]:
    """Seconds of everything that is done around a ViT, and of the bare arithmetic beside it."""
    with AttentionRecorder(model) as rec:
        model(x)
    attentions, inputs = [block.attn for block in model.blocks], [m.x for m in rec.maps.values()]
    runs: dict[str, Callable[[], Any]] = {
        "open and leave": partial(open_and_leave, model),
        "bare row": lambda: bare_row(attentions[-1], inputs[-1]),
        "bare map": lambda: bare_map(attentions[-1], inputs[-1]),
        "bare rows": lambda: [bare_row(attention, given) for attention, given in zip(attentions, inputs)],
        **reads_of(rec),
    }
    for read, bare in (("row", "bare row"), ("map", "bare map")):
        torch.testing.assert_close(runs[read]().flatten(), runs[bare]().flatten(), rtol=1e-4, atol=1e-6)
    turns = {title: partial(lambda run, _: timed(lambda _: run(), [x], 10), run) for title, run in runs.items()}
    return {title: spread(list(times.values())) for title, times in in_turns(turns, rounds).items()}


def table(results: dict[str, Any]) -> str:
    kinds = results["calls"]
    rows = [title for title in next(iter(kinds.values())) if title != "layers"]
    names = [f"{kind}, {each['layers']} layers" for kind, each in kinds.items()]
    lines = [f"| {row} | {' | '.join(f'{k[row]:,.0f}' if row in k else '' for k in kinds.values())} |" for row in rows]
    times = {title: each["min"] * 1e6 for title, each in results["seconds"].items()}
    over = {"row": "bare row", "map": "bare map", "image": "bare row", "rows of all layers": "bare rows"}
    seen = [f"| {t} | {times[t]:,.0f} | {f'{times[t] / times[over[t]]:.1f}' if t in over else ''} |" for t in times]
    return "\n".join(
        [
            f"{in_words(results)}\n",
            f"| calls of functions | {' | '.join(names)} |",
            "|---" * (len(kinds) + 1) + "|",
            *lines,
            f"\n| {results['timed']}, batch 1, one thread | best, µs | over bare |\n|---|---|---|",
            *seen,
        ]
    )


def main() -> None:
    parser = plain_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--kinds", default="*", help=f"globs of {', '.join(KINDS)}")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path)
    o = parser.parse_args()
    o.out = o.out or RESULTS / f"overhead-{o.device}.json"
    torch.set_num_threads(1)
    results: dict[str, Any] = {"machine": describe_machine(o.device), "versions": installed_versions()}

    def made(kind: str) -> Made:
        model, x = KINDS[kind](is_small=False)
        return model.to(o.device), x.to(o.device)

    results["calls"] = {kind: counted(*made(kind)) for kind in matching(o.kinds, KINDS)}
    results["timed"] = "vit_small_patch16_224"
    results["seconds"] = timed_vit(*made(results["timed"]), o.rounds)
    write_results(results, o.out)
    print(table(results))


if __name__ == "__main__":
    main()
