"""Record a forward and read its maps, as most tests begin."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

from hookattn import AttentionMap, AttentionRecorder
from support.oracle import loss_of, unfused

NAMES = ["blocks.0.attn", "blocks.1.attn"]  # of a tiny ViT


def record(model: nn.Module, x: Any, **options: Any) -> AttentionRecorder:
    """A recorder that has seen one forward without a graph."""
    with AttentionRecorder(model, **options) as rec, torch.no_grad():
        model(x)
    return rec


def read(recorded: AttentionRecorder) -> dict[str, Tensor]:
    """All maps of the last forward."""
    return {name: m[...] for name, m in recorded.maps.items()}


def maps_of(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """The maps of one plain forward."""
    return read(record(model, images))


def same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    """Whether the same modules have the same maps, bit by bit, in the same order."""
    return list(got) == list(expected) and all(torch.equal(got[name], expected[name]) for name in got)


def backward_of(model: nn.Module, x: Tensor, loss: Callable[[Tensor], Tensor] = loss_of, **options: Any) -> AttentionRecorder:
    with AttentionRecorder(model, gradients=True, **options) as rec:
        loss(model(x)).backward()
    return rec


def compare_gradients(rec: AttentionRecorder, expected: dict[str, Tensor], tolerance: float = 1e-9) -> None:
    assert rec.maps
    for name, m in rec.maps.items():
        whole, largest = m.gradient[...], expected[name].abs().max()
        assert m.gradient.shape == whole.shape == m.shape
        assert largest > 0
        torch.testing.assert_close(whole / largest, expected[name].to(whole.dtype) / largest, rtol=0, atol=tolerance)
        torch.testing.assert_close(m.gradient[:, -1, 0] / largest, whole[:, -1, 0] / largest, rtol=0, atol=tolerance)


def own_softmaxes(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    with unfused(model) as outputs, torch.no_grad():
        model(x)
    return dict(zip(NAMES, outputs))


def furthest(got: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert list(got) == list(expected)
    return max(float((got[name] - expected[name]).abs().max()) for name in got)


def at_once(*jobs: Callable[[], Any]) -> list[Any]:
    """Run each job in a thread of its own; an error in one is raised here."""
    with ThreadPoolExecutor(len(jobs), thread_name_prefix="worker") as pool:
        return [future.result(timeout=60) for future in [pool.submit(job) for job in jobs]]


def elsewhere(job: Callable[[], Any]) -> Any:
    return at_once(job)[0]


def record_one(model: nn.Module, x: Any, layer: Any = 0, **options: Any) -> AttentionMap:
    """One map of a model."""
    with AttentionRecorder(model, **options) as rec, torch.set_grad_enabled(not options.get("detach", True)):
        model(x)
    return rec.maps[layer]


def attention_after(model: nn.Module, x: Tensor, **options: Any) -> AttentionMap:
    with AttentionRecorder(model, **options) as rec, torch.no_grad():
        model(x)
    m: AttentionMap = rec.maps[0]
    return m
