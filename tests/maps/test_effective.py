"""What multiplies the values is the tensor that does in the module itself, and so are the values."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from support.inside import forget_what_was_established, own_registers
from support.models import ANY_DTYPE, TINY, B, C, N, plain, randomise, tiny_double
from support.modes import Functions, operations_of
from timm.layers.diff_attention import DiffAttention
from timm.models.cait import TalkingHeadAttn
from timm.models.convit import GPSA
from timm.models.levit import Attention as LevitAttention
from timm.models.volo import OutlookAttention
from torch import Tensor, nn

from hookattn import QK, AttentionRecorder, RecorderError, UnreadableError, recipe
from hookattn.analysis import contributions


def recorded(model: nn.Module, *args: Any, **options: Any) -> Any:
    with AttentionRecorder(model, **options) as rec, torch.no_grad():
        model(*args)
    return rec.maps


def multiplied(model: nn.Module, *args: Any) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Factors and outcome of each product of two four-axis activations, on the unfused path."""
    found = []

    def see(func: Any, out: Any, args: Any, kwargs: Any) -> None:
        if getattr(func, "__name__", "") in ("matmul", "__matmul__"):
            found.append((*(t.detach().clone() for t in args), out.detach().clone()))

    flagged = [m for m in model.modules() if getattr(m, "fused_attn", False)]
    for m in flagged:
        m.fused_attn = False
    with torch.no_grad(), Functions(see):
        model(*args)
    for m in flagged:
        m.fused_attn = True
    return [each for each in found if each[0].dim() >= 4]


@pytest.mark.parametrize("name", [name for name in ANY_DTYPE if not name.startswith("differential")])
def test_it_is_the_map_bit_for_bit_where_the_map_is_what_multiplies(name: str) -> None:
    model, x = tiny_double(name)
    for m in recorded(model, x).values():
        assert m.effective.shape == m.shape
        assert torch.equal(m.effective[...], m[...])
        assert torch.equal(m.effective[1, -1, 2:5, ::2], m[1, -1, 2:5, ::2])


def test_a_row_of_it_costs_what_a_row_of_the_map_does_once_that_is_known() -> None:
    m = recorded(plain(), torch.randn(B, N, C).double())[0]
    m.effective[0, 0, 0]
    assert operations_of(lambda: m.effective[:, :, 0]) == operations_of(lambda: m[:, :, 0])


MIXED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "talking heads": (lambda: TalkingHeadAttn(24, 3, qkv_bias=True), (2, 7, 24)),
    "a gated sum": (lambda: GPSA(24, 3), (2, 16, 24)),
    "a difference": (lambda: DiffAttention(24, 3, depth=2), (2, 7, 24)),
}


@pytest.mark.parametrize("kind", MIXED)
def test_it_and_the_values_are_the_factors_of_the_products_of_the_module(kind: str) -> None:
    torch.manual_seed(0)
    build, size = MIXED[kind]
    model, x = randomise(build()).double().eval(), torch.randn(*size).double()
    (*_, (attention, values, outcome)) = multiplied(model, x)
    m = recorded(model, x)[0]
    torch.testing.assert_close(m.effective[...], attention, rtol=0, atol=1e-12)
    torch.testing.assert_close(m.effective[:, 1:, 3], attention[:, 1:, 3], rtol=0, atol=1e-12)
    torch.testing.assert_close(m.v[...], values, rtol=0, atol=1e-12)
    torch.testing.assert_close(m.effective[...] @ m.v[...], outcome, rtol=0, atol=1e-12)
    assert (m.effective[...] - m[:, : attention.shape[1]]).abs().max() > 0.01
    if kind != "talking heads":
        assert 2 * m.effective.shape[1] == m.shape[1]


@pytest.mark.parametrize("name", [name for name in TINY if name.startswith("differential")])
def test_signed_differences_are_those_of_the_unfused_path(name: str) -> None:
    model, x = tiny_double(name)
    products = multiplied(model, x)[1::2]
    maps = recorded(model, x)
    assert len(products) == len(maps)
    for m, (attention, values, _) in zip(maps.values(), products):
        for index in (..., (1, slice(1, None), slice(2, 5)), (slice(1), [2, 0], 3)):
            torch.testing.assert_close(m.effective[index], attention[index], rtol=0, atol=1e-11)
        torch.testing.assert_close(m.v[...], values)


class OwnAttention(nn.Module):
    """Attention of nobody's: `change` is done to its map, `multiply` is how it is multiplied."""

    def __init__(self, change: Any = lambda a: a, multiply: Any = lambda a, v: a @ v) -> None:
        super().__init__()
        self.qkv, self.change, self.multiply, self.out = nn.Linear(12, 36), change, multiply, nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 6)).permute(2, 0, 3, 1, 4)
        a = self.change((q @ k.mT).softmax(-1))
        return self.out(self.multiply(a, v).transpose(1, 2).flatten(2))

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map and values."""
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 6)).permute(2, 0, 3, 1, 4)
        return (q @ k.mT).softmax(-1), v


def in_place(a: Tensor) -> Tensor:
    a[..., 1] = 0
    return a.mul_(3)


def of_view(a: Tensor) -> Tensor:
    a.view(-1)[::2] *= 2
    return a


CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "scaled": lambda a: a * 2,
    "renormalised": lambda a: (b := a.masked_fill(a < a.topk(2, -1)[0][..., -1:], 0)) / b.sum(-1, keepdim=True),
    "written into": in_place,
    "written into as a view": of_view,
    "what is small left out": lambda a: a.masked_fill(a < 0.02, 0),  # of which there is none in an even map
    "an identity": lambda a: a + torch.eye(a.shape[-1]).to(a),
}


@pytest.fixture
def described(monkeypatch: pytest.MonkeyPatch) -> None:
    """A recipe for attention of nobody's: its map is the softmax, whatever is done to it."""
    own_registers(monkeypatch)

    @recipe(OwnAttention)
    def describe(self: Any, x: Tensor) -> QK:
        q, k, _ = self.qkv(x).unflatten(-1, (3, 2, 6)).permute(2, 0, 3, 1, 4)
        return QK(q, k, scale=1.0)


@pytest.mark.usefixtures("described")
@pytest.mark.parametrize("kind", CHANGES)
def test_what_is_done_to_a_map_is_in_it(kind: str) -> None:
    torch.manual_seed(1)
    model, x = randomise(OwnAttention(CHANGES[kind])).double(), torch.randn(3, 5, 12).double()
    m = recorded(model, x)[0]
    attention, values = model.parts(x)
    with torch.no_grad():
        expected = CHANGES[kind](attention.detach().clone())
    assert not torch.equal(expected, attention)
    torch.testing.assert_close(m.effective[...], expected)
    torch.testing.assert_close(m.v[...], values)


@pytest.mark.usefixtures("described")
def test_heads_are_those_of_the_map_that_they_are_made_of() -> None:
    model, x = randomise(OwnAttention(lambda a: a.flip(1) * 2)).double(), torch.randn(3, 5, 12).double()
    m = recorded(model, x)[0]
    attention, values = model.parts(x)
    torch.testing.assert_close(m[...], attention)
    torch.testing.assert_close(m.effective[...], 2 * attention)
    torch.testing.assert_close(m.v[...], values.flip(1))


PRODUCTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "bmm": lambda a, v: torch.bmm(a.flatten(0, 1), v.flatten(0, 1)).unflatten(0, a.shape[:2]),
    "einsum": lambda a, v: torch.einsum("b h i j, b h j d -> b h i d", a, v),
    "einsum, heads last": lambda a, v: torch.einsum("bijh,bjhd->bihd", a.permute(0, 2, 3, 1), v.transpose(1, 2)).transpose(
        1, 2
    ),
    "einsum, the map second": lambda a, v: torch.einsum("bhjd,bhij->bhid", v, a),
    "values first": lambda a, v: (v.mT @ a.mT).mT,
    "head by head": lambda a, v: torch.stack([a[:, h] @ v[:, h] for h in range(a.shape[1])], 1),
    "image by image": lambda a, v: torch.stack([torch.matmul(a[b], v[b]) for b in range(a.shape[0])]),
    "in chunks of queries": lambda a, v: torch.cat([a[:, :, :2] @ v, a[:, :, 2:] @ v], 2),
}


@pytest.mark.parametrize("kind", PRODUCTS)
@pytest.mark.parametrize("change", ["none", "renormalised", "by hand"])
def test_however_it_is_multiplied(kind: str, change: str, request: pytest.FixtureRequest) -> None:
    torch.manual_seed(1)
    edit = CHANGES["renormalised"] if change != "none" else lambda a: a
    if change == "renormalised":  # else the map is by evidence what multiplies already
        request.getfixturevalue("described")
    model, x = randomise(OwnAttention(edit, PRODUCTS[kind])).double(), torch.randn(3, 5, 12).double()
    m = recorded(model, x)[0]
    attention, values = model.parts(x)
    torch.testing.assert_close(m[...], attention if change == "renormalised" else edit(attention))
    torch.testing.assert_close(m.effective[...], edit(attention))
    torch.testing.assert_close(m.v[...], values)
    assert (change != "renormalised") == torch.equal(m.effective[...], m[...])


REFUSED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "multiplied onto several": lambda a, v: a @ v + a @ v.roll(1, 2),
    "no product of matrices": lambda a, v: (a[..., None] * v[:, :, None]).sum(3),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_told_is_refused(kind: str) -> None:
    m = recorded(randomise(OwnAttention(multiply=REFUSED[kind])).double(), torch.randn(3, 5, 12).double())[0]
    for read in (lambda: m.v[...], lambda: m.effective[...], m.output):
        with pytest.raises(UnreadableError, match="multiplied onto"):
            read()


def test_the_map_is_looked_for_by_its_way_not_by_what_the_class_is_called() -> None:
    """Two modules of one class, one after the other, of which one changes its map."""
    x = torch.randn(3, 5, 12).double()
    for change in (lambda a: a, lambda a: a * 2, lambda a: a):
        m = recorded(model := randomise(OwnAttention(change)).double(), x)[0]
        torch.testing.assert_close(m.effective[...], change(model.parts(x)[0]))


def test_in_train_mode_dropout_is_left_out() -> None:
    torch.manual_seed(0)
    model, x = randomise(TalkingHeadAttn(24, 3, attn_drop=0.5, proj_drop=0.5)).double().train(), torch.randn(2, 7, 24).double()
    m = recorded(model, x)[0]
    (*_, (attention, values, _)) = multiplied(model.eval(), x)
    model.train()
    torch.testing.assert_close(m.effective[...], attention, rtol=0, atol=1e-12)
    torch.testing.assert_close(m.v[...], values, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_other_dtypes_it_is_exact_within_rounding(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, x = randomise(DiffAttention(24, 3, depth=2)).eval(), torch.randn(2, 7, 24)
    expected = recorded(model.double(), x.double())[0].effective[...]
    found = recorded(model.to(dtype), x.to(dtype))[0].effective
    assert found.dtype == found[...].dtype == torch.float32
    torch.testing.assert_close(found[...].double(), expected, rtol=0, atol=1e-5 if dtype == torch.float32 else 0.1)


def test_it_is_read_and_drawn_like_a_map() -> None:
    model, x = tiny_double("differential")
    m = recorded(model, x)[0]
    n = m.effective
    assert n.axes == m.axes
    assert n.tokens.prefix == m.tokens.prefix
    assert n.query_tokens.grid_size == m.query_tokens.grid_size
    torch.testing.assert_close(n.rows("reg0" if "reg0" in m.tokens.prefix else 0), n[:, :, 0])
    assert n.image((1, 1)).shape == m.image((1, 1)).shape
    for read in (n.verify, lambda: n.v[...], lambda: n.x):
        with pytest.raises(RecorderError, match="that of the map"):
            read()


def test_outlook_and_transposed_products_have_values_too() -> None:
    torch.manual_seed(0)
    for model, x in (
        (OutlookAttention(24, 3), torch.randn(2, 4, 4, 24)),
        (LevitAttention(24, 8, 3, resolution=(3, 3), use_conv=True), torch.randn(2, 24, 3, 3)),
    ):
        model, x = randomise(model).double(), x.double()
        model.train(mode=False)
        (*_, (_, _, outcome)) = multiplied(model, x)
        m = recorded(model, x)[0]
        found = m.effective[...] @ m.v[...]
        assert torch.equal(m.effective[...], m[...])
        torch.testing.assert_close(found.flatten().sort()[0], outcome.flatten().sort()[0])


def test_maps_whose_call_was_let_go_have_none() -> None:
    with pytest.raises(RecorderError, match='keep="inputs"'):
        recorded(plain(), torch.randn(B, N, C).double(), keep="maps")[0].effective[...]


def test_windows_of_swin_have_theirs() -> None:
    torch.manual_seed(0)
    options = {"img_size": 64, "window_size": 4, "embed_dim": 24, "depths": (2,), "num_heads": (3,)}
    model: Any = timm.create_model("swin_tiny_patch4_window7_224", **options)
    model, x = randomise(model).double().eval(), torch.randn(2, 3, 64, 64).double()
    products = multiplied(model, x)[1::2]
    for m, (attention, values, outcome) in zip(recorded(model, x).values(), products):
        assert torch.equal(m.effective[...], m[...])
        torch.testing.assert_close(m.effective[...], attention)
        torch.testing.assert_close(m.v[...], values)
        torch.testing.assert_close(m.effective[...] @ m.v[...], outcome)


READINGS: dict[str, Callable[[Any], Tensor]] = {
    "effective": lambda m: m.effective[...],
    "output": lambda m: m.output(),
    "values": lambda m: m.v[...],
    "contributions": lambda m: contributions(m)[...],
}


NAMES = ["vit_scale_norm", "eva_split", "parallel", "differential", "differential_parallel"]


def readings(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    m, found = recorded(model, images)[0], {}
    for name, read in READINGS.items():
        with suppress(UnreadableError):  # contributions of what does more than project
            found[name] = read(m)
    return found


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e30, -1e5, 5e3, 0])
@pytest.mark.parametrize("name", NAMES)
def test_what_becomes_of_a_map_does_not_depend_on_the_images_that_are_seen_first(name: str, value: float) -> None:
    """Such as those of a run that has diverged, or of none."""
    model, x = tiny_double(name)
    expected = readings(model, x)
    other = copy.deepcopy(model)
    forget_what_was_established()
    readings(other, torch.full_like(x, value))
    torch.testing.assert_close(readings(other, x), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("seen", [[], ["effective"]], ids=["nothing seen before", "one reading before"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e30])
@pytest.mark.parametrize("name", NAMES)
def test_what_weights_that_are_no_numbers_show_is_not_remembered(name: str, value: float, seen: list[str]) -> None:
    model, x = tiny_double(name)
    expected = readings(model, x)
    other = copy.deepcopy(model)
    forget_what_was_established()
    for reading in seen:
        READINGS[reading](recorded(other, x)[0])
    for p in other.parameters():
        nn.init.constant_(p, value)
    readings(other, x)
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(readings(other, x), expected, rtol=0, atol=1e-9)


class Ending(OwnAttention):
    """What comes out is ended by `end(out, x, ...)`."""

    def __init__(self, end: Callable[..., Tensor]) -> None:
        super().__init__(lambda a: a * 2)
        self.end = end

    def forward(self, x: Tensor, *more: Tensor) -> Tensor:
        return self.end(super().forward(x), x, *more)


ENDS: dict[str, tuple[Callable[..., Tensor], list[Tensor]]] = {
    "a gate over tokens": (lambda out, x: out * x.softmax(1), []),
    "a root": (lambda out, x: out * (x / 1e3).sqrt(), []),
    "places": (lambda out, x, places: out * (1 + F.embedding(places.long(), torch.eye(32, 12))), [torch.arange(5.0) + 20]),
    "a question": (lambda out, x: 2 * (out if bool((x > 0).all()) else out.flip(1)), []),
}


@pytest.mark.parametrize("kind", ENDS)
def test_what_a_head_adds_stands_where_it_does_in_the_call(kind: str) -> None:
    """Though a gate was closed when the class was first seen, and though other numbers fail, or go another way."""
    end, more = ENDS[kind]
    torch.manual_seed(0)
    model, x = randomise(Ending(end)).double(), torch.rand(2, 5, 12).double() + 0.5
    forget_what_was_established()
    recorded(model, x.index_fill(1, torch.tensor(2), 800), *more)[0].output()
    m = recorded(copy.deepcopy(model), x, *more)[0]
    with torch.no_grad():
        nothing = end(model.out.bias.expand(2, 5, 12), x, *more)
        torch.testing.assert_close(m.output().sum(1) + nothing, model(x, *more), rtol=0, atol=1e-9)
