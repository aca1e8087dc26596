"""The conformance test of a recipe, a layout or a partition, for those who write their own."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..conditions.devices import telling_apart
from ..errors import ModelError, UnfaithfulMapError, UnreadableError
from ..maps.attention_map import AttentionMap
from ..maps.established import source_by_recipe
from ..maps.forward import Forward
from ..maps.replay import replayed, replayed_by_evidence
from ..maps.vectors import values_by_recipe
from ..recipes.places import find_block
from ..recipes.registry import find_layout, find_recipe, qualified_name
from ..recording.recorder import AttentionRecorder
from .places import check_places


def check_recipe(module: nn.Module, *args: Any, tolerance: float = 1e-5, **kwargs: Any) -> None:
    """Check the recipe of a module's class on a call, and where its tokens lie, independently of both.

    The check runs on a copy in float64 whose parameters are all moved at random: fresh biases are zero and fresh norms are
    one, and would hide that a recipe has left them out. It holds for the module itself if its class has a recipe or a layout,
    else for each attention in it that has one, or stands in a block with a partition. Of each map must hold:

    * it is the one that replay takes from the module's own forward, and what multiplies the values in it;
    * put in the place of the module's own map, it leaves the output as it was;
    * rows sum to 1, and a row or a head that is read alone is the same as in the whole map;
    * where its recipe tells values, they are those that the module multiplies, whole and a token or a head alone;
    * where a layout or a partition tells the places of its tokens: when one place changes of the grid that goes into the block
      that cuts windows (else into the module), those queries and keys change that stand for it and no others. Pooled tokens
      change with the places of their cell, those behind a convolution with the neighbours too, each in the same way; padding
      changes with nothing. What depends on no place at all, such as a learned query, is not looked at.

        def test_my_attention():
            check_recipe(MyAttention(64, num_heads=4), torch.randn(2, 17, 64))

        def test_my_windows():
            check_recipe(MyBlock(64, num_heads=4, window=4, shift=2), torch.randn(2, 8, 12, 64))

    There are as many forwards as places: take a small grid, of more than one window, whose rows, columns and channels differ.
    Two images prove that windows go image by image.

    Args:
        module: an attention module with a recipe or a layout, or a module that holds such or cuts windows for one.
        args, kwargs: what its `forward` takes.
        tolerance: the largest absolute difference between two maps, whose entries lie in 0 to 1.

    Raises:
        ModelError: the module lies on another device than what it is called with.
        UnreadableError: no class has a recipe or a place, or a recipe returned `NotImplemented` for this call.
        UnfaithfulMapError: one of these does not hold; the message says which.
        TokenError: a layout or a partition returned what does not fit its map, or the places cannot be proven by this call.
    """
    moved = _move_parameters(module)
    args, kwargs = pytree.tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, (args, kwargs))
    chosen = _find_described(moved)
    if not chosen:
        name = qualified_name(type(module))
        raise UnreadableError(
            f'{name} has no recipe; file one with @hookattn.recipe("{name}"). If it is a block that cuts windows for attention '
            "inside it, tell how with @hookattn.partition."
        )
    recorder = AttentionRecorder(moved, layers=lambda _, m: m in chosen)
    with telling_apart(moved, args, kwargs), recorder as rec, torch.no_grad():
        moved(*args, **kwargs)
    for m in rec.maps.values():
        _check_map(m, tolerance)
        check_places(m, moved, args, kwargs)


def _move_parameters(module: nn.Module) -> nn.Module:
    """A copy in float64 and eval mode with noise on every parameter."""
    moved = copy.deepcopy(module).double()
    moved.eval()  # some classes return None
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in moved.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype, device="cpu")
            parameter.add_(noise.to(parameter.device), alpha=0.2)
    return moved


def _find_described(module: nn.Module) -> list[nn.Module]:
    """A module that has a recipe or a layout, else the attention inside it that has one or is given windows."""
    # an attention inside of an attention is its own affair
    if find_recipe(module) or find_layout(module):
        return [module]
    try:
        attention = [(name, module.get_submodule(name)) for name in AttentionRecorder(module).layers]
    except (AttributeError, ModelError):  # it is itself named like attention, or nothing in it is
        return []
    return [m for name, m in attention if find_recipe(m) or find_layout(m) or find_block(module, name)]


def _check_map(m: AttentionMap, tolerance: float) -> None:
    """Compare a map with what replay takes from the module, and with parts of itself."""
    whole = m[...]
    module = m.call.layer.module
    if find_recipe(module) is not None:
        with m.call.resumed():
            if source_by_recipe(m.call) is None:
                name = qualified_name(type(module))
                raise UnreadableError(f"the recipe of {name} does not describe this call; check it on one that it describes.")
            expected = replayed(m.call).narrow().values()
        _compare("the map", whole, expected, "what the module's own forward forms", tolerance)
        _check_axes(m, whole, tolerance)
    m.verify()
    _compare("the sum of a row", whole.sum(-1), torch.ones_like(whole.sum(-1)), "1", tolerance)
    _compare("a row that is read alone", m[:, :, -1], whole[:, :, -1], "the row of the whole map", tolerance)
    _compare("a head that is read alone", m[:, -1], whole[:, -1], "the head of the whole map", tolerance)
    _check_values(m, tolerance)


def _check_values(m: AttentionMap, tolerance: float) -> None:
    """Compare values that a recipe tells with what the module's own forward multiplies, and with parts of themselves."""
    with m.call.resumed():
        if values_by_recipe(m.call) is None:
            return
        expected = Forward(m.call).values()
    whole = m.v[...]
    _compare("what the map is multiplied onto (values=)", whole, expected, "what the module multiplies", tolerance)
    _compare("a token of the values that is read alone", m.v[:, :, -1], whole[:, :, -1], "that of all of them", tolerance)
    _compare("a head of the values that is read alone", m.v[:, -1], whole[:, -1], "that of all of them", tolerance)


def _check_axes(m: AttentionMap, whole: Tensor, tolerance: float) -> None:
    """Compare a map with what multiplies the values, found by derivatives of the module's forward alone.

    Numbers and shapes alone do not tell what axes mean: queries may stand where heads should.
    """
    try:
        with m.call.resumed():
            found = replayed_by_evidence(m.call).narrow().values()
    except UnreadableError:  # there is much that evidence cannot decide, such as attention between channels
        return
    if found.shape == whole.shape:  # two softmaxes a head are one map there, their weighted sum
        _compare("the map", whole, found.to(whole), "what multiplies the values", tolerance)


def _compare(what: str, got: Tensor, expected: Tensor, of: str, tolerance: float) -> None:
    if got.shape != expected.shape:
        raise UnfaithfulMapError(f"{what} has shape {tuple(got.shape)}; {of} has {tuple(expected.shape)}.")
    difference = float((got - expected).abs().max()) if got.numel() else 0.0
    if not difference <= tolerance:
        raise UnfaithfulMapError(f"{what} differs from {of} by {difference:.2g}, more than {tolerance:.2g}.")
