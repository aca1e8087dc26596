"""Verifying: a map that is put into its module leaves the output as it was, in the forward itself or in a second run."""

from __future__ import annotations

import pickle
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.inside import compare_runs, may_be_tf32, own_registers, steps_of_rounding
from support.mechanisms import MODELS, lively
from support.models import randomise, tiny
from support.reading import record_one
from support.styles import SIZES, STYLES
from support.untouched import untouched
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hookattn import QK, AttentionRecorder, StaleMapError, UnfaithfulMapError, UnreadableError, project, recipe

FORWARD, SECOND = "the output of the forward", "a second run of the module"


OPTIONS: list[dict[str, Any]] = [
    {},
    {"keep": "maps"},
    {"keep": "maps", "dtype": torch.float16},
    {"detach": False},
    {"gradients": True},
    {"passes": "all"},
]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *[(name, OPTIONS[n % 2]) for n, name in enumerate([*MODELS][::3])],
        *[(next(iter(MODELS)), options) for options in OPTIONS],
    ],
    ids=str,
)
def test_maps_are_compared_with_what_the_modules_really_put_out(name: str, options: dict[str, Any]) -> None:
    model, x = lively(name)
    expected = model(x)
    with untouched(model), AttentionRecorder(model, verify=True, **options) as rec:
        assert torch.equal(model(x), expected)
    for m in rec.maps.values():
        moved = m.verify()
        assert moved.against == FORWARD
        assert moved.noise == 0
    assert rec.verify() == max(m.verify() for m in rec.maps.values())
    assert str(rec.verify()).endswith(f"against {FORWARD}")


def test_without_it_two_runs_are_compared_and_that_is_said() -> None:
    model, x = tiny("vit")
    with AttentionRecorder(model) as rec, torch.no_grad():
        model(x)
    moved = rec.maps[0].verify()
    assert moved < 1e-5
    assert moved.against == SECOND
    assert repr(moved) == f"{float(moved):.2g} against {SECOND}"
    again = pickle.loads(pickle.dumps(moved))
    assert (again, again.against, again.noise) == (moved, moved.against, 0)


class Scaled(nn.Module):
    """Attention with a scale that stands outside of it, where nobody sees it change."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.qkv, self.proj = 2, nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v, scale=SCALE["value"]).transpose(1, 2).flatten(2))


SCALE = {"value": 0.5}


def scaled() -> tuple[nn.Module, Tensor]:
    return nn.Sequential(randomise(Scaled())), torch.randn(2, 5, 16)


def test_a_map_that_becomes_another_after_the_forward_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = scaled()
    with AttentionRecorder(model, layers="0") as plain, AttentionRecorder(model, layers="0", verify=True) as rec:
        model(x)
    assert rec.verify() < 1e-5
    monkeypatch.setitem(SCALE, "value", 3.0)
    assert plain.verify() < 1e-5  # two runs agree with each other
    with pytest.raises(UnfaithfulMapError, match=r"moved by .* since the forward"):
        rec.verify()


class NotTwiceTheSame(Scaled):
    """Attention that goes another way each time it runs, for a reason that nobody sees."""

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        SCALE["value"] *= 1.5
        return out


def test_a_module_that_is_not_the_same_twice_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SCALE, "value", 0.5)
    model, x = nn.Sequential(randomise(NotTwiceTheSame())), torch.randn(2, 5, 16)
    with AttentionRecorder(model, layers="0", verify=True) as rec:
        model(x)
    with pytest.raises(UnfaithfulMapError, match=f"{FORWARD}|since the forward"):
        rec.maps[0].verify()
    with AttentionRecorder(model, layers="0", keep="maps", verify=True) as rec:
        model(x)
    assert rec.maps[0].verify().against == FORWARD  # overheard in that very run


@pytest.mark.parametrize("keep", ["inputs", "maps"])
def test_a_recipe_that_is_wrong_is_found_and_the_forward_goes_on(keep: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    own_registers(monkeypatch)

    @recipe(Scaled)
    def wrong(self: Any, x: Tensor) -> QK:
        q, k = project(self.qkv, x, "b n (parts h d) -> parts b h n d", parts=2, of=3, h=2)
        return QK(q, k, scale=0.4)

    model, x = scaled()
    expected = model(x)
    with AttentionRecorder(model, keep=keep, verify=True) as rec:
        assert torch.equal(model(x), expected)
    with pytest.raises(UnfaithfulMapError, match=f"against {FORWARD}, more than"):
        rec.maps[0].verify()
    assert rec.maps[0].verify(tolerance=10) > 1e-3


class Coarse(nn.Linear):
    """A projection whose input is rounded to int8, by the largest of each token."""

    def forward(self, x: Tensor) -> Tensor:
        step = x.detach().abs().amax(-1, keepdim=True) / 127
        return super().forward((x / step).round() * step)


def coarse() -> tuple[nn.Module, Tensor]:
    model, x = tiny("vit", depth=2)
    randomise(model)
    for block in model.blocks:
        projection = Coarse(block.attn.proj.in_features, block.attn.proj.out_features)
        projection.load_state_dict(block.attn.proj.state_dict())
        block.attn.proj = projection
    return model, torch.cat([x, *(x + 0.1 * torch.randn_like(x) for _ in range(300))])


@pytest.mark.parametrize("verify", [True, False])
def test_an_output_that_is_rounded_coarsely_is_judged_by_what_rounding_does_to_it(verify: bool) -> None:
    """A quantised projection jumps by a step where the map differs by a last bit."""
    model, x = coarse()
    with AttentionRecorder(model, verify=verify) as rec, torch.no_grad():
        model(x)
    found = [m.verify() for m in rec.maps.values()]
    assert max(found) > 1e-3
    assert all(m.noise > 1e-3 for m in found if m > 1e-3)
    assert "rounding alone moves it" in repr(max(found))
    with pytest.raises(UnfaithfulMapError):
        rec.verify(tolerance=1e-4)


def test_noise_is_no_excuse_for_another_map() -> None:
    model, x = coarse()
    m = record_one(model, x)
    assert compare_runs(m.call, m[...]).judged("the same", None) < 0.5
    for other in (m[...].flip(-1), m[...].roll(1, 1), m[...] * 1.05):
        with pytest.raises(UnfaithfulMapError, match="the map of 'another'"):
            compare_runs(m.call, other).judged("another", None)


@pytest.mark.parametrize(
    ("module", "precision", "expected"),
    [
        (nn.Conv2d, "highest", True),
        (nn.Linear, "highest", False),
        (nn.Linear, "high", True),
    ],
)
def test_rounding_is_that_of_tf32_where_a_gpu_may_take_products_in_it(
    module: type[nn.Module], precision: str, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: precision)
    call: Any = SimpleNamespace(
        layer=SimpleNamespace(inner=[nn.Module(), module(4, 4, 1) if module is nn.Conv2d else module(4, 4)])
    )
    on_gpu, on_cpu = (SimpleNamespace(is_cuda=is_cuda) for is_cuda in (True, False))
    assert may_be_tf32(call, on_gpu) is expected  # type: ignore[arg-type]
    assert not may_be_tf32(call, on_cpu)  # type: ignore[arg-type]
    steps = steps_of_rounding([torch.zeros(1)], may_be_tf32=expected)
    assert max(steps) == 4 * torch.finfo(torch.float16 if expected else torch.float32).eps


def test_dropout_in_the_fused_kernel_leaves_two_runs_to_compare() -> None:
    model, x = tiny("vit", attn_drop_rate=0.3, proj_drop_rate=0.2)
    model.train()
    state = torch.get_rng_state()
    expected = model(x)
    torch.set_rng_state(state)
    with AttentionRecorder(model, verify=True) as rec:
        assert torch.equal(model(x), expected)
    assert rec.verify() < 1e-4
    assert rec.maps[0].verify().against == SECOND


@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_count_the_same_tensors(reentrant: bool, detach: bool) -> None:
    model, x = tiny("vit")
    x.requires_grad_()
    model(x).sum().backward()
    expected, x.grad = x.grad, None
    for block in model.blocks:
        block.forward = lambda x, own=block.forward, **_: checkpoint(own, x, use_reentrant=reentrant)
    with AttentionRecorder(model, verify=True, detach=detach) as rec:
        model(x).sum().backward()
    assert rec.verify().against == FORWARD
    assert torch.allclose(x.grad, expected, atol=1e-5)


def test_an_edited_module_is_compared_with_a_second_run() -> None:
    model, x = tiny("vit", depth=2)
    with AttentionRecorder(model, verify=True) as rec, torch.no_grad(), rec.edit({0: torch.zeros_like}):
        model(x)
    assert [m.verify().against for m in rec.maps.values()] == [SECOND, FORWARD]


def test_what_cannot_be_compared_says_why_and_ends_nothing() -> None:
    class Overwrites(Scaled):
        def forward(self, x: Tensor) -> Tensor:
            out = super().forward(x)
            x.zero_()
            return out

    model, x = nn.Sequential(randomise(Overwrites())), torch.randn(2, 5, 16)
    with torch.no_grad():
        expected = model(x.clone())
    with AttentionRecorder(model, layers="0", verify=True, keep="maps") as rec, torch.no_grad():
        assert torch.equal(model(x.clone()), expected)
    assert torch.allclose(rec.maps[0][...].sum(-1), torch.tensor(1.0))
    with pytest.raises(StaleMapError, match="changed in place"):
        rec.maps[0].verify()


@pytest.mark.parametrize("keep", ["inputs", "maps"])
@pytest.mark.parametrize(
    "name", ["eager", "heads_third", "keys_before_queries", "chunks_of_queries", "one_image_after_the_other"]
)
def test_maps_of_unknown_classes_are_compared_too(name: str, keep: Any) -> None:
    module, args, true = STYLES[name].make(SIZES["one"])
    expected = module(*args)
    with AttentionRecorder(nn.Sequential(module), layers="0", keep=keep, verify=True) as rec:
        assert torch.equal(rec.model(*args), expected)
    assert rec.verify().against == FORWARD
    assert torch.allclose(rec.maps[0][...].double(), true, atol=1e-5)


def test_what_has_changed_since_is_stale() -> None:
    model, x = tiny("vit", depth=1)
    with AttentionRecorder(model, verify=True) as rec, torch.no_grad():
        model(x)
    with torch.no_grad():
        model.blocks[0].attn.qkv.weight.mul_(2)
    with pytest.raises(StaleMapError):
        rec.verify()


@pytest.mark.parametrize("keep", ["inputs", "maps"])
def test_under_autocast_maps_are_compared_as_they_were_read(keep: Any) -> None:
    model, x = tiny("vit")
    randomise(model)
    with torch.autocast("cpu", torch.bfloat16), AttentionRecorder(model, verify=True, keep=keep) as rec, torch.no_grad():
        model(x)
    assert rec.verify().against == FORWARD


class Answer:
    """An output that holds tensors where nobody finds them."""

    def __init__(self, y: Tensor) -> None:
        self.y = y


class Hidden(Scaled):
    def forward(self, x: Tensor) -> Any:
        return Answer(super().forward(x))


@pytest.mark.parametrize("verify", [True, False])
def test_where_nothing_can_be_compared_nothing_is_verified(verify: bool) -> None:
    model, x = nn.Sequential(randomise(Hidden())), torch.randn(2, 5, 16)
    with AttentionRecorder(model, layers="0", verify=verify) as rec, pytest.MonkeyPatch.context() as patch:
        own_registers(patch)
        recipe(Hidden)(lambda self, x: QK(*project(self.qkv, x, "b n (parts h d) -> parts b h n d", parts=2, of=3, h=2), 9.0))
        model(x)
        with pytest.raises(UnreadableError, match="could be compared"):
            rec.verify()


class Counting(Scaled):
    """Attention that counts its calls, which makes a late map stale."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


def test_errors_are_those_without_it_and_a_module_that_counts_its_calls_is_compared() -> None:
    model, x = nn.Sequential(randomise(Counting())), torch.randn(2, 5, 16)
    with AttentionRecorder(model, layers="0", verify=True) as rec:
        model(x)
    assert rec._passes.all[-1].maps["0"]._compared is not None
    assert model[0].calls == 1
    with pytest.raises(StaleMapError):  # which is told when it is read
        rec.maps[0].verify()
    with AttentionRecorder(model, layers="0", verify=True, keep="maps") as rec:
        model(x)
        model(x)
    assert rec.maps[0].verify().against == FORWARD


def test_inside_of_transforms_and_behind_hooks_of_others_it_is_a_second_run_or_the_same() -> None:
    model, x = tiny("vit", depth=1)
    with AttentionRecorder(model, verify=True) as rec:
        torch.func.grad(lambda x: model(x).sum())(x)
    assert rec.verify() < 1e-4
    with AttentionRecorder(model, verify=True) as rec, torch.no_grad():
        model.blocks[0].attn.register_forward_hook(lambda _, __, y: y * 2, prepend=True)
        model(x)
    assert rec.verify().against == SECOND
