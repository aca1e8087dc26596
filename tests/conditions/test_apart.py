"""Where a model lies on another device or in another dtype than what it is called with here, both are told and what to type."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from support.models import tiny
from torch import Tensor, nn

import hookattn
from hookattn import AttentionRecorder, ModelError
from hookattn.analysis import grad_rollout, head_importance, relevance, rollout
from hookattn.testing import check_recipe

LABELS = torch.tensor([0, 1])


def loss(output: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(output.flatten(1), labels, reduction="none")


def importance(model: nn.Module, x: Tensor, kind: Any = "gradient") -> Any:
    return head_importance(model, [(x, LABELS)], loss, kind=kind)


CALLS: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "inspect": hookattn.inspect,
    "gradient": importance,
    "knockout": partial(importance, kind="knockout"),
}
LOAD = (
    r"152 of .* meta device and have no values, .*: give the model memory .* Where shapes are enough, images\.to\('meta'\)\. \("
)
APART: dict[str, tuple[Any, Any, str]] = {
    "a model on meta": ("meta", "cpu", r"lies on meta, and what it is called with on cpu: " + LOAD.replace("152", r"\d+")),
    "images on meta": (
        "cpu",
        "meta",
        "lies on cpu, and .* on meta, where there are shapes and no values: make that on cpu, too",
    ),
    "a model in halves": (torch.float16, "cpu", r"is torch\.float16, and .* torch\.float32: images\.to\(torch\.float16\)\."),
    "images in halves": ("cpu", torch.bfloat16, r"is torch\.float32, and .* torch\.bfloat16: images\.to\(torch\.float32\)\."),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("apart", APART)
def test_both_are_told_and_what_to_type(apart: str, call: str) -> None:
    model, x = tiny("vit")
    there, here, message = APART[apart]
    with pytest.raises(ModelError, match=message) as caught:
        CALLS[call](model.to(there), x.to(here))
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_so_where_labels_lie_elsewhere() -> None:
    model, x = tiny("vit")
    with pytest.raises(ModelError, match="lies on meta, and what it is called with on cpu"):
        importance(model.to("meta"), x.to("meta"))


def test_so_where_a_recipe_is_checked() -> None:
    model, _ = tiny("vit")
    attention = model.get_submodule("blocks.0.attn")
    with pytest.raises(ModelError, match="Attention lies on cpu, and what it is called with on meta"):
        check_recipe(attention, torch.zeros(2, 17, 48, device="meta"))


class OnGpu(nn.Parameter):
    """Says that it lies where nothing can lie here."""

    device = torch.device("cuda:0")  # type: ignore[assignment]


def test_the_device_of_the_model_is_typed() -> None:
    model, x = tiny("vit")
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, OnGpu(parameter.data))

    def refuse(*_: Any) -> None:
        raise RuntimeError("Expected all tensors to be on the same device, but got cpu")

    model.register_forward_pre_hook(refuse)
    with pytest.raises(ModelError, match=r"bring that there, images\.to\('cuda:0'\), or the model here, model\.to\('cpu'\)\."):
        hookattn.inspect(model, x)


@pytest.mark.parametrize("call", CALLS)
def test_what_raises_for_another_reason_or_runs_all_the_same_is_left_alone(call: str) -> None:
    model, x = tiny("vit")
    with pytest.raises(ValueError, match="unpack"):
        CALLS[call](model, x.half()[0])

    def raise_another(*_: Any) -> None:
        raise RuntimeError("no luck")

    with model.register_forward_pre_hook(raise_another), pytest.raises(RuntimeError, match=r"^no luck$"):
        CALLS[call](model, x.half())
    with model.register_forward_pre_hook(lambda _, args: (args[0].float(),)):
        assert CALLS[call](model, x.double())


@pytest.mark.parametrize("query", [None, "cls"])
@pytest.mark.parametrize("roll", [partial(rollout, discard=0.1), grad_rollout, relevance])
def test_layers_that_lie_on_several_devices_are_rolled_out_all_the_same(roll: Any, query: Any) -> None:
    model, x = tiny("vit")
    found = []
    for device in (None, "meta"):
        with AttentionRecorder(model, gradients=True, device=device) as rec:
            model(x).sum().backward()
        found.append(rec.maps)
    mixed = [found[0][0], *found[1][1:]]
    assert roll(mixed, query).shape == roll(found[0], query).shape
    assert roll(mixed, query).is_meta
