"""What is spread over several processes is told by the names of classes, each time a map is read, in one process as well."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.models import tiny
from support.reading import record
from torch import Tensor, nn

from hookattn import UnreadableError

SPREAD = "'blocks.0.attn'.* is spread over several processes"


class FSDPModule:
    """Named as what `fully_shard` makes a base of the class of a module."""


class Gathering(FSDPModule, nn.Linear):
    """A layer whose parameters are gathered when it is called."""


class DTensor(Tensor):
    """Named as a tensor of which each process has a part."""


@pytest.mark.parametrize("sharded", ["before the forward", "after it"])
def test_a_layer_that_gathers_its_parameters_is_not_called(sharded: str) -> None:
    model, x = tiny("vit")
    layer: Any = model.get_submodule("blocks.0.attn.qkv")
    if sharded == "before the forward":
        layer.__class__ = Gathering
    rec = record(model, x)
    layer.__class__ = Gathering
    with pytest.raises(UnreadableError, match=SPREAD):
        rec.maps["blocks.0.attn"][:, :, 0]
    with pytest.raises(UnreadableError, match=SPREAD):
        rec.maps["blocks.0.attn"].shape  # noqa: B018
    assert rec.maps["blocks.1.attn"][:, :, 0].isfinite().all()


def test_a_parameter_that_lies_in_parts_in_several_processes_is_not_read() -> None:
    model, x = tiny("vit")
    layer: Any = model.get_submodule("blocks.0.attn.qkv")
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(DTensor))
    assert type(layer.weight) is DTensor
    with torch.no_grad():
        rec = record(model, x)
    with pytest.raises(UnreadableError, match=SPREAD):
        rec.maps["blocks.0.attn"][:, :, 0]
