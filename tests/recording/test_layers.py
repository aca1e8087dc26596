"""Which modules are recorded, and what `layers=` means."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.models import tiny
from support.untouched import untouched
from timm.layers import Attention
from torch import nn

from hookattn import AttentionRecorder, LayerNotFoundError


def shown(value: Any) -> str:
    """The same name for a case in every worker."""
    return "a function" if callable(value) and not isinstance(value, (type, nn.Module)) else str(value)


CHOICES: list[tuple[Any, list[int]]] = [
    (None, [0, 1, 2]),
    ("blocks.1.attn", [1]),
    ("blocks.*.attn", [0, 1, 2]),
    ("blocks.[02].attn", [0, 2]),
    ("*2*", [2]),
    ("blocks.0.*", [0]),
    ("blocks.*", [0, 1, 2]),
    (0, [0]),
    (-1, [2]),
    (-3, [0]),
    ([-1, "blocks.0.*"], [0, 2]),
    ((1,), [1]),
    (["blocks.1.*", "blocks.1.attn", 1], [1]),
    (lambda name, _: name.startswith("blocks.1."), [1]),
    (lambda _, module: isinstance(module, Attention), [0, 1, 2]),
]


@pytest.mark.parametrize(("layers", "expected"), CHOICES, ids=shown)
def test_layers_narrows_by_name_glob_container_index_list_and_predicate(layers: Any, expected: list[int]) -> None:
    model, x = tiny("vit", depth=3)
    names = [f"blocks.{i}.attn" for i in expected]
    with AttentionRecorder(model, layers) as rec, torch.no_grad():
        model(x)
    assert rec.layers == names
    assert list(rec.maps) == names


def test_a_name_is_not_taken_for_what_is_inside_of_the_module() -> None:
    model, _ = tiny("vit", depth=11)
    for name, inside in (("blocks.1", "blocks.1.attn"), ("blocks", "blocks.0.attn")):
        with pytest.raises(LayerNotFoundError, match=rf"{name}' is a .*attention is inside: {inside}.*'{name}\.\*'"):
            AttentionRecorder(model, name)


def test_a_module_that_is_not_known_as_attention_is_recorded_when_it_is_called_by_its_name() -> None:
    model, x = tiny("vit")
    with AttentionRecorder(model, ["blocks.1.attn", "blocks.0.mlp"]) as rec, torch.no_grad():
        model(x)
    assert set(rec.layers) == {"blocks.0.mlp", "blocks.1.attn"}
    assert list(rec.maps) == ["blocks.1.attn"]
    assert set(rec.skipped) == {"blocks.0.mlp"}  # it ran, and forms no map


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("blocks.0.atn", r"'blocks\.0\.atn'.*Did you mean 'blocks\.0\.attn'"),
        ("block.1.attn", r"Did you mean .*'blocks\.1\.attn'"),
        ("zzz", r"There is: blocks\.0\.attn, blocks\.1\.attn"),
        ("blocks.7*", r"no attention module is called 'blocks\.7\*'"),
        (["blocks.0.attn", "blocks.9.attn"], r"'blocks\.9\.attn'"),
        (2, r"no layer 2: the model has 2 attention modules, 0 to 1"),
        (-3, r"no layer -3"),
        (lambda *_: False, r"accepts none of blocks\.0\.attn, blocks\.1\.attn"),
        ([], r"layers"),
    ],
    ids=shown,
)
def test_layers_that_name_nothing_are_refused_with_near_misses(layers: Any, message: str) -> None:
    model, _ = tiny("vit")
    with untouched(model), pytest.raises(LayerNotFoundError, match=message):
        AttentionRecorder(model, layers)


def test_an_attention_module_alone_can_be_recorded() -> None:
    attn, x = Attention(48, num_heads=3), torch.randn(2, 5, 48)
    with untouched(attn), AttentionRecorder(attn) as rec, torch.no_grad():
        attn(x)
        attn(-x)
    assert [m.shape for m in rec.maps.values()] == [(2, 3, 5, 5)]
    assert torch.equal(rec.maps[0].x, -x)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (1.5, "a float names nothing"),
        (True, "a bool names nothing"),
        ([0, False], "a bool names nothing"),
        ([None], "a NoneType names nothing"),
        (b"attn", "a bytes names nothing"),
        (slice(0, 1), "a slice names nothing"),
        (Attention, "the class Attention names nothing"),
        (nn.Identity(), "a Identity names nothing"),
        (torch.tensor([0, 1]), "a Tensor names nothing"),
        ("", "no attention module is called ''"),
        (lambda name, module: False, r"accepts none of blocks\.0\.attn, blocks\.1\.attn"),
    ],
    ids=shown,
)
def test_layers_that_are_no_layers_are_refused_and_the_message_says_what_they_may_be(layers: Any, message: str) -> None:
    with pytest.raises(LayerNotFoundError, match=message):
        AttentionRecorder(tiny("vit")[0], layers)


@pytest.mark.parametrize("layers", [lambda name, module: True, 0, -1, "*", ["attn"]], ids=shown)
def test_where_nothing_is_named_like_attention_layers_has_nothing_to_choose_from(layers: Any) -> None:
    with pytest.raises(LayerNotFoundError, match=r"nothing in Sequential is named like attention.*leave layers= out"):
        AttentionRecorder(nn.Sequential(nn.Linear(3, 3)), layers)
