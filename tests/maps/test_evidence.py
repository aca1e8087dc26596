"""Axes by evidence: attention in many styles is read right or refused by name, and nothing notices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.inside import forget_what_was_established, no_more_evidence, rearranged, replay
from support.styles import SIZES, STYLES, Sizes, rows
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from hookattn.errors import UnreadableError

MUST_BE_REFUSED_FOR_NOW = {
    "tokens_reversed_and_back",
    "keys_rolled",  # rows and columns in two orders: there is no telling which
    "under_vmap",  # of one image, where all should be seen
}


def others_like(args: tuple[Any, ...]) -> Any:
    """Other values of the same shapes; masks as they are."""
    return pytree.tree_map_only(
        Tensor, lambda t: torch.randn_like(t) if t.is_floating_point() and t.isfinite().all() else t.clone(), args
    )


@pytest.mark.parametrize("size", ["odd", "square"])
@pytest.mark.parametrize("name", STYLES)
def test_a_style_is_read_right_or_refused(name: str, size: str) -> None:
    module, args, true = STYLES[name].make(SIZES[size])
    if true is None or name in MUST_BE_REFUSED_FOR_NOW:
        with pytest.raises(UnreadableError, match=r"with @hookattn\.recipe"):
            replay(module, *args)
        return
    forget_what_was_established()
    replay(module, *others_like(args))
    with no_more_evidence():  # what was established of one call reads another
        torch.testing.assert_close(replay(module, *args).double(), true, atol=1e-5, rtol=1e-4)


FEW = [
    "fused",
    "heads_third",
    "heads_before_images",
    "windows_that_are_padded",
    "chunks_of_queries",
    "talking_heads",
    "pytorchs_own",
]


READ = [name for name in STYLES if name not in MUST_BE_REFUSED_FOR_NOW]
ODD: dict[str, Callable[[Tensor], Tensor]] = {
    "NaN": lambda t: torch.full_like(t, torch.nan),
    "inf": lambda t: torch.full_like(t, torch.inf),
    "-inf": lambda t: torch.full_like(t, -torch.inf),
    "1e30": lambda t: torch.full_like(t, 1e30),
    "-1e5": lambda t: torch.full_like(t, -1e5),
    "5e3": lambda t: torch.full_like(t, 5e3),
    "500": lambda t: torch.full_like(t, 500),
    "zero": torch.zeros_like,
    "tiny": lambda t: torch.randn_like(t) * 1e-30,
    "one-hot rows": lambda t: torch.randn_like(t) * 3e3,
    "one large token": lambda t: torch.zeros_like(t).index_fill(-2, torch.tensor(t.shape[-2] // 2), 5e3),
    "tokens alike": lambda t: torch.randn_like(t[..., :1, :]).expand_as(t),
    "channels alike": lambda t: torch.randn_like(t[..., :1]).expand_as(t),
}


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("name", READ)
def test_what_a_class_was_first_called_with_does_not_matter(name: str, kind: str) -> None:
    """Be it no numbers, numbers that become none in the module, or such that softmaxes have rows of one entry."""
    module, args, true = STYLES[name].make(SIZES["odd"])
    if true is None:
        return
    odd = pytree.tree_map_only(Tensor, lambda t: ODD[kind](t) if t.is_floating_point() and t.dim() > 2 else t, args)
    forget_what_was_established()
    replay(module, *odd)
    with no_more_evidence():
        torch.testing.assert_close(replay(module, *args).double(), true, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["fused", "windows", "a_gate_on_what_comes_out", "it_returns_its_map", "exp_by_sum"])
def test_large_numbers_in_double_precision_hide_nothing(name: str) -> None:
    """Which overflow nothing, and make one-hot rows, by which nothing has a slope."""
    module, args, true = STYLES[name].make(SIZES["odd"])
    module, args = module.double(), pytree.tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, args)
    forget_what_was_established()
    replay(module, *pytree.tree_map_only(Tensor, lambda t: t * 1e12, args))
    with no_more_evidence():
        torch.testing.assert_close(replay(module, *args), true, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["exp_by_sum", "exp_in_place"])
def test_what_overflows_in_the_module_alone_stands_in_no_ones_way(name: str) -> None:
    module, args, true = STYLES[name].make(SIZES["odd"])
    forget_what_was_established()
    replay(module, *(t * 1e3 for t in args))
    with no_more_evidence():
        torch.testing.assert_close(replay(module, *args).double(), true, atol=1e-5, rtol=1e-4)


ODD_WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "NaN": ODD["NaN"],
    "inf": ODD["inf"],
    "zero": ODD["zero"],
    "all the same": lambda t: torch.full_like(t, 5),
    "large": lambda t: t * 100,
    "large biases": lambda t: t * 1e3 if t.dim() == 1 else t,
}


@pytest.mark.parametrize("kind", ODD_WEIGHTS)
@pytest.mark.parametrize("name", READ)
def test_what_weights_a_class_has_first_does_not_matter(name: str, kind: str) -> None:
    module, args, true = STYLES[name].make(SIZES["odd"])
    if true is None:
        return
    forget_what_was_established()
    weights = {name: t.clone() for name, t in module.state_dict().items()}
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(ODD_WEIGHTS[kind](p))
    replay(module, *args)
    module.load_state_dict(weights)
    with no_more_evidence():
        torch.testing.assert_close(replay(module, *args).double(), true, atol=1e-5, rtol=1e-4)


class Own(nn.Module):
    """Attention to what `prepare` makes of tokens, with a weight, a buffer and what else was given."""

    def __init__(self, prepare: Callable[..., Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.prepare = nn.Linear(15, 45), prepare
        self.weight = nn.Parameter(torch.ones(15))
        self.register_buffer("scale", torch.rand(15) + 0.5)

    def forward(self, x: Tensor, *more: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in self.split(x, *more))
        return ((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2) * self.prepare(self, x, *more).softmax(-1)

    def split(self, x: Tensor, *more: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (t.unflatten(-1, (3, 5)) for t in self.qkv(self.prepare(self, x, *more)).chunk(3, -1))
        return q, k, v

    def check(self, x: Tensor, *more: Tensor) -> None:
        q, k, _ = self.split(x, *more)
        torch.testing.assert_close(replay(self, x, *more).double(), rows(q, k, scale=1), atol=1e-5, rtol=1e-4)


def add_places(module: Own, x: Tensor, places: Tensor) -> Tensor:
    return x + F.embedding(places.long(), torch.eye(32, 15))


def scale_by_a_root(module: Own, x: Tensor) -> Tensor:
    return x * module.weight.sqrt()


def take_what_is_open(module: Own, x: Tensor, mask: Tensor) -> Tensor:
    return x[:, mask == 0]


NEEDED: dict[str, tuple[Callable[..., Tensor], list[Tensor]]] = {
    "places": (add_places, [torch.arange(7.0) + 20]),
    "a root": (scale_by_a_root, []),
    "a number": (lambda module, x, factor: x * factor, [torch.tensor(1.5)]),
    "a number for each image": (lambda module, x, factor: x * factor, [torch.tensor([1.5, 0.5]).view(2, 1, 1)]),
    "a divisor": (lambda module, x: x / module.weight, []),
    "an open mask": (take_what_is_open, [torch.zeros(7)]),
    "a mask": (take_what_is_open, [torch.tensor([0, 0, 0, -torch.inf, 0, 0, 0])]),
}


@pytest.mark.parametrize("kind", NEEDED)
def test_a_forward_that_needs_some_of_its_values_has_them(kind: str) -> None:
    """Or near ones: with others it would fail, or make NaN."""
    prepare, more = NEEDED[kind]
    forget_what_was_established()
    Own(prepare).check(torch.randn(2, 7, 15), *more)


class OfChannels(Own):
    def forward(self, x: Tensor, *more: Tensor) -> Tensor:
        q, k, v = self.qkv(self.prepare(self, x, *more)).chunk(3, -1)
        out: Tensor = ((q.mT @ k).softmax(-1) @ v.mT).mT
        return out


@pytest.mark.parametrize("factor", [torch.tensor(1.5), torch.tensor([1.5, 0.5]).view(2, 1, 1)], ids=["all", "each image"])
def test_a_number_that_all_share_makes_no_tokens_of_channels(factor: Tensor) -> None:
    forget_what_was_established()
    with pytest.raises(UnreadableError):
        replay(OfChannels(lambda module, x, factor: x * factor), torch.randn(2, 7, 15), factor)


class Asking(Own):
    def forward(self, x: Tensor, *more: Tensor) -> Tensor:
        out = super().forward(x)
        return out if bool((self.weight > 0).all()) else out.flip(0)


def test_a_forward_that_would_go_another_way_with_other_numbers_keeps_its_own() -> None:
    forget_what_was_established()
    Asking(lambda module, x: x).check(torch.randn(2, 7, 15))


class Clipped(nn.Linear):
    """Bounds of what goes in are learnt, as for models that are quantised."""

    def __init__(self, low_first: bool) -> None:
        super().__init__(15, 45)
        self.low_first = low_first
        self.low, self.high = nn.Parameter(torch.tensor(-4.0)), nn.Parameter(torch.tensor(4.0))

    def forward(self, x: Tensor) -> Tensor:
        x = x.maximum(self.low).minimum(self.high) if self.low_first else x.minimum(self.high).maximum(self.low)
        return super().forward(x)


@pytest.mark.parametrize("low_first", [True, False])
def test_weights_that_go_together_are_tried_as_they_are(low_first: bool) -> None:
    """Of two numbers that are drawn for them, the higher may be that of the lower bound: then nothing gets through."""
    module = Own(lambda module, x: x)
    module.qkv = Clipped(low_first)
    forget_what_was_established()
    module.check(torch.randn(2, 7, 15))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_buffers_that_are_no_numbers_do_not_matter(value: float) -> None:
    module, x = Own(lambda module, x: x * module.scale), torch.randn(2, 7, 15)
    scale = module.scale.clone()
    module.scale.fill_(value)
    forget_what_was_established()
    replay(module, x)
    module.scale.copy_(scale)
    with no_more_evidence():
        module.check(x)


@pytest.mark.parametrize("kind", [*ODD, "below zero"])
def test_an_odd_argument_beside_others_does_not_matter(kind: str) -> None:
    module, x, more = Own(lambda module, x, more: x * more), torch.randn(2, 7, 15), torch.randn(2, 7, 15)
    forget_what_was_established()
    replay(module, ODD.get(kind, lambda t: t.sub(t.amax()) * 3e3)(x), more)
    with no_more_evidence():
        module.check(x, more)


@pytest.mark.parametrize("name", ["a_softmax_gate_beside_the_map", "outputs_of_half_the_channels_each"])
def test_a_wide_module_is_told_as_a_narrow_one(name: str) -> None:
    """Though much is summed up in it."""
    module, args, true = STYLES[name].make(Sizes(2, 8, 7, 256))
    forget_what_was_established()
    got, told = replay(module, *args).double(), true.isfinite()  # the naive softmax overflows here and there
    torch.testing.assert_close(got[told], true[told], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("name", FEW)
def test_one_image_alone(name: str) -> None:
    module, args, true = STYLES[name].make(SIZES["one"])
    torch.testing.assert_close(replay(module, *args).double(), true, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["fused", "heads_third"])
def test_many_tokens_are_told_apart(name: str) -> None:
    """By numbers that are ratios of gradients, in float32."""
    module, args, true = STYLES[name].make(Sizes(1, 2, 1100, 3))
    torch.testing.assert_close(replay(module, *args).double(), true, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", FEW)
def test_the_oracle_sees_a_table_whose_axes_are_swapped(name: str) -> None:
    module, args, true = STYLES[name].make(SIZES["square"])
    for axes in ((0, 1), (1, 2)):
        with rearranged(lambda index, axes=axes: index.transpose(*axes)):
            wrong = replay(module, *args)
        assert wrong.shape != true.shape or not torch.allclose(wrong.double(), true, atol=1e-3)
