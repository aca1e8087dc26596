"""CUDA graphs, and what else a GPU alone shows: nobody waits for it, streams keep their order, what does not fit is told."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from support.inside import Values, is_capturing, random_streams
from support.models import TINY, tiny
from support.oracle import unfused
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from hookattn import AttentionRecorder, HookattnError, NoMapError, UnreadableError
from hookattn.analysis import rollout

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
pytestmark = [
    pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning"),  # a prototype, PyTorch says
    pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream:UserWarning"),  # torch 2.11, of graphs it makes itself
]
BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH, SDPBackend.CUDNN_ATTENTION]
KEPT: list[dict[str, Any]] = [{}, {"keep": "maps"}, {"gradients": True}]
NAMES = list(TINY)


def on_gpu(name: str, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[nn.Module, Tensor]:
    model, x = tiny(name, **options)
    return model.cuda().to(dtype), x.cuda().to(dtype)


class ByHand(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        a = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
        out: Tensor = self.out((a @ v).transpose(1, 2).flatten(2))
        return out


def by_hand() -> tuple[nn.Module, Tensor]:
    """Attention that has no recipe."""
    model = nn.Sequential(nn.LayerNorm(48), ByHand(48, 3), ByHand(48, 3))
    return model.cuda().eval(), torch.randn(2, 17, 48, device="cuda")


def multihead() -> tuple[nn.Module, Tensor]:
    layer = nn.TransformerEncoderLayer(48, 3, 96, dropout=0.0, batch_first=True)
    model = nn.Sequential(nn.LayerNorm(48), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))
    return model.cuda().eval(), torch.randn(2, 17, 48, device="cuda")


MADE: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    **{name: lambda name=name: on_gpu(name) for name in NAMES},  # type: ignore[misc]
    "by hand": by_hand,
    "nn.MultiheadAttention": multihead,
}


def maps_of(model: nn.Module, x: Tensor, **options: Any) -> list[Tensor]:
    with AttentionRecorder(model, **options) as rec, torch.no_grad():
        model(x)
    return [m[...] for m in rec.maps.values()]


@contextmanager
def nobody_waits() -> Iterator[None]:
    """Anything that waits for the GPU is an error meanwhile."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_while_a_graph_is_captured_nothing_is_waited_for_and_no_random_stream_is_asked_for() -> None:
    device = torch.device("cuda")
    with mock.patch.multiple(torch.cuda, is_initialized=lambda: True, is_current_stream_capturing=lambda: True):
        assert Values([torch.zeros(2)]) == Values([torch.ones(2)])  # neither of which has been computed by then
        with pytest.raises(UnreadableError, match=r"model.eval\(\) before the capture"):
            random_streams(device)
    assert Values([torch.zeros(2)]) != Values([torch.ones(2)])
    assert not is_capturing()


@needs_cuda
@pytest.mark.parametrize("kept", KEPT, ids=str)
@pytest.mark.parametrize("name", MADE)
def test_a_recorded_forward_waits_for_nothing(name: str, kept: dict[str, Any]) -> None:
    model, x = MADE[name]()

    def step() -> None:
        with torch.set_grad_enabled("gradients" in kept):
            out = model(x)
            if out.requires_grad:
                out.sum().backward()

    step()  # what is built once, as kernels and tables, may wait
    try:
        with nobody_waits():
            step()
    except RuntimeError as waits:
        pytest.skip(f"the model itself does: {waits}")
    with AttentionRecorder(model, **kept) as rec:
        step()
        with nobody_waits():
            step()
        assert all(m[...].isfinite().all() for m in rec.maps.values())  # nothing was lost because it waited
        if "gradients" in kept:
            assert all(m.gradient[...].isfinite().all() for m in rec.maps.values())


@needs_cuda
def test_gradients_that_are_computed_in_backward_look_first_whether_parameters_are_as_they_were() -> None:
    model, x = on_gpu("vit")
    with AttentionRecorder(model, gradients=True, keep="maps") as rec:
        out = model(x).sum()
        model.blocks[1].attn.qkv.weight.data.mul_(1.5)  # type: ignore[union-attr, index, operator]
        out.backward()
    assert rec.maps[0].gradient[...].isfinite().all()
    with pytest.raises(HookattnError, match=r"changed in place"):
        rec.maps[1].gradient[...]


@needs_cuda
@pytest.mark.parametrize("name", ["vit", "differential", "by hand"])
def test_reading_waits_only_to_see_that_nothing_has_changed(name: str) -> None:
    model, x = MADE[name]()
    with AttentionRecorder(model, keep="maps") as rec, torch.no_grad():
        model(x)
        with nobody_waits():
            for m in rec.maps.values():
                _ = m[:, :, 0], m[...]


@needs_cuda
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kept", KEPT[:2], ids=str)
@pytest.mark.parametrize("name", ["vit", "beit", "by hand", "nn.MultiheadAttention"])
def test_a_graph_is_captured_in_a_block_and_maps_are_those_of_its_last_replay(
    name: str, kept: dict[str, Any], training: bool
) -> None:
    model, x = MADE[name]()
    others = [torch.randn_like(x) for _ in range(2)]
    with torch.no_grad():
        expected = [model(o) for o in others]
    maps = [maps_of(model, o) for o in others]
    model.train(training)
    static, side = x.clone(), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), torch.cuda.stream(side):
        model(static)  # to warm up
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with AttentionRecorder(model, **kept) as rec, torch.no_grad():
        model(static)
        with torch.cuda.graph(graph):
            out = model(static)
        for other, output, right in zip(others, expected, maps):
            static.copy_(other)
            graph.replay()
            torch.testing.assert_close(out, output, rtol=0, atol=1e-5)
            if training:  # the capture goes on, and it is told why there is no map
                with pytest.raises(UnreadableError, match=r"model.eval\(\) before the capture"):
                    rec.maps[0][...]
                continue
            for m, expect in zip(rec.maps.values(), right):
                torch.testing.assert_close(m[...], expect, rtol=0, atol=1e-5)


@needs_cuda
def test_rows_that_are_read_while_a_graph_is_captured_are_those_of_each_replay() -> None:
    model, x = on_gpu("vit")
    others = [torch.randn_like(x) for _ in range(2)]
    right = [[m[:, :, 0] for m in maps_of(model, o)] for o in others]
    static, graph = x.clone(), torch.cuda.CUDAGraph()
    with torch.no_grad(), AttentionRecorder(model) as rec:
        model(static)
        rec.rows("cls")
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            model(static)
            rows = [*rec.rows("cls").values()]
    for other, expected in zip(others, right):
        static.copy_(other)
        graph.replay()
        torch.testing.assert_close(rows, expected, rtol=0, atol=1e-5)


@needs_cuda
def test_a_graph_that_was_captured_before_is_replayed_unnoticed() -> None:
    model, x = on_gpu("vit")
    graphed: Any = torch.cuda.make_graphed_callables(model, (x,), allow_unused_input=True)
    with torch.no_grad():
        expected = graphed(x).clone()
        with AttentionRecorder(graphed) as rec:
            torch.testing.assert_close(graphed(x), expected, rtol=0, atol=0)
    with pytest.raises(NoMapError, match=r"called none of"):
        rec.maps  # noqa: B018


@needs_cuda
@pytest.mark.parametrize("options", [{}, {"keep": "maps"}, {"keep": "maps", "device": "cpu"}], ids=str)
def test_forwards_on_another_stream(options: dict[str, Any]) -> None:
    model, x = on_gpu("vit")
    right = maps_of(model, x)
    slow = torch.randn(4096, 4096, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with AttentionRecorder(model, **options) as rec, torch.no_grad(), torch.cuda.stream(stream):
        for _ in range(20):
            slow @ slow  # the stream has much to do before it comes to this
        model(x)
    torch.cuda.current_stream().wait_stream(stream)
    for m, expected in zip(rec.maps.values(), right):
        torch.testing.assert_close(m[...].cuda(), expected, rtol=0, atol=1e-6)


@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_every_kernel_of_sdpa(backend: SDPBackend, dtype: torch.dtype) -> None:
    model, x = on_gpu("vit", dtype)
    with torch.no_grad(), sdpa_kernel([backend, SDPBackend.MATH]):
        expected = model(x)
        with AttentionRecorder(model) as rec, AttentionRecorder(model, keep="maps") as kept:
            assert torch.equal(model(x), expected)
        for name, m in rec.maps.items():
            torch.testing.assert_close(kept.maps[name][...], m[...], rtol=0, atol=1e-6)
            m.verify()


@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_every_mechanism_is_read_verified_and_differentiated(name: str, dtype: torch.dtype) -> None:
    model, x = on_gpu(name, dtype)
    expected = model(x)
    with AttentionRecorder(model, gradients=True) as rec:
        out = model(x)
        assert torch.equal(out, expected)
        out.float().square().sum().backward()
    with unfused(model) as softmaxes, torch.no_grad():
        model(x)
    for m in rec.maps.values():
        m.verify()
        assert m.gradient[...].isfinite().all()
    if len(softmaxes) == len(rec.maps):
        close = {torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 0.1}[dtype]  # of the unfused path, rounded there
        for m, own in zip(rec.maps.values(), softmaxes):
            torch.testing.assert_close(m[...].flatten(), own.float().flatten(), rtol=0, atol=close)


@needs_cuda
def test_a_map_that_does_not_fit_is_told_when_it_is_read_and_the_forward_goes_on() -> None:
    model, x = on_gpu("vit")
    with torch.no_grad():
        expected = model(x)
    x = x.repeat(2048, 1, 1, 1)
    with torch.no_grad():
        model(x)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    with torch.no_grad():
        model(x)
    peak = torch.cuda.max_memory_allocated() + 2**20
    torch.cuda.empty_cache()
    held = [torch.empty(torch.cuda.mem_get_info()[0] - peak - 2**26, dtype=torch.uint8, device="cuda")]
    try:
        with AttentionRecorder(model, keep="maps") as rec, torch.no_grad():
            out = model(x)
        torch.testing.assert_close(out[:2], expected, rtol=0, atol=1e-2)  # cuDNN takes convolutions in TF32
        for m in rec.maps.values():
            try:
                m[:2]
            except HookattnError as told:
                assert "memory" in str(told)  # noqa: PT017
    finally:
        held.clear()
        torch.cuda.empty_cache()


@needs_cuda
def test_what_is_read_is_smaller_than_a_map() -> None:
    model, x = on_gpu("vit", img_size=512)
    x = torch.randn(4, 3, 512, 512, device="cuda")
    with AttentionRecorder(model) as rec, torch.no_grad():
        model(x)
    m = rec.maps[-1]
    m[:, :, 0]
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    m[:, :, 0]
    assert torch.cuda.max_memory_allocated() - before < 4 * m[0, 0].nbytes // 8
    assert rollout(rec).device.type == "cuda"
