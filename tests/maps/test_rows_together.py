"""Rows of all layers that are read together are those that are read one by one, bit by bit, whatever the layers ran in."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from support.inside import is_reading, sample_by_kernel
from support.models import TINY, randomise, tiny
from support.reading import NAMES, record
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hookattn import QK, AttentionRecorder, StaleMapError, TokenError, UnreadableError


def compare(rec: AttentionRecorder, query: Any = "cls") -> None:
    alone = {name: m.rows(query) for name, m in rec.maps.items()}
    together = rec.rows(query)
    assert list(together) == list(alone) != []
    for name, row in alone.items():
        assert torch.equal(together[name], row), name
        assert (together[name].requires_grad, together[name].dtype) == (row.requires_grad, row.dtype)


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("options", [{}, {"dtype": torch.float64}, {"keep": "maps"}])
def test_they_are_those_of_one_map_after_the_other(name: str, options: dict[str, Any]) -> None:
    rec = record(*tiny(name), **options)
    try:
        rec.maps[0].rows(0)
    except TokenError:
        with pytest.raises(TokenError):
            rec.rows(0)
    else:
        compare(rec, 0)


class Doubled(TorchFunctionMode):
    """A mode of the user's, which makes another softmax of each."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        return out.roll(1, -1) if func.__name__ == "softmax" else out


class Under(nn.Module):
    """A block that is called in a mode of its own."""

    def __init__(self, block: nn.Module, mode: Callable[[], AbstractContextManager[Any]]) -> None:
        super().__init__()
        self.block, self.mode = block, mode

    def forward(self, x: Tensor) -> Tensor:
        with self.mode():
            out: Tensor = self.block(x)
        return out.float()


MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "plain": nullcontext,
    "autocast": partial(torch.autocast, "cpu", torch.bfloat16),
    "no grad": torch.no_grad,
    "a mode": Doubled,
}


@pytest.mark.parametrize("outside", MODES)
@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize("first", MODES)
def test_layers_that_ran_in_other_modes_than_the_first_are_read_in_their_own(first: str, detach: bool, outside: str) -> None:
    model, x = tiny("vit", depth=6)
    order = [first, *MODES, "plain"]
    model.blocks = nn.Sequential(*(Under(block, MODES[mode]) for block, mode in zip(model.blocks, order)))  # type: ignore[arg-type]
    model.blocks[4].block.attn.fused_attn = False  # type: ignore[index, union-attr]
    model.blocks[5].block.attn.train()  # type: ignore[index, union-attr]
    with AttentionRecorder(model, detach=detach) as rec:
        model(x)
    model.eval()
    with MODES[outside]():
        compare(rec)


def test_what_runs_meanwhile_is_known_to_be_no_forward() -> None:
    model, x = tiny("vit")
    seen: list[bool] = []

    class Looking(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(is_reading())
            return x

    for block in model.blocks:  # type: ignore[union-attr]
        block.attn.q_norm = Looking()  # type: ignore[union-attr]
    rec = record(model, x)
    rec.rows()
    seen.clear()
    with torch.no_grad():
        rec.rows()
    assert seen == [True, True]
    assert not is_reading()


def test_no_mode_is_left_behind() -> None:
    model, x = tiny("vit")
    with AttentionRecorder(model, detach=False) as rec, torch.autocast("cpu", torch.bfloat16):
        model(x)
    with torch.no_grad():
        rec.rows()
        assert not torch.is_grad_enabled()
        assert not torch.is_autocast_enabled("cpu")
    with AttentionRecorder(model) as again:  # a reading that did not end would have it see no forward
        model(x)
    assert again.rows().keys() == rec.rows().keys()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("what", ["weight", "x", "number", "layer"])
@pytest.mark.parametrize("by_kernel", [False, True])
def test_a_layer_that_has_changed_since_is_told(name: str, what: str, by_kernel: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if by_kernel:
        sample_by_kernel(monkeypatch)
    model, x = tiny("vit")
    rec = record(model, x)
    rec.rows()  # which looks up what it does not look up again
    attention: Any = model.get_submodule(name)
    if what == "weight":
        attention.qkv.weight.data.mul_(2)
    elif what == "x":
        rec.maps[name].x.add_(1)
    elif what == "number":
        attention.num_heads = 1
    else:
        attention.qkv = nn.Linear(*attention.qkv.weight.shape[::-1])
    with pytest.raises(StaleMapError, match=f"'{name}'"):
        rec.rows()


class Norm(nn.Module):
    """Makes something as large as its input, while nothing of before is kept."""

    made: list[weakref.ref[Tensor]] = []  # noqa: RUF012

    def forward(self, x: Tensor) -> Tensor:
        out = x * 2
        assert sum(ref() is not None for ref in self.made) <= 1  # q of the same layer, when k is made
        self.made.append(weakref.ref(out))
        return out


def test_what_recipes_compute_is_not_kept_of_all_layers_at_once() -> None:
    model, x = tiny("vit", depth=4)
    for block in model.blocks:  # type: ignore[union-attr]
        block.attn.q_norm, block.attn.k_norm = Norm(), Norm()  # type: ignore[union-attr]
    rec = record(randomise(model), x)
    assert len({m.shape for m in rec.maps.values()}) == 1
    Norm.made.clear()
    assert len(rec.rows()) == 4
    assert len(Norm.made) == 8


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("step", ["narrow", "values"])
def test_an_error_is_told_of_the_layer_that_it_is_of(step: str, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = tiny("vit")
    rec = record(model, x)
    before, calls = getattr(QK, step), []

    def fail_once(source: QK, *args: Any) -> Any:
        calls.append(source)
        if len(calls) == number + 1:
            raise RuntimeError("out of luck")
        return before(source, *args)

    monkeypatch.setattr(QK, step, fail_once)
    with pytest.raises(UnreadableError, match=f"'{NAMES[number]}': it could not be computed: RuntimeError: out of luck"):
        rec.rows()
