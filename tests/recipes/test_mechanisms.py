"""Every mechanism: recipe == replay == the softmax that the module forms itself, unfused, in float64."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from packaging.version import Version
from support.inside import call_of, find_recipe, formed_by, list_recipes, replay_of
from support.mechanisms import MODELS, lively, maps_by_class
from support.models import ANY_DTYPE, TINY, randomise, tiny, tiny_double
from support.oracle import agree, exists, own_softmax, short_name
from support.reading import record
from support.variants import variants
from torch import Tensor

from hookattn import AttentionMap, AttentionRecorder


def check(m: AttentionMap, expected: Tensor) -> None:
    """The map is the expected one and replay's; rows and heads read alone are those of the whole; copies and verify agree."""
    assert find_recipe(call_of(m)[0]) is not None
    shape, whole = m.shape, m[...]
    assert shape == whole.shape
    assert m.dtype == whole.dtype == torch.float64
    agree(whole, expected)
    agree(whole, replay_of(m))
    agree(whole.sum(-1), torch.ones(shape[:3], dtype=torch.float64))
    assert (whole - 1 / shape[-1]).abs().max() > 1e-4  # a flat map would prove nothing
    agree(m[:, :, -1], whole[:, :, -1])
    agree(m[:, -1], whole[:, -1])
    agree(m[-1, :, [1 % shape[2], 0]], whole[-1][:, [1 % shape[2], 0]])
    m.verify()
    assert repr(copy.deepcopy(m)) == repr(m)  # a copy takes along where the axes lie


@pytest.mark.parametrize("name", ANY_DTYPE)
def test_recipe_is_replay_is_the_unfused_softmax_of_plain_attention(name: str) -> None:
    maps = record(*tiny_double(name)).maps
    assert maps
    for m in maps.values():
        check(m, formed_by(m))


@pytest.mark.parametrize("name", MODELS)
def test_recipe_is_replay_is_the_unfused_softmax(name: str) -> None:
    maps = maps_by_class(name)
    assert set(MODELS[name][3]) <= set(maps)
    for m in [m for kind in MODELS[name][3] for m in {id(m): m for m in (*maps[kind][:2], maps[kind][-1])}.values()]:
        check(m, formed_by(m))


def test_every_recipe_is_compared() -> None:
    compared = {kind for case in MODELS.values() for kind in case[3]} | {
        short_name(module) for module, _ in variants().values()
    }
    elsewhere = {short_name(module) for name in TINY for module in tiny(name)[0].modules()}
    known = [name for name in list_recipes() if name.startswith("timm") and exists(name)]
    assert len(known) > 30
    assert {".".join(name.split(".")[-2:]) for name in known} <= compared | elsewhere


# Options that no registered model uses, but the classes take


@pytest.mark.parametrize("name", variants())
def test_variants(name: str) -> None:
    torch.manual_seed(0)
    module, args = variants()[name]
    randomise(module).double()
    module.eval()
    args = torch.utils._pytree.tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, args)
    with AttentionRecorder(module) as rec, torch.no_grad():
        module(*args)
    (m,) = rec.maps.values()
    check(m, replay_of(m) if name == "latent_bool_mask" else formed_by(m))  # unfused, the module adds the bools


# Half precision

HALF = ["swin", "swin_v2", "sam", "pvt_v2_linear", "cait", "xcit", "levit", "volo", "botnet", "hiera"]
HALF += ["convit"] * (Version(timm.__version__) >= Version("1.0.31"))  # before, its positions stay in float64


@pytest.mark.parametrize("name", [name for name in HALF if name in MODELS])
def test_under_autocast_maps_are_no_further_from_float64_than_the_unfused_path(name: str) -> None:
    model, x = lively(name)
    model = copy.deepcopy(model).float()
    with AttentionRecorder(model) as rec, torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(x.float())
    for kind in MODELS[name][3]:
        m = next(m for m in rec.maps.values() if short_name(call_of(m)[0]) == kind)
        module, *given = call_of(m)
        args, kwargs = torch.utils._pytree.tree_map_only(Tensor, Tensor.double, tuple(given))
        exact = own_softmax(copy.deepcopy(module).double(), *args, **kwargs)
        with torch.autocast("cpu", torch.bfloat16):
            eager = formed_by(m).double()
        assert m.dtype == torch.float32
        assert rms(m[...] - exact) <= 1.02 * rms(eager - exact)  # where q and k make nearly all of the error, chance decides
        assert (m[...] - exact).abs().max() < 3e-2


def rms(difference: Tensor) -> float:
    return float(difference.square().mean().sqrt())
