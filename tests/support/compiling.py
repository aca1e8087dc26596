"""A compiler that counts its graphs, and what compilation leaves set for everybody."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo import eval_frame
from torch._dynamo.backends.debugging import aot_eager
from torch._functorch.aot_autograd import make_boxed_func
from torch.fx import GraphModule, Interpreter, Node
from torch.utils._pytree import tree_leaves

from hookattn import AttentionRecorder
from support.oracle import unfused
from support.reading import NAMES


class Counts:
    """A compiler that runs graphs as they are and counts them."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: Any, inputs: Any) -> Any:
        self.graphs += 1
        return graph.forward


class WritesOver(Interpreter):
    """Runs a graph, and writes over what it has used for the last time, as Inductor does, which gives the memory to others."""

    def run_node(self, node: Node) -> Any:
        if node.op == "placeholder":
            self.given = {*getattr(self, "given", ()), *_memory(made := super().run_node(node))}
            return made
        made, used = super().run_node(node), self.user_to_last_uses.get(node, [])
        live = self.given.union(_memory(made), *[_memory(value) for each, value in self.env.items() if each not in used])
        for at, storage in [at for each in used for at in _memory(self.env[each]).items()]:
            if at not in live:
                torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage).fill_(255)  # NaN, as floats
        return made


def _memory(values: Any) -> dict[int, Any]:
    storages = [t.untyped_storage() for t in tree_leaves(values) if isinstance(t, Tensor)]
    return {storage.data_ptr(): storage for storage in storages if storage.nbytes()}


def aot_writing_over(graph: Any, inputs: Any) -> Any:
    """A backend."""

    def run(graph: GraphModule, _inputs: Any) -> Any:
        return make_boxed_func(lambda *given: WritesOver(graph).run(*given))

    return aot_eager(graph, inputs, fw_compiler=run)


def stance() -> str:
    return eval_frame._stance.stance


def settings() -> list[Any]:
    """All that a recorder might leave set for everybody."""
    config = [(name, repr(value)) for name, value in torch._dynamo.config.get_config_copy().items()]
    modes = [torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")]
    return [eval_frame._stance, config, modes, torch._C._len_torch_function_stack(), list(sys.meta_path), torch.compile]


@contextmanager
def nothing_set() -> Iterator[None]:
    before = settings()
    try:
        yield
    finally:
        assert settings() == before


@torch.no_grad()
def softmaxes(call: Callable[[Tensor], Any], model: nn.Module, x: Tensor) -> list[Tensor]:
    with unfused(model) as maps:
        call(x)
    return maps


def agree(rec: AttentionRecorder, expected: list[Tensor], tolerance: float = 1e-6) -> None:
    """Complete, in order and exact."""
    assert [name.replace("._orig_mod", "") for name in rec.maps] == NAMES
    for m, softmax in zip(rec.maps.values(), expected, strict=True):
        torch.testing.assert_close(m[...], softmax, rtol=0, atol=tolerance)


# Ways to compile a model: what is recorded then, and what is called


def the_model(model: Any, **options: Any) -> tuple[Any, Any]:
    return model, torch.compile(model, **options)


def the_compiled_model(model: Any, **options: Any) -> tuple[Any, Any]:
    compiled = torch.compile(model, **options)
    return compiled, compiled


def model_compile(model: Any, **options: Any) -> tuple[Any, Any]:
    model.compile(**options)
    return model, model


def block_compile(model: Any, **options: Any) -> tuple[Any, Any]:
    for block in model.blocks:
        block.compile(**options)
    return model, model


def one_block_compile(model: Any, **options: Any) -> tuple[Any, Any]:
    model.blocks[1].compile(**options)
    return model, model


def blocks_replaced(model: Any, **options: Any) -> tuple[Any, Any]:
    model.blocks = nn.Sequential(*[torch.compile(block, **options) for block in model.blocks])  # type: ignore[call-overload]
    return model, model


def attention_compile(model: Any, **options: Any) -> tuple[Any, Any]:
    for block in model.blocks:
        block.attn.compile(**options)
    return model, model


def attention_replaced(model: Any, **options: Any) -> tuple[Any, Any]:
    for block in model.blocks:
        block.attn = torch.compile(block.attn, **options)
    return model, model


def function_around(model: Any, **options: Any) -> tuple[Any, Any]:
    return model, torch.compile(lambda images: model(images).softmax(-1), **options)


def method_of_the_model(model: Any, **options: Any) -> tuple[Any, Any]:
    return model, torch.compile(model.forward_features, **options)


WAYS = [
    the_model,
    the_compiled_model,
    model_compile,
    block_compile,
    one_block_compile,
    blocks_replaced,
    attention_compile,
    attention_replaced,
    function_around,
    method_of_the_model,
]
