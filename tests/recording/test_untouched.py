"""The model does not notice: outputs are bit-identical, no operator is added, and reading leaves no trace."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from support.models import TINY, Raises, levit, randomise, tiny
from support.modes import operators_of
from support.oracle import unfused
from support.reading import NAMES, maps_of, read, same
from support.untouched import state_of, untouched
from torch import Tensor, nn

from hookattn import AttentionRecorder

SMALL: dict[str, tuple[dict[str, Any], int]] = {
    "levit_128s": ({"img_size": 128, "embed_dim": (32, 32, 32), "num_heads": (2, 2, 2), "depth": (1, 1, 1)}, 128),
    "tiny_vit_5m_224": ({"depths": (1, 1, 1, 1), "embed_dims": (16, 32, 48, 64), "num_heads": (1, 2, 3, 4)}, 64),
    "efficientvit_m0": ({"img_size": 128}, 128),
    "efficientformerv2_s0": ({"img_size": 64, "depths": (1, 1, 3, 3), "embed_dims": (16, 24, 32, 48)}, 64),
    "convit_tiny": ({"img_size": 64, "depth": 3, "local_up_to_layer": 2, "embed_dim": 48}, 64),
    "cpubone_nano": ({}, 128),
    "maxvit_rmlp_pico_rw_256": ({"img_size": 64, "embed_dim": (32, 32, 64, 64), "depths": (1, 1, 1, 1)}, 64),
    "swinv2_cr_tiny_224": ({"img_size": 64, "window_size": 4, "embed_dim": 24, "depths": [2, 2], "num_heads": [2, 4]}, 64),
}

SMALL = {name: made for name, made in SMALL.items() if timm.is_model(name)}  # older timm has fewer


def small(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    arguments, size = SMALL[name]
    return randomise(timm.create_model(name, **arguments), 0.2), torch.randn(4, 3, size, size)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", SMALL)
def test_reading_leaves_no_trace(name: str, training: bool) -> None:
    model, x = small(name)
    model.train(training)
    with AttentionRecorder(model) as rec, torch.no_grad():
        model(x)
    before = state_of(model)
    for m in rec.maps.values():
        assert m[...].shape == m.shape
    rec.maps[0].verify()
    assert state_of(model) == before


@pytest.mark.parametrize("name", ["levit_128s", "tiny_vit_5m_224", "efficientvit_m0", "efficientformerv2_s0"])
def test_where_a_model_uses_a_stale_cache_so_does_its_map(name: str) -> None:
    """After `load_state_dict` on a model that has run, timm still uses the biases it had looked up before."""
    model, x = small(name)
    model, x = model.double().eval(), x.double()
    with torch.no_grad():
        model(x)
        for key, parameter in model.named_parameters():
            if key.endswith("attention_biases"):
                parameter.copy_(torch.randn_like(parameter))
        with AttentionRecorder(model) as rec, unfused(model) as maps:
            model(x)
    model.train()  # clears the cache
    model.eval()
    for m, expected in zip(rec.maps.values(), folded(maps, rec)):
        torch.testing.assert_close(m[...], expected, rtol=0, atol=1e-9)


def folded(maps: list[Tensor], rec: AttentionRecorder) -> list[Tensor]:
    """What each module's softmax put out; one with several heads in turn has put out as many."""
    found, left = [], list(maps)
    for m in rec.maps.values():
        calls = m.shape[1] if left[0].dim() == 3 else 1
        parts, left = left[:calls], left[calls:]
        found.append(torch.stack(parts, dim=1) if calls > 1 else parts[0].reshape(m.shape))
    return found


@pytest.mark.parametrize("name", ["maxvit_rmlp_pico_rw_256", "swinv2_cr_tiny_224"])
def test_dropout_inside_a_bias_is_the_dropout_of_the_call(name: str) -> None:
    model, x = small(name)
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    with AttentionRecorder(model) as rec, unfused(model) as maps, torch.no_grad():
        model(x)
    torch.rand(7)
    for m, expected in zip(rec.maps.values(), maps):
        torch.testing.assert_close(m[...], expected, rtol=0, atol=1e-5)


def test_a_buffer_that_a_forward_replaces_is_the_one_of_the_call() -> None:
    """ConViT replaces its relative indices when the number of tokens changes, in the first forward too."""
    model, x = small("convit_tiny")
    model.eval()
    with torch.no_grad(), AttentionRecorder(model) as rec, unfused(model) as maps:
        model(x)
    m = rec.maps[0]
    expected = torch.stack(maps[:2], dim=2).flatten(1, 2)
    torch.testing.assert_close(m[...], expected, rtol=0, atol=1e-5)
    assert m.verify() < 1e-5


@pytest.mark.parametrize("name", TINY)
def test_outputs_are_bit_identical_and_nothing_is_left_on_the_model(name: str) -> None:
    model, x = tiny(name)
    with torch.no_grad():
        expected = model(x)
        with untouched(model):
            with AttentionRecorder(model, called_from=True) as rec, AttentionRecorder(model, keep="maps"):
                assert torch.equal(model(x), expected)
            assert torch.equal(model(x), expected)
    assert len(rec.maps) > 0


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_nothing_is_left_when_the_body_raises(error: type[BaseException]) -> None:
    model, x = tiny("vit")
    expected = maps_of(model, x)
    rec = AttentionRecorder(model, called_from=True)

    def body() -> None:
        with rec, torch.no_grad():
            model(x)
            raise error("mine")

    with untouched(model), pytest.raises(error, match="mine"):
        body()
    assert same(read(rec), expected)


def test_hooks_that_could_not_all_be_put_on_are_taken_off_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = tiny("vit")
    rec = AttentionRecorder(model)
    with monkeypatch.context() as patch, untouched(model):
        patch.setattr(nn.Module, "register_forward_hook", Raises.forward)
        with pytest.raises(TypeError), rec:
            raise AssertionError("the block was entered")
    with rec:
        model(x)
    assert list(rec.maps) == NAMES


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
