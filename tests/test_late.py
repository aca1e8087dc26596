"""A map that is read late is the map of that forward, or reading raises."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import timm
import torch
from support.models import tiny
from support.oracle import own_map
from support.reading import read, same
from support.untouched import untouched
from timm.layers import Attention
from torch import Tensor, nn

from hookattn import AttentionMap, AttentionRecorder, StaleMapError

MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "grad": torch.enable_grad,
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "no autocast": lambda: torch.autocast("cpu", enabled=False),
}


def levit(**options: Any) -> tuple[nn.Module, Tensor]:
    """Attention that is read by running it again, with BatchNorm and a cache of biases inside."""
    small = {"embed_dim": (32, 32, 32), "num_heads": (2, 2, 2), "depth": (1, 1, 1), "num_classes": 5}
    model = timm.create_model("levit_128s", img_size=128, **small, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # the norms of the residual branches are zero, and all biases
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
            elif parameter.dim() == 2:  # and the scores hardly differ
                parameter.mul_(10)
    return model.eval(), torch.randn(2, 3, 128, 128)


def some(name: str) -> tuple[nn.Module, Tensor]:
    return levit() if name == "levit" else tiny(name)


# Modes


@pytest.mark.parametrize("forward", MODES)
@pytest.mark.parametrize("name", ["vit", "eva_split", "beit", "levit"])
def test_a_map_is_the_same_in_whatever_mode_it_is_read(name: str, forward: str) -> None:
    model, x = some(name)
    with AttentionRecorder(model) as rec, MODES[forward]():
        model(x)
        inside = read(rec)
    for reading in MODES:
        with MODES[reading]():
            assert same(read(rec), inside), reading
            assert all(m.dtype == torch.float32 for m in rec.maps.values())
            rec.verify()
    assert same(read(rec), inside)


@pytest.mark.parametrize("name", ["vit", "levit"])
def test_autocast_makes_a_difference_to_a_map(name: str) -> None:
    """Or the test above would prove nothing of it."""
    model, x = some(name)
    with AttentionRecorder(model, passes="all") as rec, torch.no_grad():
        model(x)
        with torch.autocast("cpu", torch.bfloat16):
            model(x)
    full, half = rec.passes
    assert 1e-5 < (full[0][...] - half[0][...]).abs().max() < 0.1


@pytest.mark.parametrize("reading", MODES)
def test_a_map_recorded_with_grad_stays_in_the_graph_in_whatever_mode_it_is_read(reading: str) -> None:
    model, x = tiny("vit")
    with AttentionRecorder(model, detach=False, passes="all") as rec:
        model(x)
        with torch.no_grad():
            model(x)
    with_grad, without = rec.passes
    with MODES[reading]():
        assert without[0][...].requires_grad is False
        if reading != "inference":
            assert with_grad[0][...].requires_grad is True


# Train and eval


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


def test_a_map_of_an_eval_forward_is_not_read_with_statistics_that_have_moved_since() -> None:
    model, x = levit()
    with AttentionRecorder(model) as rec, torch.no_grad():
        model(x)
    expected = read(rec)
    with torch.no_grad():
        model.train()(3 * x + 1)
    model.eval()
    for name, m in rec.maps.items():
        try:
            got = m[...]
        except StaleMapError as error:
            assert ".bn." in str(error)  # noqa: PT017
        else:
            assert torch.equal(got, expected[name])


def test_a_map_of_a_train_forward_stays_readable_when_statistics_move() -> None:
    model, x = levit()
    with AttentionRecorder(model.train(), passes="all") as rec, torch.no_grad():
        model(x)
        expected = read(rec)
        model(3 * x + 1)
    assert same({name: m[...] for name, m in rec.passes[0].items()}, expected)


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


# Stale


def optimise(model: Any) -> None:
    model.blocks[0].attn.qkv.weight.grad = torch.ones_like(model.blocks[0].attn.qkv.weight)
    torch.optim.Adam([model.blocks[0].attn.qkv.weight]).step()


def load(model: Any) -> None:
    model.load_state_dict(model.state_dict())


def assign(model: Any) -> None:
    model.load_state_dict({key: value.clone() for key, value in model.state_dict().items()}, assign=True)


def double(model: Any) -> None:
    model.double()


def fill(model: Any) -> None:
    with torch.no_grad():
        model.blocks[0].attn.qkv.bias.fill_(0.5)


def replace_parameter(model: Any) -> None:
    model.blocks[0].attn.qkv.bias = nn.Parameter(torch.zeros(144))


def replace_module(model: Any) -> None:
    model.blocks[0].attn.qkv = nn.Linear(48, 144)


def drop_parameter(model: Any) -> None:
    model.blocks[0].attn.qkv.bias = None


EDITS: dict[str, tuple[Callable[[Any], None], str]] = {
    "optimizer.step": (optimise, r"'qkv\.weight' changed"),
    "load_state_dict": (load, r"'qkv\.weight', 'qkv\.bias'.* changed"),
    "double": (double, r"'qkv\.weight', 'qkv\.bias'.* changed"),
    "bias.fill_": (fill, r"'qkv\.bias' changed"),
    "another module": (replace_module, r"a layer, a forward or a number inside the module was replaced"),
}
REPLACEMENTS = {"load_state_dict(assign=True)": assign, "another parameter": replace_parameter, "no parameter": drop_parameter}
ADVICE = r"(?s)'blocks\.0\.attn' \(Attention\) is stale.*{}.*keep=\"maps\""


@pytest.mark.parametrize("name", REPLACEMENTS)
def test_a_parameter_that_was_replaced_is_still_there_for_the_map_of_its_forward(name: str) -> None:
    model, x = tiny("vit")
    with AttentionRecorder(model) as rec, torch.no_grad():
        model(x)
    before = rec.maps[0][...]
    with torch.no_grad():
        REPLACEMENTS[name](model)
    now = dict(model.named_parameters())
    assert torch.equal(rec.maps[0][...], before)
    assert rec.maps[0].verify() < 1e-6
    assert {name: id(p) for name, p in model.named_parameters()} == {name: id(p) for name, p in now.items()}


def refuses_to_be_read(m: AttentionMap, message: str) -> None:
    """By slice, by row, as a picture and by verifying, and each time again."""
    readings: list[Callable[[], object]] = [lambda: m[...], lambda: m[0, 0, 0], m.image, m.verify, lambda: m[...]]
    for reading in readings:
        with pytest.raises(StaleMapError, match=message):
            reading()


@pytest.mark.parametrize("forward", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("edit", EDITS)
def test_a_map_is_stale_when_a_parameter_has_changed_and_the_message_names_it(edit: str, forward: Any) -> None:
    model, x = tiny("vit")
    with AttentionRecorder(model) as late, AttentionRecorder(model, keep="maps") as kept, forward():
        model(x)
    expected = read(late)
    change, what = EDITS[edit]
    change(model)
    refuses_to_be_read(late.maps[0], ADVICE.format(what))
    assert same(read(kept), expected)
    assert kept.maps[0].image().shape == (2, 4, 4)


@pytest.mark.parametrize("seen", [True, False])
@pytest.mark.parametrize("forward", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("through", ["x", "a view of x", "one value of x"])
def test_a_map_is_stale_when_x_has_changed(through: str, forward: Any, seen: bool) -> None:
    model, x = tiny("vit")
    with AttentionRecorder(model) as late, AttentionRecorder(model, keep="maps") as kept, forward():
        model(x)
        expected = read(late) if seen else read(kept)
        m = late.maps[0]
        with torch.no_grad() if forward is not torch.inference_mode else nullcontext():
            {"x": m.x, "a view of x": m.x[:, 1:].transpose(1, 2), "one value of x": m.x[1, 5, 7]}[through].add_(1.0)
    refuses_to_be_read(m, ADVICE.format("x changed"))
    assert same({late.maps[1].name: late.maps[1][...]}, {late.maps[1].name: expected["blocks.1.attn"]})
    assert same(read(kept), expected)


def test_a_map_is_stale_when_the_module_itself_writes_into_x() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = Attention(48, num_heads=3)

        def forward(self, x: Tensor) -> Tensor:
            return x.add_(self.attn(x))

    model, x = InPlace(), torch.randn(2, 5, 48)
    with AttentionRecorder(model) as late, AttentionRecorder(model, keep="maps") as kept, torch.no_grad():
        expected = own_map(model.attn, x)
        model(x)
    with pytest.raises(StaleMapError, match="x changed in place"):
        late.maps[0][...]
    torch.testing.assert_close(kept.maps[0][...], expected)


def test_a_map_is_stale_when_another_argument_has_changed() -> None:
    model, _ = tiny("vit")
    attn: Any = model.blocks[0].attn
    x, mask = torch.randn(2, 5, 48), torch.zeros(5, 5)
    with AttentionRecorder(model) as rec, torch.no_grad():
        attn(x, attn_mask=mask)
    rec.maps[0][...]
    mask.fill_(-1)
    with pytest.raises(StaleMapError, match="argument 1 changed in place"):
        rec.maps[0][...]


def test_a_map_stays_readable_when_only_other_modules_change() -> None:
    model, x = tiny("vit")
    with AttentionRecorder(model) as rec, torch.no_grad():
        model(x)
    expected = read(rec)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".attn." not in name:
                parameter.add_(1)
    assert same(read(rec), expected)
    with torch.no_grad():
        model.blocks[0].attn.proj.bias.add_(1)
    assert torch.equal(rec.maps[1][...], expected["blocks.1.attn"])


def test_moving_a_model_to_where_it_is_makes_nothing_stale() -> None:
    model, x = tiny("vit")
    with AttentionRecorder(model) as rec, torch.no_grad():
        model(x)
    expected = read(rec)
    model.to("cpu").float().requires_grad_(False)
    model.zero_grad()
    assert same(read(rec), expected)


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
