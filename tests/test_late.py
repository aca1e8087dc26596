"""A map that is read late is the map of that forward, or reading raises."""

from __future__ import annotations

import pytest
import torch
from support.models import levit, some, tiny
from support.reading import read, same
from support.untouched import untouched
from timm.layers import Attention

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


# NaN


@pytest.mark.parametrize("name", ["vit", "beit", "levit"])
def test_a_nan_in_an_image_is_in_the_maps_of_that_image_and_of_no_other(name: str) -> None:
    model, x = some(name)
    x[0, 0, 0, 0] = torch.nan
    with AttentionRecorder(model) as rec, torch.no_grad():
        model(x)
    assert rec.maps[0][0].isnan().any()
    for m in rec.maps.values():
        assert not m[1].isnan().any()
        m.verify()


def test_a_nan_that_a_mask_leaves_open_stays_and_one_it_closes_goes() -> None:
    attn, x = Attention(48, num_heads=3), torch.randn(1, 4, 48)
    x[0, 3] = torch.nan
    mask = torch.ones(4, 4, dtype=torch.bool)
    mask[:2, 3] = False
    with AttentionRecorder(attn) as rec, torch.no_grad():
        attn(x, mask)
    got = rec.maps[0][0, 0]
    assert not got[:2].isnan().any()
    assert got[2:].isnan().all()
