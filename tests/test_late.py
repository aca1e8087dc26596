"""A map that is read late is the map of that forward, or reading raises."""

from __future__ import annotations

import pytest
import torch
from support.models import levit, tiny
from support.reading import read, same
from support.untouched import untouched

from hookattn import AttentionRecorder

# Reading leaves no trace


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["vit", "levit", "differential"])
def test_reading_leaves_random_streams_buffers_and_caches_alone(name: str, training: bool) -> None:
    model, x = levit() if name == "levit" else tiny(name, attn_drop_rate=0.3, proj_drop_rate=0.3)
    with AttentionRecorder(model.train(training)) as rec, torch.no_grad():
        model(x)
    for switch in (training, not training):
        model.train(switch)  # LeViT empties its cache here
        state = {key: value.clone() for key, value in model.state_dict().items()}
        stream = torch.get_rng_state()
        with untouched(model):
            first = read(rec)
            rec.verify()
            for m in rec.maps.values():
                m.shape, m[0], m[:, :, 0]
            assert same(read(rec), first)
        assert torch.equal(torch.get_rng_state(), stream)
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
