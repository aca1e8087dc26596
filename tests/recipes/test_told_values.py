"""Values that a recipe tells are those that the module multiplies; no more of them is projected than what is asked for."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from support.inside import call_of, list_recipes, list_values, multiplied_values, own_registers, told_values
from support.mechanisms import MODELS, lively
from support.models import ANY_DTYPE, TINY, B, C, D, N, plain, randomise, tiny, tiny_double
from support.modes import Functions, Operators, operations_of
from support.oracle import exists, short_name
from support.reading import record
from support.variants import MULTIHEAD, attention_modules, variants
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hookattn import AttentionMap, AttentionRecorder, UnfaithfulMapError, UnreadableError, project, recipe
from hookattn.testing import check_recipe

# What two softmaxes multiply, or heads that are made one of the other, is left to the forward.
WITHOUT = {"DiffAttention", "DiffParallelScalingBlock", "CascadedGroupAttention"}


def check(m: AttentionMap) -> None:
    told, expected = told_values(m), multiplied_values(m)
    assert (told is None) == (type(call_of(m)[0]).__name__ in WITHOUT)
    assert m.v.shape == expected.shape
    assert m.v.dtype == expected.dtype
    if told is not None:
        torch.testing.assert_close(told, expected, rtol=0, atol=1e-12)
    for index in (..., (slice(None), -1), (-1, 0, -1), (..., slice(None, 1))):
        torch.testing.assert_close(m.v[index], expected[index], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ANY_DTYPE)
def test_of_plain_attention(name: str) -> None:
    maps = record(*tiny_double(name)).maps
    assert maps
    for m in maps.values():
        check(m)


@pytest.mark.parametrize("name", MODELS)
def test_of_every_mechanism(name: str) -> None:
    maps = record(*lively(name)).maps
    for m in {short_name(call_of(m)[0]): m for m in maps.values()}.values():
        check(m)


def recorded(module: nn.Module, *args: Any, **kwargs: Any) -> AttentionMap:
    """The map of a module in float64 whose parameters are moved, called with these."""
    torch.manual_seed(0)
    args, kwargs = torch.utils._pytree.tree_map_only(
        Tensor, lambda t: t.double() if t.is_floating_point() else t, (args, kwargs)
    )
    module = randomise(module).double()
    with AttentionRecorder(module) as rec, torch.no_grad():
        module(*args, **kwargs)
    found: AttentionMap = rec.maps[0]
    return found


@pytest.mark.parametrize("name", variants())
def test_of_variants(name: str) -> None:
    module, args = variants()[name]
    module.eval()  # some classes return None
    check(recorded(module, *args))


@pytest.mark.parametrize("name", attention_modules())
def test_of_options(name: str) -> None:
    rope = {"rope": torch.randn(8, 16)} if "rope" in name or name.startswith("eva") else {}
    check(recorded(attention_modules()[name].eval(), torch.randn(2, 9, 32), **rope))


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize(
    "options", [options for options, _ in MULTIHEAD.values() if options] + [{"batch_first": True}], ids=str
)
def test_of_multihead_attention_of_torch(options: dict[str, Any], batched: bool) -> None:
    q, k, v = torch.randn(2, 5, 32), torch.randn(2, 7, options.get("kdim", 32)), torch.randn(2, 7, options.get("vdim", 32))
    given = [t if options.get("batch_first") else t.transpose(0, 1) for t in (q, k, v)] if batched else [q[0], k[0], v[0]]
    check(recorded(nn.MultiheadAttention(32, 4, **options).eval(), *given))


def by_name(name: str) -> tuple[nn.Module, Any]:
    """A module of vit-pytorch and what it is called with besides x."""
    pytest.importorskip("vit_pytorch")
    module = importlib.import_module(f"vit_pytorch.{name}")
    more = (None, None, None, None) if name == "levjepa_nd" else ()
    return module.Attention(32, heads=4, dim_head=8), more


@pytest.mark.filterwarnings("ignore:flex_attention called without:UserWarning")
@pytest.mark.parametrize("name", ["vit_nd", "vit_nd_rotary", "vit_nd_pope", "levjepa_nd"])
def test_of_a_kernel_that_shows_nothing_the_map_brings_the_output(name: str) -> None:
    module, more = by_name(name)
    m = recorded(module.eval(), x := torch.randn(2, 9, 32), *more)
    brought = rearrange(m[...] @ m.v[...], "b h n d -> b n (h d)")
    with torch.no_grad():  # flex attention has no backward on the CPU
        given, expected = module.to_out(brought), module(x.double(), *more)  # type: ignore[operator]
    torch.testing.assert_close(given, expected, rtol=0, atol=1e-9)
    assert told_values(m) is not None


def test_of_channels_of_vit_pytorch() -> None:
    xcit = pytest.importorskip("vit_pytorch.xcit")
    check(recorded(xcit.XCAttention(32, heads=4, dim_head=8).eval(), torch.randn(2, 3, 4, 32)))


def test_every_class_that_tells_values_is_compared() -> None:
    compared = {kind for case in MODELS.values() for kind in case[3]} | {short_name(m) for m, _ in variants().values()}
    compared |= {short_name(module) for name in TINY for module in tiny(name)[0].modules()}
    known = [name for name in list_recipes() if name.startswith("timm") and exists(name)]
    assert {".".join(name.split(".")[-2:]) for name in known} <= compared
    assert {name.rpartition(".")[2] for name in known if name not in list_values()} <= WITHOUT


# What is paid


def test_no_more_is_projected_than_what_is_asked_for() -> None:
    v = record(plain(), torch.randn(B, N, C).double()).maps[0].v
    assert operations_of(lambda: v.shape) == 0
    assert operations_of(lambda: v[...]) == B * N * 2 * C * C
    assert operations_of(lambda: v[:, :, 0]) == B * 2 * C * C
    assert operations_of(lambda: v[0, 3]) == N * 2 * C * D
    assert operations_of(lambda: v[:, 1, [4, 2]]) == B * 2 * 2 * C * D


def lazily() -> dict[str, tuple[nn.Module, tuple[Any, ...]]]:
    """Modules of 4 heads of width 8 over 16 tokens of 32 channels."""
    from timm.layers import AttentionRope, attention2d
    from timm.models import beit, cait, maxxvit, nest, swin_transformer, swin_transformer_v2

    x = torch.randn(2, 16, 32)
    return {
        "beit": (beit.Attention(32, 4, qkv_bias=True), (x,)),
        "swin": (swin_transformer.WindowAttention(32, 4, window_size=4), (x,)),
        "swin_v2": (swin_transformer_v2.WindowAttention(32, (4, 4), 4), (x,)),
        "rope_split": (AttentionRope(32, 4, qkv_fused=False), (x,)),
        "class": (cait.ClassAttn(32, 4), (x,)),
        "heads_first": (maxxvit.AttentionCl(32, dim_head=8), (x.unflatten(1, (4, 4)),)),
        "grid": (attention2d.Attention2d(32, num_heads=4), (x.mT.unflatten(2, (4, 4)),)),
        "nest": (nest.Attention(32, 4), (x[:, None],)),
        "torch": (nn.MultiheadAttention(32, 4, batch_first=True), (x, x, x)),
    }


@pytest.mark.parametrize("name", lazily())
def test_a_token_costs_a_token_and_a_head_a_head(name: str) -> None:
    module, args = lazily()[name]
    m = recorded(module.eval(), *args)
    expected = multiplied_values(m)
    for index, operations in (((slice(None), slice(None), 0), 2 * 2 * 32 * 32), ((0, 3), 16 * 2 * 32 * 8)):
        assert operations_of(lambda index=index: m.v[index]) == operations
        torch.testing.assert_close(m.v[index], expected[index], rtol=0, atol=1e-12)


# Where the forward is run


class Theirs(nn.Module):
    """Somebody's own attention."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 4
        self.qkv, self.proj = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, 2 * v)
        return self.proj(y.transpose(1, 2).flatten(2))


def theirs(values: Callable[..., Any] | None) -> Callable[..., Any]:
    """Their recipe, with values."""

    @recipe(Theirs, values=values)
    def read(self: Any, x: Tensor) -> Any:
        from hookattn import QK

        return QK(*project(self.qkv, x, "b n (parts h d) -> parts b h n d", parts=2, of=3, h=self.num_heads))

    return read


def parts(self: Any, x: Tensor, heads: int = 4) -> tuple[Tensor, ...]:
    return project(self.qkv, x, "b n (parts h d) -> parts b h n d", parts=3, of=3, h=heads)


WRONG: dict[str, Callable[[Any, Tensor], Any]] = {
    "keys": lambda self, x: 2 * parts(self, x)[1],
    "queries": lambda self, x: 2 * parts(self, x)[0],
    "no factor": lambda self, x: parts(self, x)[2],
    "no bias": lambda self, x: 2 * F.linear(x, self.qkv.weight).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)[2],
    "heads in another order": lambda self, x: 2 * parts(self, x)[2].flip(1),
    "tokens in another order": lambda self, x: 2 * parts(self, x)[2].flip(2),
    "images in another order": lambda self, x: 2 * parts(self, x)[2].flip(0),
    "channels in another order": lambda self, x: 2 * parts(self, x)[2].flip(3),
    "channels before heads": lambda self, x: 2 * self.qkv(x).unflatten(-1, (3, 8, 4)).permute(2, 0, 4, 1, 3)[2],
    "parts last": lambda self, x: 2 * self.qkv(x).unflatten(-1, (4, 3, 8)).permute(3, 0, 2, 1, 4)[2],
    "heads behind tokens": lambda self, x: 2 * parts(self, x)[2].transpose(1, 2),
    "fewer heads": lambda self, x: 2 * parts(self, x, 2)[2],
    "shared heads": lambda self, x: 2 * parts(self, x)[2][:, :1].expand(-1, 4, -1, -1),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_check_recipe_catches_wrong_values(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    own_registers(monkeypatch)
    theirs(WRONG[wrong])
    with pytest.raises(UnfaithfulMapError, match=r"multiplied onto \(values=\)"):
        check_recipe(Theirs(), torch.randn(2, 6, 32))


def test_a_user_tells_values(monkeypatch: pytest.MonkeyPatch) -> None:
    own_registers(monkeypatch)
    theirs(lambda self, x: 2 * parts(self, x)[2])
    check_recipe(Theirs(), torch.randn(2, 6, 32))
    check(recorded(Theirs(), torch.randn(2, 6, 32)))
    with pytest.raises(ValueError, match="has a recipe already"):
        theirs(None)


@pytest.mark.parametrize(("given", "what"), [(torch.zeros(2, 6, 32), r"of shape \(2, 6, 32\)"), (None, "a NoneType")])
def test_what_is_no_array_of_vectors_is_refused(given: Any, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    own_registers(monkeypatch)
    theirs(lambda self, x: given)
    m = recorded(Theirs(), torch.randn(2, 6, 32))
    with pytest.raises(UnreadableError, match=f"has returned {what}, not .batch, heads, keys, head_dim"):
        m.v[...]


@pytest.mark.parametrize("values", [None, lambda self, x: NotImplemented], ids=["none", "declined"])
def test_the_forward_is_run_where_a_recipe_tells_no_values(values: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    own_registers(monkeypatch)
    theirs(values)
    check_recipe(Theirs(), torch.randn(2, 6, 32))
    m = recorded(Theirs(), torch.randn(2, 6, 32))
    assert told_values(m) is None
    torch.testing.assert_close(m.v[...], multiplied_values(m), rtol=0, atol=1e-12)


class Doubling(TorchFunctionMode):
    """A mode of the user's under which the kernel is given twice the values."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            args = (*args[:2], 2 * args[2], *args[3:])
        return func(*args, **(kwargs or {}))


def test_under_modes_and_an_sdpa_of_the_users_the_forward_shows_them(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = plain(), torch.randn(B, N, C).double()
    usual = record(model, x).maps[0].v[...]
    with AttentionRecorder(model) as rec, torch.no_grad(), Doubling():
        model(x)
    torch.testing.assert_close(rec.maps[0].v[...], 2 * usual)
    sdpa = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v, **more: sdpa(q, k, 3 * v, **more))
    torch.testing.assert_close(record(model, x).maps[0].v[...], 3 * usual)


def test_a_forward_of_their_own_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    own_registers(monkeypatch)
    theirs(lambda self, x: 1 / 0)

    class Derived(Theirs):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    m = recorded(Derived(), torch.randn(2, 6, 32))
    torch.testing.assert_close(m.v[...], multiplied_values(m))


# Layers, modes and training


class Noisy(nn.Module):
    """Somebody's wrapper, which is random in train mode."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(F.dropout(x, 0.5, self.training)).sin()  # type: ignore[no-any-return]


class Given(Functions):
    """Keeps the values that `scaled_dot_product_attention` is called with."""

    def __init__(self) -> None:
        super().__init__(self.note)
        self.values: list[Tensor] = []

    def note(self, func: Any, out: Any, args: Any, kwargs: Any) -> None:
        if func is F.scaled_dot_product_attention:
            self.values.append(args[2])


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("layers", [(), ("qkv",)], ids=["plain", "wrapped"])
@pytest.mark.parametrize("split", [False, True], ids=["packed", "split"])
def test_layers_that_draw_numbers_draw_those_of_the_call(split: bool, layers: tuple[str, ...], training: bool) -> None:
    from timm.layers import AttentionRope

    module = randomise(AttentionRope(32, 4, qkv_fused=not split, attn_drop=0.3)).double()
    for layer in ("q_proj", "k_proj", "v_proj") if split and layers else layers:
        setattr(module, layer, Noisy(getattr(module, layer)))
    module.train(training)
    x = torch.randn(2, 9, 32).double()
    torch.manual_seed(3)
    with Given() as given, torch.no_grad():
        module(x)
    torch.manual_seed(3)
    m = record(module, x).maps[0]
    state = torch.get_rng_state()
    assert (told_values(m) is None) == bool(layers and training)
    torch.testing.assert_close(m.v[...], given.values[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(m.v[:, 1, 3:], given.values[0][:, 1, 3:], rtol=0, atol=1e-12)
    assert torch.equal(torch.get_rng_state(), state)


def test_hooks_and_parametrisations_of_others_are_in_the_values() -> None:
    x = torch.randn(B, N, C).double()
    hooked, normed = plain(), plain()
    hooked[0].qkv.register_forward_hook(lambda module, args, out: out.exp())  # type: ignore[index,union-attr]
    nn.utils.parametrizations.spectral_norm(normed[0].qkv)  # type: ignore[index,union-attr]
    for model in (hooked, normed.train(), copy.deepcopy(normed).eval()):
        with Given() as given, torch.no_grad():
            copy.deepcopy(model)(x)
        m = record(model, x).maps[0]
        assert told_values(m) is not None
        torch.testing.assert_close(m.v[...], given.values[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", [name for name in ("vit", "beit", "eva_split", "rope_gqa", "relpos") if name in TINY])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_and_in_half_precision_they_are_those_that_are_multiplied(name: str, dtype: torch.dtype) -> None:
    model, x = tiny(name)
    with AttentionRecorder(model) as cast, torch.no_grad(), torch.autocast("cpu", dtype):
        model(x)
    half = record(copy.deepcopy(model).to(dtype), x.to(dtype))
    for m in (cast.maps[1], half.maps[1]):
        expected = multiplied_values(m)
        assert m.v.dtype == m.v[:, 0, 0].dtype == expected.dtype == dtype
        torch.testing.assert_close(m.v[...], expected)


def test_a_separate_bias_is_rounded_as_the_module_rounds_it() -> None:
    from timm.models import beit

    module, x = randomise(beit.Attention(32, 4, qkv_bias=True, qkv_bias_separate=True)).eval(), torch.randn(2, 9, 32)
    with AttentionRecorder(module) as rec, torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        module(x)
    m = rec.maps[0]
    expected = multiplied_values(m)
    assert m.v.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(m.v[...], expected, rtol=0, atol=0)


def test_the_forward_is_not_run_for_them() -> None:
    m = record(plain(), torch.randn(B, N, C).double()).maps[0]
    called: list[str] = []
    with Operators(lambda func, *_: called.append(str(func))):
        m.v[...]
    assert not [name for name in called if "attention" in name or "softmax" in name]


def test_of_nested_tensors_a_recipe_tells_none() -> None:
    nested = torch.nested.nested_tensor([torch.randn(3, 16), torch.randn(5, 16)], layout=torch.jagged)
    module = nn.MultiheadAttention(16, 4, batch_first=True).eval()
    with (
        AttentionRecorder(module) as rec,
        torch.no_grad(),
        pytest.raises(AssertionError, match="does not support NestedTensor"),
    ):
        module(nested, nested, nested)
    assert told_values(rec.maps[0]) is None
    with pytest.raises(UnreadableError):
        rec.maps[0].v[...]
