"""Axes by evidence: attention in many styles is read right or refused by name, and nothing notices."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.inside import forget_what_was_established, no_more_evidence, rearranged, replay
from support.styles import SIZES, STYLES, Sizes
from torch import Tensor
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


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30, -1e5], ids=["NaN", "inf", "too large", "too low"])
@pytest.mark.parametrize("name", [name for name in STYLES if name not in MUST_BE_REFUSED_FOR_NOW])
def test_numbers_that_are_none_stand_in_no_ones_way(name: str, value: float) -> None:
    """Be they in the input, or made of it in the module, of the first call that is seen of a class."""
    module, args, true = STYLES[name].make(SIZES["odd"])
    if true is None:
        return
    odd = pytree.tree_map_only(
        Tensor, lambda t: torch.full_like(t, value) if t.is_floating_point() and t.dim() > 2 else t, args
    )
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


@pytest.mark.parametrize("name", ["fused", "heads_third", "exp_by_sum"])
def test_weights_that_are_no_numbers_stand_in_no_ones_way(name: str) -> None:
    module, args, true = STYLES[name].make(SIZES["odd"])
    forget_what_was_established()
    weights = {name: t.clone() for name, t in module.state_dict().items()}
    for p in module.parameters():
        torch.nn.init.constant_(p, float("nan"))
    replay(module, *args)
    module.load_state_dict(weights)
    with no_more_evidence():
        torch.testing.assert_close(replay(module, *args).double(), true, atol=1e-5, rtol=1e-4)


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
