"""Modes of the user's that look at operators see those of the model alone: caches of checkpoints, counters, loggers."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from support.models import randomise
from timm.layers import Attention
from timm.models.eva import EvaAttention
from timm.models.swin_transformer import WindowAttention
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

from hookattn import AttentionRecorder

MODULES: dict[str, tuple[Any, int]] = {
    "packed": (lambda: Attention(48, 4, qkv_bias=True), 9),
    "norms of queries and keys": (lambda: Attention(48, 4, qk_norm=True, norm_layer=nn.LayerNorm), 9),
    "split": (lambda: EvaAttention(48, 4, qkv_fused=False, scale_norm=False), 9),
    "windows": (lambda: WindowAttention(48, 4, window_size=3), 9),
    "no recipe": (lambda: nn.TransformerEncoderLayer(48, 4, 48, dropout=0.0, batch_first=True), 9),
}
OPTIONS: list[dict[str, Any]] = [{}, {"keep": "maps"}, {"gradients": True}, {"gradients": True, "keep": "maps"}]


def made(name: str) -> tuple[nn.Module, Tensor]:
    make, tokens = MODULES[name]
    return randomise(make()).train(), torch.randn(2, tokens, 48, requires_grad=True)


def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if "mm" in str(op) else CheckpointPolicy.PREFER_RECOMPUTE


def gradients(module: nn.Module, x: Tensor, block: Any) -> list[Tensor]:
    """Of a step through a checkpoint that keeps some operators' outputs and makes others again."""
    module.zero_grad()
    x.grad = None
    contexts = partial(create_selective_checkpoint_contexts, policy)
    with block:
        out: Any = checkpoint(module, x, use_reentrant=False, context_fn=contexts)
        out.square().sum().backward()
    assert x.grad is not None
    return [x.grad.clone(), *(p.grad.clone() for p in module.parameters() if p.grad is not None)]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", MODULES)
def test_a_selective_checkpoint_gives_the_gradients_it_gives_without_a_recorder(name: str, options: dict[str, Any]) -> None:
    module, x = made(name)
    expected = gradients(module, x, nullcontext())
    got = gradients(module, x, AttentionRecorder(module, **options))
    assert len(got) == len(expected)
    assert all(map(torch.equal, got, expected))


class Log(TorchDispatchMode):
    """Names of operators, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", MODULES)
def test_a_mode_sees_the_operators_of_the_model_and_no_others(name: str, options: dict[str, Any]) -> None:
    module, x = made(name)

    def logged(block: Any) -> list[str]:
        module.zero_grad()
        x.grad = None
        with block, Log() as log:
            module(x).square().sum().backward()
        return log.names

    assert logged(AttentionRecorder(module, **options)) == logged(nullcontext())


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_operations_are_counted_as_without_a_recorder(options: dict[str, Any]) -> None:
    module, x = made("packed")

    def counted(block: Any) -> int:
        with block, FlopCounterMode(display=False) as counter:
            module(x)
        return int(counter.get_total_flops())

    assert counted(AttentionRecorder(module, **options)) == counted(nullcontext())
