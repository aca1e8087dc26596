"""What is measured: the fused model alone, and hookattn on it. Others' ways are in peers.py."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from measure import Returned, Run, peak_memory, timed
from torch import Tensor, nn

from hookattn import AttentionRecorder
from hookattn.analysis import compute_statistics, contributions, entropy, head_mean, mean_attention_distance, received


class NotHereError(Exception):
    """A case that there is not: of this model, on this device, or with what is installed."""


@dataclass
class Setup:
    """What a case is given.

    Attributes:
        models: what was built once: the model itself under "timm", others' models, twins that share its parameters.
        inputs: what it is called with, in turns: images, (batch, 3, size, size), or tokens, (batch, tokens, width).
        compiled: whether models go through `torch.compile`.
    """

    models: dict[str, Any]
    inputs: list[Tensor]
    compiled: bool = False

    @property
    def device(self) -> torch.device:
        return self.inputs[0].device

    def once(self, key: str, build: Callable[[], Any]) -> Any:
        """What was built under a key; built now if it is asked for the first time."""
        if key not in self.models:
            self.models[key] = build()
        return self.models[key]

    def twin(self, key: str, change: Callable[[Any], Any], of: str = "timm") -> Any:
        """A copy that shares parameters and buffers and is changed in some way; compiled if the setup says so."""
        return self.ready(key, lambda: change(twin(self.models[of])))

    def ready(self, key: str = "timm", build: Callable[[], Any] | None = None) -> Any:
        """A model as it is measured: as it is, or compiled."""
        model = self.once(key, build) if build else self.models[key]
        return self.once(f"{key}, compiled", lambda: torch.compile(model)) if self.compiled else model


@dataclass(frozen=True)
class Case:
    """One row of a table.

    Attributes:
        key, title: its name, and in words.
        open: a context with what is measured.
        base: key of the case it is divided by.
        reads: "rows", "head", "maps", "statistics" or "gradients" of all layers, or "" for nothing.
        family: whose model it runs: the one of `Setup.models` whose softmaxes are right.
        grad: whether it runs with grad.
        peer: whether it is somebody else's way.
    """

    key: str
    title: str
    open: Callable[[Setup], AbstractContextManager[Run]]
    base: str = "fused"
    reads: str = ""
    family: str = "timm"
    grad: bool = False
    peer: bool = False

    @contextmanager
    def running(self, s: Setup) -> Iterator[Run]:
        with self.open(s) as run, torch.set_grad_enabled(self.grad):
            yield run


CASES: dict[str, Case] = {}
Generator = Callable[[Setup], Iterator[Run]]


def case(title: str, **about: Any) -> Callable[[Generator], Generator]:
    """File a generator that yields what is measured, and clears up afterwards, under its name."""

    def add(function: Generator) -> Generator:
        CASES[function.__name__] = Case(function.__name__, title, contextmanager(function), **about)
        return function

    return add


def time_of(s: Setup, c: Case, turn: int = 0, times: int = 1) -> float:
    """Open a case, measure it once and close it."""
    inputs = [s.inputs[(turn + i) % len(s.inputs)] for i in range(len(s.inputs))]
    with c.running(s) as run:
        return timed(run, inputs, times)


def memory_of(s: Setup, c: Case) -> int:
    """Open a case, look at its peak memory and close it."""
    with c.running(s) as run:
        return peak_memory(run, s.inputs[0])


def clear(s: Setup) -> None:
    """Let go of what the case before has left."""
    s.models["timm"].zero_grad(set_to_none=True)
    gc.collect()
    if s.device.type == "cuda":
        torch.cuda.empty_cache()


def twin(model: nn.Module) -> Any:
    """A copy that shares parameters and buffers."""
    return copy.deepcopy(model, {id(t): t for t in (*model.parameters(), *model.buffers())})


def attentions_of(model: nn.Module) -> list[Any]:
    """timm's attention modules that have a projection to queries, keys and values in one."""
    return [m for m in model.modules() if hasattr(m, "qkv") and hasattr(m, "num_heads")]


def through(model: Any, x: Tensor) -> Tensor:
    """A forward and a backward to the parameters."""
    model.zero_grad(set_to_none=True)
    output: Tensor = model(x)
    output[:, 0].sum().backward()
    return output.detach()


def read_after(s: Setup, index: Any, **options: Any) -> Iterator[Run]:
    """A recorder that is open while forwards run, and an index of each map after each."""
    model = s.ready()
    with AttentionRecorder(model, **options) as rec:
        yield lambda x: (model(x), [m[index] for m in rec.maps.values()])


@case("the fused model alone")
def fused(s: Setup) -> Iterator[Run]:
    model = s.ready()
    yield lambda x: (model(x), [])


@case("the same again (noise)")
def fused_again(s: Setup) -> Iterator[Run]:
    yield from fused(s)


@case("recorder, nothing read")
def nothing_read(s: Setup) -> Iterator[Run]:
    model = s.ready()
    with AttentionRecorder(model):
        yield lambda x: (model(x), [])


@case("recorder opened and closed around each forward, nothing read")
def opened_each_time(s: Setup) -> Iterator[Run]:
    model = s.ready()

    def run(x: Tensor) -> Returned:
        with AttentionRecorder(model):
            return model(x), []

    yield run


@case("row of the first token, every layer", reads="rows")
def class_rows(s: Setup) -> Iterator[Run]:
    yield from read_after(s, (slice(None), slice(None), 0))


@case("the same, read together: rec.rows", reads="rows")
def rows_together(s: Setup) -> Iterator[Run]:
    model = s.ready()
    if getattr(model, "cls_token", None) is None:
        raise NotHereError("there is no class token")
    with AttentionRecorder(model) as rec:
        yield lambda x: (model(x), list(rec.rows("cls").values()))


@case("the same, while the model runs", reads="rows")
def rows_in_forward(s: Setup) -> Iterator[Run]:
    model = s.ready()
    with AttentionRecorder(model, keep=lambda m: m[:, :, 0]) as rec:
        yield lambda x: (model(x), list(rec.reduced.values()))


@case("one head, every layer", reads="head")
def one_head(s: Setup) -> Iterator[Run]:
    yield from read_after(s, (slice(None), 0))


@case("all maps, read after the forward", reads="maps")
def all_maps(s: Setup) -> Iterator[Run]:
    yield from read_after(s, ...)


@case('all maps, keep="maps"', reads="maps")
def keep_maps(s: Setup) -> Iterator[Run]:
    yield from read_after(s, ..., keep="maps")


@case('all maps, keep="maps", moved to the CPU', reads="maps")
def keep_maps_cpu(s: Setup) -> Iterator[Run]:
    if s.device.type == "cpu":
        raise NotHereError("only on a GPU")
    yield from read_after(s, ..., keep="maps", device="cpu")


@case("statistics without maps: entropy, attention received, head mean, distance", reads="statistics")
def statistics_without_maps(s: Setup) -> Iterator[Run]:
    model, wanted = s.ready(), (entropy, received, head_mean, mean_attention_distance)
    with AttentionRecorder(model) as rec:
        yield lambda x: (model(x), [found for m in rec.maps.values() for found in compute_statistics(m, *wanted)])


@case("the same, while the model runs", reads="statistics")
def statistics_in_forward(s: Setup) -> Iterator[Run]:
    model, wanted = s.ready(), (entropy, received, head_mean, mean_attention_distance)
    with AttentionRecorder(model, keep=lambda m: compute_statistics(m, *wanted)) as rec:
        yield lambda x: (model(x), [found for each in rec.reduced.values() for found in each])


@case("keys of the last layer as descriptors on the grid")
def key_descriptors(s: Setup) -> Iterator[Run]:
    model = s.ready()
    with AttentionRecorder(model) as rec:
        yield lambda x: (model(x), [rec.maps[-1].k.image()])


@case("what each head adds to the class token, every layer")
def head_outputs(s: Setup) -> Iterator[Run]:
    model = s.ready()
    with AttentionRecorder(model) as rec:
        yield lambda x: (model(x), [m.output(queries=0) for m in rec.maps.values()])


@case("norms of contributions to the class token, every layer")
def contributions_of_class(s: Setup) -> Iterator[Run]:
    model = s.ready()
    with AttentionRecorder(model) as rec:
        yield lambda x: (model(x), [contributions(m)[:, :, 0] for m in rec.maps.values()])


def captured(s: Setup, call: Callable[[Tensor], Returned]) -> Run:
    """What is called, captured as a CUDA graph with an input of its own, and replayed."""
    if s.device.type == "cpu":
        raise NotHereError("only on a GPU")
    static, graph, side = s.inputs[0].clone(), torch.cuda.CUDAGraph(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.no_grad():
        with torch.cuda.stream(side):
            call(static)
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(graph):
            returned = call(static)

    def replay(x: Tensor) -> Returned:
        static.copy_(x)
        graph.replay()
        return returned

    return replay


def captured_with(s: Setup, index: Any, **options: Any) -> Iterator[Run]:
    """A forward and an index of each map, in one graph."""
    model = s.ready()
    with AttentionRecorder(model, **options) as rec:
        yield captured(s, lambda x: (model(x), [m[index] for m in rec.maps.values()]))


@case("the fused model alone, a CUDA graph", base="graph")
def graph(s: Setup) -> Iterator[Run]:
    model = s.ready()
    yield captured(s, lambda x: (model(x), []))


@case("row of the first token, every layer, in the graph", base="graph", reads="rows")
def graph_rows(s: Setup) -> Iterator[Run]:
    yield from captured_with(s, (slice(None), slice(None), 0))


@case('all maps, keep="maps", in the graph', base="graph", reads="maps")
def graph_maps(s: Setup) -> Iterator[Run]:
    yield from captured_with(s, ..., keep="maps")


@case("forward and backward of the fused model alone", base="backward", grad=True)
def backward(s: Setup) -> Iterator[Run]:
    model = s.ready()
    yield lambda x: (through(model, x), [])


@case("gradients=True, nothing read", base="backward", grad=True)
def gradients_nothing_read(s: Setup) -> Iterator[Run]:
    model = s.ready()
    with AttentionRecorder(model, gradients=True):
        yield lambda x: (through(model, x), [])


@case("gradients=True, gradients of all maps read", base="backward", reads="gradients", grad=True)
def gradients_read(s: Setup) -> Iterator[Run]:
    model = s.ready()
    with AttentionRecorder(model, gradients=True) as rec:
        yield lambda x: (through(model, x), [m.gradient[...] for m in rec.maps.values()])
