"""Training goes on as if nobody looked, and a map is that of the training flags of its call."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from support.models import DROPOUT, levit, tiny
from support.oracle import own_map
from support.reading import read, same
from support.untouched import untouched
from torch import nn

from hookattn import AttentionRecorder


@pytest.mark.parametrize("options", [{}, {"keep": "maps"}, {"detach": False}], ids=str)
def test_gradients_of_three_micro_batches_and_the_random_stream_are_those_without_a_recorder(options: Any) -> None:
    model, _ = tiny("vit", **DROPOUT)
    model.train()
    batches = [torch.randn(2, 3, 64, 64) for _ in range(3)]
    results = []
    for recorded in (False, True):
        model.zero_grad()
        torch.manual_seed(4)
        with AttentionRecorder(model, passes="all", **options) if recorded else nullcontext() as rec:
            for x in batches:
                loss = model(x).square().mean()
                if rec is not None:
                    first = [m[...].detach() for m in rec.maps.values()]
                    assert all(torch.equal(m[...].detach(), a) for m, a in zip(rec.maps.values(), first))
                loss.backward()
        results.append([*(p.grad for p in model.parameters() if p.grad is not None), torch.get_rng_state()])
        if rec is not None:
            assert [len(maps) for maps in rec.passes] == [2, 2, 2]
            assert all((m[...].sum(-1) - 1).abs().max() < 1e-5 for maps in rec.passes for m in maps.values())
    assert all(map(torch.equal, *results))


# Steps


@pytest.mark.parametrize("options", [{}, {"keep": "maps"}, {"keep": "maps", "detach": False}], ids=str)
@pytest.mark.parametrize("name", ["vit", "eva_split", "beit_shared", "parallel", "differential"])
def test_outputs_and_gradients_in_train_mode_are_bit_identical(name: str, options: dict[str, Any]) -> None:
    model, x = tiny(name, **DROPOUT)
    model.train()
    results = []
    for recorded in (False, True):
        torch.manual_seed(1)
        with untouched(model):
            if recorded:
                with AttentionRecorder(model, **options):
                    loss = model(x).square().sum()
            else:
                loss = model(x).square().sum()
        results.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    assert all(map(torch.equal, *results))


def flags(model: nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["vit", "levit"])
def test_a_map_is_that_of_the_training_flag_of_its_call(name: str, training: bool) -> None:
    options = {"attn_drop_rate": 0.5, "proj_drop_rate": 0.5} if name == "vit" else {"drop_path_rate": 0.5}
    model, x = tiny(name, **options) if name == "vit" else levit(**options)
    model.train(training)
    with AttentionRecorder(model) as rec, torch.no_grad():
        model(x)
        inside = read(rec)
    model.train(not training)
    before = flags(model)
    with untouched(model):
        assert same(read(rec), inside)
        rec.verify()
        for m in rec.maps.values():
            repr(m), m.shape, m[:, :, 0]
    assert flags(model) == before == [not training] * len(before)


def test_training_flags_are_put_back_one_by_one() -> None:
    model, x = levit()
    model.train()
    with AttentionRecorder(model) as rec, torch.no_grad():
        model(x)
    inside = read(rec)
    for i, module in enumerate(model.modules()):
        module.training = i % 2 == 0
    before = flags(model)
    assert same(read(rec), inside)
    assert flags(model) == before


def test_batch_norm_makes_a_difference_to_a_map() -> None:
    """Or the tests of training flags would prove nothing."""
    model, x = levit()
    read_in = {}
    for training in (False, True):
        with AttentionRecorder(model.train(training)) as rec, torch.no_grad():
            model(x)
            read_in[training] = rec.maps[0][...]
    assert (read_in[True] - read_in[False]).abs().max() > 1e-3


def test_a_map_in_train_mode_is_that_before_dropout() -> None:
    model, x = tiny("vit", attn_drop_rate=0.5)
    with AttentionRecorder(model.train()) as rec, torch.no_grad():
        model(x)
    for name, m in rec.maps.items():
        with torch.no_grad():
            expected = own_map(model.get_submodule(name), m.x)
        torch.testing.assert_close(m[...], expected)
        torch.testing.assert_close(m[...].sum(-1), torch.ones(m.shape[:3]))


@pytest.mark.parametrize("keep", ["inputs", "maps"])
def test_recording_moves_statistics_once_and_draws_no_random_number(keep: Any) -> None:
    model, x = levit(drop_path_rate=0.3)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    results = []
    for recorded in (False, True):
        model.load_state_dict(state)
        torch.manual_seed(1)
        model.train()
        with AttentionRecorder(model, keep=keep) if recorded else nullcontext(), torch.no_grad():
            output = model(x)
        results.append([output, torch.get_rng_state(), *[value.clone() for value in model.state_dict().values()]])
    assert all(map(torch.equal, *results))
