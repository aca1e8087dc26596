"""What recording costs the CPU: microseconds of one call of an attention module whose map nobody reads, by part.

usage: python benchmarks/hook.py [--rounds 100] [--model vit_small_patch16_224] [--batch 1] [--device cpu|cuda]
           [--out hook-cpu.json]

The model is hollow: its attention modules are called as deep in the stack as they are, with what a block gives them, and return
their input at once; nothing else runs. Its forwards take turns: with nothing on it, with a hook of PyTorch's that does nothing
on each attention module, with a recorder of the first layer, with a recorder of all. From the last two follows what a layer
costs more, and from what is left what a forward costs once: the hooks of the model and of its stem.

A part of a recorded call is what a forward takes less when the part is left out, a known result in its place. Parts are not
timed alone: what is called again and again lies in the nearest cache, and costs a half or a third of what it does in its turn.
Since they push each other out of it, parts add up to somewhat more than the whole. Operators of torch are counted, too.
Parts are named by where they stand in hookattn; one that stands there no more is said to be gone, and the rest is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from pkgutil import resolve_name
from typing import Any
from unittest import mock

import timm
import torch
from command import RESULTS, plain_parser, write_results
from machine import describe_machine, in_words, installed_versions
from measure import in_turns, spread, timed
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from hookattn import AttentionRecorder

FORWARDS = 20  # in one measurement
GIVEN: dict[str, Any] = {"attn_mask": None, "is_causal": False}  # what a block of timm calls its attention with, besides x
CURRENT = "recording.passes:ForwardPasses.current"
FRESH = "calls.layer:Layer.is_as_it_was"
PARTS: dict[str, tuple[str, ...]] = {
    "is it compiled or traced?": ("calls.hooks:is_traced",),
    "is it a forward that is recorded, and which?": (CURRENT,),
    "arguments": ("calls.call:keep_arguments",),
    "is the module as it was looked up?": (FRESH,),
    "autocast": ("calls.call:autocast_now",),
    "caches and moving buffers": ("calls.layer:Layer.mutable_now",),
    "stamps of x and of parameters": ("calls.layer:stamps",),
    "some values of x": ("calls.layer:values_of_arguments",),
    "some values of parameters": ("conditions.samples:Samples.take",),
    "hooks of others": ("calls.hooks:Around.is_followed",),
    "the map and its geometry": ("recording.record:Recording.map_of",),
}


class Hollow(nn.Module):
    """The modules of a ViT, each called by the one that calls it, and nothing computed."""

    def __init__(self, model: Any, batch: int) -> None:
        super().__init__()
        self.patch_embed, self.blocks = model.patch_embed, model.blocks
        self.attentions: list[nn.Module] = [block.attn for block in model.blocks]
        device = model.pos_embed.device
        self.x = torch.randn(batch, model.pos_embed.shape[1], model.embed_dim, device=device)
        self.images = torch.randn(batch, 3, *model.patch_embed.img_size)  # on the CPU, for `timed` to take the time of Python
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


def owner_of(place: str) -> tuple[Any, str]:
    """What is patched to leave out the function at some place."""
    module, _, name = place.partition(":")
    *path, last = name.split(".")
    owner = resolve_name(f"hookattn.{module}:{'.'.join(path)}")
    getattr(owner, last)
    return owner, last


def known(model: Hollow, place: str) -> Callable[..., Any]:
    """A function that returns what the one at some place returned last, in a forward that is recorded."""
    if place == CURRENT:
        return lambda forwards, _: forwards.all[-1]  # the map must go into the one that runs
    owner, name = owner_of(place)
    function, seen = getattr(owner, name), []

    def note(*args: Any, **kwargs: Any) -> Any:
        seen.append(function(*args, **kwargs))
        return seen[-1]

    with mock.patch.object(owner, name, note), AttentionRecorder(model):
        model(model.images)
    return lambda *_, **__: seen[-1]


@contextmanager
def without(model: Hollow, part: dict[str, Callable[..., Any]]) -> Iterator[None]:
    """All recorded, but for a part."""
    with ExitStack() as stack:
        for place, result in part.items():
            stack.enter_context(mock.patch.object(*owner_of(place), result))
        stack.enter_context(AttentionRecorder(model))
        yield


def parts_of(model: Hollow) -> tuple[dict[str, dict[str, Callable[..., Any]]], dict[str, str]]:
    """What stands in for the functions of each part; and for each part that is gone, why."""
    found, gone = {}, {}
    for title, places in PARTS.items():
        try:
            found[title] = {place: known(model, place) for place in places}
        except (ImportError, AttributeError, IndexError) as error:  # moved, renamed, or not called any more
            gone[title] = f"{type(error).__name__}: {error}"
    return found, gone


def time_of(model: Hollow, case: Callable[[Hollow], AbstractContextManager[Any]], _: int) -> float:
    """Microseconds of one of several forwards, after one that warms up."""
    with case(model):
        model(model.images)
        return timed(model, [model.images], FORWARDS) * 1e6


def summed_up(forwards: dict[str, Any], how: str, layers: int) -> dict[str, Any]:
    """What a recorded call costs, what a forward costs once, and what of a call is which part."""
    bare, hooked, one, every = (forwards[title][how] for title in CASES)
    call = (every - one) / (layers - 1)
    parts = {"PyTorch, for any hook": (hooked - bare) / layers}
    parts |= {title: (every - forwards[title][how]) / layers for title in PARTS if title in forwards}
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
    in_sight = mock.patch("hookattn.calls.hooks.unseen_by_modes", nullcontext)  # hooks hide from modes that look at operators
    with in_sight, AttentionRecorder(model), torch.set_grad_enabled(grad), Operators() as counted:
        model(model.images)
    model.x.requires_grad_(False)
    return counted.count


def table(results: dict[str, Any]) -> str:
    best, middle, counts = results["best"], results["median"], results["operators"]
    rows = [(title, each, middle["parts"][title]) for title, each in best["parts"].items()]
    return "\n".join(
        [
            f"* {results['model']}, batch {results['batch']}, {results['layers']} layers; {in_words(results)}",
            f"* A recorded call, nothing read: {best['call']:.1f} µs at best, {middle['call']:.1f} in the median.",
            f"* Once per forward: {best['once_per_forward']:.1f} µs at best, {middle['once_per_forward']:.1f} in the median.",
            f"* Operators called in a forward: {counts['no grad']}; where x is cut off from a graph: {counts['grad']}.",
            "\n| part of a recorded call | best, µs | median, µs | share |\n|---|---|---|---|",
            *(f"| {title} | {a:.1f} | {b:.1f} | {a / best['call']:.0%} |" for title, a, b in rows),
            *(f"| {title} | gone: {why} | | |" for title, why in results.get("gone", {}).items()),
        ]
    )


@torch.no_grad()
def measured(model: Hollow, rounds: int) -> dict[str, Any]:
    """What a recorded call costs, in all and by part."""
    parts, gone = parts_of(model)
    cases = CASES | {title: partial(without, part=part) for title, part in parts.items()}
    runs = {title: partial(time_of, model, case) for title, case in cases.items()}
    forwards = {title: spread(list(times.values())) for title, times in in_turns(runs, rounds).items()}
    layers = len(model.attentions)
    found: dict[str, Any] = {"layers": layers, "rounds": rounds, "forwards_per_measurement": FORWARDS}
    found |= {"microseconds_of_a_forward": forwards, "gone": gone}
    return found | {"best": summed_up(forwards, "min", layers), "median": summed_up(forwards, "median", layers)}


def main() -> None:
    parser = plain_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--model", default="vit_small_patch16_224", help="a ViT of timm")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="where parameters lie; the CPU's time is taken"
    )
    parser.add_argument("--out", type=Path)
    o = parser.parse_args()
    o.out = o.out or RESULTS / f"hook-{o.device}.json"
    torch.set_num_threads(1)
    model = Hollow(timm.create_model(o.model).to(o.device), o.batch).eval()
    results: dict[str, Any] = {"machine": describe_machine(o.device), "versions": installed_versions()}
    results |= {"model": o.model, "batch": o.batch, **measured(model, o.rounds)}
    results["operators"] = {"no grad": operators(model, grad=False), "grad": operators(model, grad=True)}
    write_results(results, o.out)
    print(table(results))


if __name__ == "__main__":
    main()
