"""What recording costs the CPU: microseconds of one call of an attention module whose map nobody reads, by part.

usage: python benchmarks/hook.py [--rounds 100] [--model vit_small_patch16_224] [--batch 1] [--out hook-cpu.json]

The model is hollow: its attention modules are called as deep in the stack as they are, with what a block gives them, and return
their input at once; nothing else runs. Its forwards take turns: with nothing on it, with a hook of PyTorch's that does nothing
on each attention module, with a recorder of the first layer, with a recorder of all. From the last two follows what a layer
costs more, and from what is left what a forward costs once: the hooks of the model and of its stem.

A part of a recorded call is what a forward takes less when the part is left out, a known result in its place. Parts are not
timed alone: what is called again and again lies in the nearest cache, and costs a half or a third of what it does in its turn.
Since they push each other out of it, parts add up to somewhat more than the whole. Operators of torch are counted, too.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import timm
import torch
from throughput import machine, spread, versions
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from hookattn import AttentionRecorder
from hookattn.calls import call, hooks, layer
from hookattn.conditions.changes import Samples
from hookattn.recording.passes import ForwardPasses
from hookattn.recording.record import Recording

RESULTS = Path(__file__).parent / "results" / "hook-cpu.json"
FORWARDS = 20  # in one measurement
GIVEN: dict[str, Any] = {"attn_mask": None, "is_causal": False}  # what a block of timm calls its attention with, besides x
PARTS: dict[str, list[tuple[Any, str]]] = {
    "is it compiled or traced?": [(hooks, "is_traced")],
    "is it a forward that is recorded, and which?": [(ForwardPasses, "is_recorded_here"), (ForwardPasses, "current")],
    "arguments": [(call, "keep_arguments")],
    "is the module as it was looked up?": [(layer.Layer, "refreshed")],
    "autocast": [(call, "autocast_now")],
    "caches and moving buffers": [(layer.Layer, "state_now"), (layer.Layer, "mutable_now")],
    "stamps of x and of parameters": [(layer, "stamps_of_arguments"), (layer, "stamps")],
    "some values of parameters": [(Samples, "take")],
    "hooks of others": [(layer, "_hooks_of_others"), (hooks.Around, "is_followed")],
    "the map and its geometry": [(Recording, "map_of")],
}


class Hollow(nn.Module):
    """The modules of a ViT, each called by the one that calls it, and nothing computed."""

    def __init__(self, model: Any, batch: int) -> None:
        super().__init__()
        self.patch_embed, self.blocks = model.patch_embed, model.blocks
        self.attentions: list[nn.Module] = [block.attn for block in model.blocks]
        self.x = torch.randn(batch, model.pos_embed.shape[1], model.embed_dim)
        self.images = torch.randn(batch, 3, *model.patch_embed.img_size)
        self.patch_embed.forward = lambda _: self.x
        for block in self.blocks:
            block.forward = partial(block.attn, **GIVEN)
            block.attn.forward = lambda x, **_: x

    def forward(self, images: Tensor) -> Any:
        return self.blocks(self.patch_embed(images))


@contextmanager
def doing_nothing(model: Hollow) -> Iterator[None]:
    """A hook on each attention module that does nothing."""
    with ExitStack() as stack:
        for module in model.attentions:
            stack.enter_context(module.register_forward_pre_hook(lambda *_: None, with_kwargs=True))
        yield


CASES: dict[str, Callable[[Hollow], AbstractContextManager[Any]]] = {
    "bare": lambda _: nullcontext(),
    "hooks that do nothing": doing_nothing,
    "one layer recorded": lambda model: AttentionRecorder(model, "blocks.0.attn"),
    "all recorded": AttentionRecorder,
}


def known(model: Hollow, owner: Any, name: str) -> Callable[..., Any]:
    """A function that returns what another one returned last, in a forward that is recorded."""
    if name == "current":
        return lambda forwards, _: forwards.all[-1]  # the map must go into the one that runs
    function, seen = getattr(owner, name), []

    def note(*args: Any, **kwargs: Any) -> Any:
        seen.append(function(*args, **kwargs))
        return seen[-1]

    with mock.patch.object(owner, name, note), AttentionRecorder(model):
        model(model.images)
    return lambda *_, **__: seen[-1]


@contextmanager
def without(model: Hollow, part: list[tuple[Any, str, Callable[..., Any]]]) -> Iterator[None]:
    """All recorded, but for a part."""
    with ExitStack() as stack:
        for owner, name, result in part:
            stack.enter_context(mock.patch.object(owner, name, result))
        stack.enter_context(AttentionRecorder(model))
        yield


def timed(model: Hollow) -> float:
    """Microseconds of one of several forwards."""
    model(model.images)
    began = time.perf_counter()
    for _ in range(FORWARDS):
        model(model.images)
    return (time.perf_counter() - began) / FORWARDS * 1e6


@torch.no_grad()
def measured(model: Hollow, rounds: int) -> dict[str, Any]:
    """Microseconds of forwards: by case, and with one part left out."""
    parts = {title: [(owner, name, known(model, owner, name)) for owner, name in part] for title, part in PARTS.items()}
    cases = CASES | {title: partial(without, part=part) for title, part in parts.items()}
    times: dict[str, list[float]] = {title: [] for title in cases}
    for _ in range(rounds):
        for title, case in cases.items():
            with case(model):
                times[title].append(timed(model))
    return {title: spread(each) for title, each in times.items()}


def summed_up(forwards: dict[str, Any], how: str, layers: int) -> dict[str, Any]:
    """What a recorded call costs, what a forward costs once, and what of a call is which part."""
    bare, hooked, one, every = (forwards[title][how] for title in CASES)
    call = (every - one) / (layers - 1)
    parts = {"PyTorch, for any hook": (hooked - bare) / layers}
    parts |= {title: (every - forwards[title][how]) / layers for title in PARTS}
    return {"call": call, "once_per_forward": one - bare - call, "parts": parts}


class Operators(TorchDispatchMode):
    """Counts the operators that run."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def operators(model: Hollow, grad: bool) -> int:
    """How many operators a forward calls for the recorder; where there is a graph, x comes from it."""
    model.x.requires_grad_(grad)
    with AttentionRecorder(model), torch.set_grad_enabled(grad), Operators() as counted:
        model(model.images)
    model.x.requires_grad_(False)
    return counted.count


def table(results: dict[str, Any]) -> str:
    best, middle, counts = results["best"], results["median"], results["operators"]
    rows = [(title, each, middle["parts"][title]) for title, each in best["parts"].items()]
    return "\n".join(
        [
            f"{results['model']}, batch {results['batch']}, {results['layers']} layers, {results['machine']['cpu']}",
            f"a recorded call, nothing read: {best['call']:.1f} µs at best, {middle['call']:.1f} in the median",
            f"once per forward: {best['once_per_forward']:.1f} µs at best, {middle['once_per_forward']:.1f} in the median",
            f"operators called in a forward: {counts['no grad']}; where x is cut off from a graph: {counts['grad']}",
            "\n| part of a recorded call | best, µs | median, µs | share |\n|---|---|---|---|",
            *(f"| {title} | {a:.1f} | {b:.1f} | {a / best['call']:.0%} |" for title, a, b in rows),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--model", default="vit_small_patch16_224", help="a ViT of timm")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS)
    o = parser.parse_args()
    torch.set_num_threads(1)
    model = Hollow(timm.create_model(o.model), o.batch).eval()
    results: dict[str, Any] = {"machine": machine("cpu"), "versions": versions(), "model": o.model, "batch": o.batch}
    results |= {"layers": (layers := len(model.attentions)), "rounds": o.rounds, "forwards_per_measurement": FORWARDS}
    results["microseconds_of_a_forward"] = forwards = measured(model, o.rounds)
    results |= {"best": summed_up(forwards, "min", layers), "median": summed_up(forwards, "median", layers)}
    results["operators"] = {"no grad": operators(model, grad=False), "grad": operators(model, grad=True)}
    o.out.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
