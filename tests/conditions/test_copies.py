"""Copies of the model that are made inside the block work, are not recorded and carry nothing of ours."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.models import tiny
from support.reading import maps_of, read, same
from support.untouched import hooks_of_ours
from torch import Tensor, nn

from hookattn import AttentionRecorder


def saved_and_loaded(model: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[nn.Module], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": saved_and_loaded,
}


class Copied(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        copy.deepcopy(self)
        return x


@pytest.mark.parametrize("call", ["__call__", "forward_features"])
@pytest.mark.parametrize("made", COPIES)
@pytest.mark.parametrize("options", [{}, {"called_from": True}], ids=str)
def test_a_copy_made_inside_the_block_works_is_not_recorded_and_carries_nothing_of_ours(
    call: str, made: str, options: dict[str, Any]
) -> None:
    model, x = tiny("vit")
    expected = maps_of(model, x)
    with AttentionRecorder(model, passes="all", **options) as rec, torch.no_grad():
        output = getattr(model, call)(x)
        twin = COPIES[made](model)
        assert torch.equal(getattr(twin, call)(x), output)
        getattr(twin, call)(-x)
    assert len(rec.passes) == 1
    assert same(read(rec), expected)
    assert torch.equal(getattr(twin, call)(x), output)
    assert not hooks_of_ours(twin)
    with AttentionRecorder(twin) as rec, torch.no_grad():
        twin(x)
    assert same(read(rec), expected)


def test_a_file_written_inside_the_block_does_not_need_hookattn() -> None:
    file = io.BytesIO()
    model, x = tiny("vit")
    with AttentionRecorder(model, called_from=True), torch.no_grad():
        model(x)
        torch.save(model, file)
    assert b"hookattn" not in file.getvalue()


def test_a_model_that_is_watched_can_be_copied_in_the_middle_of_it() -> None:
    model = nn.Sequential(nn.Linear(3, 3), Copied())
    with AttentionRecorder(model):
        model(torch.randn(2, 3))
