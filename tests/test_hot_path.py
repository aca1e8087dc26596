"""What a call costs that nobody reads: no operator, no tensor, no copy; and still the map of that call, or a refusal."""

from __future__ import annotations

import pytest
import torch
from support.models import TINY, tiny
from support.modes import operators_of
from torch import Tensor

from hookattn import AttentionRecorder

# one for each kind of state: parameters alone, buffers, rope, an empty cache, norms with statistics, windows
MODELS = [name for name in ("vit", "beit", "rope_mixed", "rope_gqa", "relpos", "differential") if name in TINY]


@pytest.mark.parametrize("name", MODELS)
def test_recording_calls_no_operator_and_makes_no_tensor(name: str) -> None:
    model, x = tiny(name)
    with torch.no_grad():
        alone = operators_of(lambda: model(x))
        with AttentionRecorder(model) as rec:
            assert operators_of(lambda: model(x)) == alone
    assert len(rec.maps) == len(rec.layers)


def test_with_a_graph_recording_cuts_x_off_from_it_and_that_is_all() -> None:
    model, x = tiny("vit")
    alone = operators_of(lambda: model(x))
    with AttentionRecorder(model):
        recorded = operators_of(lambda: model(x))
    detached = "aten.detach.default"
    assert [name for name in recorded if name != detached] == [name for name in alone if name != detached]
    assert recorded.count(detached) - alone.count(detached) in (2, 4)  # PyTorch 2.6 shows each twice


def test_what_is_kept_with_nothing_read_is_the_inputs_themselves() -> None:
    model, x = tiny("vit")
    seen: list[Tensor] = []
    for block in model.blocks:  # type: ignore[union-attr]
        block.attn.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with AttentionRecorder(model) as rec, torch.no_grad():
        model(x)
    assert all(m.x is own for m, own in zip(rec.maps.values(), seen, strict=True))
