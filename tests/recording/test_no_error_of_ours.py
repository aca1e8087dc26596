"""No error of ours ends the user's forward or backward: it is kept and told when the map is read."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from hypothesis import given, settings
from hypothesis import strategies as st
from support.arguments import KINDS, Locked, Strange, ring
from support.inside import own_registers, registry
from support.untouched import untouched
from timm.layers import Attention as OfTimm
from torch import Tensor, nn

from hookattn import QK, AttentionRecorder, HookattnError, UnreadableError, partition, recipe
from hookattn.image import Geometry, Tokens, cut_windows

OPTIONS: list[dict[str, Any]] = [
    {},
    {"keep": "maps"},
    {"gradients": True},
    {"called_from": True},
    {"keep": "maps", "detach": False},
]


EXTRAS: dict[str, Callable[[], Any]] = {
    "nested": lambda: torch.nested.nested_tensor([torch.randn(3, 4), torch.randn(2, 4)], layout=torch.jagged),
    "sparse": lambda: torch.eye(4).to_sparse(),
    "sparse rows": lambda: torch.eye(4).to_sparse_csr(),
    "meta": lambda: torch.empty(3, device="meta"),
    "quantised": lambda: torch.quantize_per_tensor(torch.randn(4), 0.1, 0, torch.qint8),
    "complex": lambda: torch.randn(3, dtype=torch.complex64),
    "empty": lambda: torch.empty(0, 3),
    "number": lambda: torch.tensor(3),
    "strange": lambda: torch.randn(3).as_subclass(Strange),
    "in a list": lambda: [torch.eye(4).to_sparse(), {"a": torch.randn(2)}],
    "locked": Locked,
    "a generator": lambda: (i for i in range(3)),
    "itself": ring,
}


class Attention(nn.Module):
    """Takes something beside x and leaves it alone."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.qkv = 4, nn.Linear(32, 96)

    def forward(self, x: Tensor, extra: Any = None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn1, self.attn2 = Attention(), Attention()

    def forward(self, x: Tensor, extra: Any) -> Tensor:
        out: Tensor = self.attn2(self.attn1(x, extra))
        return out


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", EXTRAS)
def test_whatever_a_module_is_given_beside_x_the_model_runs_on(name: str, options: dict[str, Any]) -> None:
    model, x = Model(), torch.randn(2, 9, 32, requires_grad=True)
    expected = model(x, EXTRAS[name]())
    (want,) = torch.autograd.grad(expected.pow(2).sum(), x)
    with AttentionRecorder(model, **options) as rec:
        out = model(x, EXTRAS[name]())
        (got,) = torch.autograd.grad(out.pow(2).sum(), x)
    assert torch.equal(out, expected)
    assert torch.equal(got, want)
    assert {*rec.maps, *rec.skipped} == {"attn1", "attn2"}
    assert rec.maps["attn2"][...].shape == (2, 4, 9, 9)  # what cannot be read stops nothing else
    q, k, _ = model.attn1.qkv(x).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
    try:
        whole = rec.maps["attn1"][...]
    except HookattnError:
        return
    torch.testing.assert_close(whole, (q @ k.mT * 8**-0.5).softmax(-1))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_an_encoder_of_pytorch_with_a_padding_mask(options: dict[str, Any]) -> None:
    """In eval mode it makes nested tensors of what is not padding."""
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2).eval()
    x, padding = torch.randn(2, 7, 32), torch.zeros(2, 7, dtype=torch.bool)
    padding[0, 5:] = True
    with torch.no_grad():
        with AttentionRecorder(encoder, **options) as rec:
            out = encoder(x, src_key_padding_mask=padding)
        expected = encoder(x, src_key_padding_mask=padding)
    assert out.shape == expected.shape
    for m in rec.maps.values():
        with pytest.raises(UnreadableError, match=r"nested|could not be computed"):
            m[...]


@pytest.mark.parametrize("keep", ["inputs", "maps"])
def test_a_recipe_that_fails_spoils_its_own_maps_alone(keep: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry._RECIPES, "_facts", registry.list_recipes())

    class Mine(Attention):
        pass

    @recipe(Mine)
    def mine(self: Any, x: Tensor, extra: Any = None) -> QK:
        raise ZeroDivisionError("a recipe of mine")

    model, x = Model(), torch.randn(2, 9, 32)
    model.attn1 = Mine()
    with torch.no_grad(), AttentionRecorder(model, keep=keep) as rec:
        expected = model(x, None)
    with torch.no_grad():
        assert torch.equal(model(x, None), expected)
    with pytest.raises((UnreadableError, ZeroDivisionError), match="a recipe of mine"):
        rec.maps["attn1"][...]
    assert rec.maps["attn2"][...].shape == (2, 4, 9, 9)


# Anything anywhere


class Own(Attention):
    """Masks with what it is given by name, and has dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor, extra: Any = None, mask: Any = None) -> Tensor:
        q, k, v = self.drop(self.qkv(x)).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


class Cached(nn.Module):
    """Asks for what a cache holds, if it is given one, and forms its map by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.q, self.k = 4, nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x: Tensor, extra: Any = None, mask: Any = None) -> Tensor:
        cache = mask if extra is None else extra
        memory = cache.update(x) if hasattr(cache, "update") else x
        q, k, v = (t.unflatten(-1, (4, 8)).transpose(1, 2) for t in (self.q(x), self.k(memory), memory))
        return ((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2)


class Multihead(nn.MultiheadAttention):
    """PyTorch's own, as modules are called here."""

    def forward(self, x: Any, extra: Any = None, mask: Any = None) -> Any:  # type: ignore[override]
        memory = x if extra is None else extra
        return super().forward(x, memory, memory, attn_mask=mask, need_weights=False)[0]


class Padded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(32, 4, batch_first=True)

    def forward(self, x: Any, extra: Any = None, mask: Any = None) -> Any:
        return self.inner(x, x, x, extra, key_padding_mask=mask)[0]


class Block(nn.Module):
    """Cuts windows of a part of its tokens each."""

    def __init__(self, attn: nn.Module) -> None:
        super().__init__()
        self.attn = attn

    def forward(self, x: Any, *extra: Any, **named: Any) -> Any:
        grid = x.unflatten(1, (2, -1)) if isinstance(x, Tensor) and x.dim() == 3 else x
        return self.attn(rearrange(grid, "b y x c -> (b y) x c"), *extra, **named)


class Around(nn.Module):
    def __init__(self, attn: nn.Module) -> None:
        super().__init__()
        self.attn, self.out = attn, nn.Linear(32, 3)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.out(self.attn(*args, **kwargs))


MODELS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "no recipe": (lambda: Around(Own()), "mask"),
    "by hand, with a cache": (lambda: Around(Cached()), "mask"),
    "recipe": (lambda: Around(OfTimm(32, 4, qkv_bias=True)), "attn_mask"),
    "PyTorch's own": (lambda: Around(Multihead(32, 4, batch_first=True)), "mask"),
    "PyTorch's own, with padding": (lambda: Around(Padded()), "mask"),
    "windows": (lambda: Around(Block(Own())), "mask"),
    "alone": (Own, "mask"),
}
EVERY_OPTION = [
    *OPTIONS,
    {"detach": False},
    {"keep": "maps", "gradients": True},
    {"keep": "maps", "gradients": True, "detach": False, "called_from": True, "passes": "all"},
]
WAYS = ["x", "beside", "by name", "x and beside", "x and by name"]


def arguments(way: str, kind: str, other: str, name: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    torch.manual_seed(1)
    thing, x = KINDS[kind](), KINDS[other if " and " in way else "plain"]()
    if way == "x":
        return (thing,), {}
    return ((x,), {name: thing}) if way.endswith("by name") else ((x, thing), {})


def outcome(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """What a model puts out or raises, and all gradients of it."""
    torch.manual_seed(2)
    leaves = [t for t in (*args, *kwargs.values(), *model.parameters()) if type(t) in (Tensor, nn.Parameter)]
    try:
        out = model(*args, **kwargs)
        found = [type(out), out.detach()]
        out.float().square().sum().backward()
    except Exception as error:
        text = str(error).partition("Exception raised from")[0]  # in C++, at addresses
        found = [type(error), re.sub(r"0x[0-9a-f]+|\bj[0-9]+", "", text)]  # jagged sizes are numbered
    grads = [t.grad for t in leaves if t.is_leaf]
    model.zero_grad()
    return [*found, *grads, torch.get_rng_state()]


def alike(a: Any, b: Any) -> bool:
    if not isinstance(a, Tensor):
        return bool(a == b)
    if type(a) is not type(b) or a.dtype != b.dtype or a.layout != b.layout:
        return False
    with suppress(Exception):  # of kinds that cannot be compared
        return torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))
    return True


def read_all(rec: AttentionRecorder) -> None:
    """Ask for everything: what is raised is ours and says something."""
    asked: list[Callable[[], Any]] = [lambda: repr(rec), lambda: repr(rec.maps), lambda: rec.skipped, rec.verify]
    maps = []
    with suppress(HookattnError):
        maps = list(rec.maps.values())
        asked += [lambda name=name: rec.maps[name] for name in rec.maps.skipped]
    for m in maps:
        for name in ("shape", "dtype", "device", "axes", "tokens", "query_tokens", "x", "call", "called_from"):
            asked.append(lambda m=m, name=name: getattr(m, name))
        asked += [lambda m=m: m[...], lambda m=m: m[:, :, 0], lambda m=m: m.image("mean"), lambda m=m: m.image((0.5, 0.5))]
        asked += [m.image, m.verify, lambda m=m: repr(m), lambda m=m: pickle.dumps(m)]
        asked += [lambda m=m: m.gradient[...], lambda m=m: m.gradient.shape, lambda m=m: repr(m.gradient)]
    for ask in asked:
        with suppress(HookattnError, IndexError, ValueError):
            ask()


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(
    st.sampled_from(list(MODELS)),
    st.sampled_from(WAYS),
    st.sampled_from(list(KINDS)),
    st.sampled_from(list(KINDS)),
    st.sampled_from(EVERY_OPTION),
    st.booleans(),
    st.booleans(),
)
def test_whatever_a_model_is_given_it_does_what_it_does_without_us(
    which: str, way: str, kind: str, other: str, options: dict[str, Any], train: bool, grad: bool
) -> None:
    build, name = MODELS[which]
    model = build().train(train)
    with pytest.MonkeyPatch.context() as patch, torch.set_grad_enabled(grad):
        own_registers(patch)

        @partition(Block)
        def windows(self: Any, geometry: Geometry) -> Tokens:
            return cut_windows((2, geometry.block_argument(self, "x")[1] // 2), 1)

        expected = outcome(model, *arguments(way, kind, other, name))
        with untouched(model), AttentionRecorder(model, **options) as rec:
            got = outcome(model, *arguments(way, kind, other, name))
        assert len(got) == len(expected)
        assert all(map(alike, got, expected))
        read_all(rec)


@pytest.mark.parametrize("keep", ["inputs", "maps"])
def test_what_cannot_be_computed_is_told_with_the_name_of_the_map(keep: Any) -> None:
    model, mask = Around(OfTimm(32, 4)), torch.zeros(2, 6, 32)
    with suppress(RuntimeError), AttentionRecorder(model, keep=keep) as rec:
        model(torch.randn(2, 6, 32), mask)
    for ask in (lambda m: m[...], lambda m: m[:, :, 0], lambda m: m[0, 1]):
        with pytest.raises(
            UnreadableError, match=r"it could not be computed: RuntimeError: The (expanded size|size of tensor)"
        ):
            ask(rec.maps[0])
