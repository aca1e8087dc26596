"""The conformance test of a recipe, for those who write their own."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from .errors import UnfaithfulMapError, UnreadableError
from .maps.reading import source_by_recipe
from .maps.replay import replayed
from .recipes.registry import find_recipe, qualified_name
from .recording.recorder import AttentionRecorder


def check_recipe(module: nn.Module, *args: Any, tolerance: float = 1e-5, **kwargs: Any) -> None:
    """Check the recipe of a module's class on a call, independently of the recipe.

    The check runs on a copy in float64 whose parameters are all moved at random: fresh biases are zero and fresh norms are
    one, and would hide that a recipe has left them out. Three things must hold:

    * the map is the one that replay takes from the module's own forward;
    * put in the place of the module's own map, it leaves the output as it was;
    * rows sum to 1, and a row or a head that is read alone is the same as in the whole map.

        def test_my_attention():
            check_recipe(MyAttention(64, num_heads=4), torch.randn(2, 17, 64))

    Args:
        module: an attention module with a recipe.
        args, kwargs: what its `forward` takes.
        tolerance: the largest absolute difference between two maps, whose entries lie in 0 to 1.

    Raises:
        UnreadableError: the class has no recipe, or one that returns `NotImplemented` for this call.
        UnfaithfulMapError: one of the three does not hold; the message says which.
    """
    name = qualified_name(type(module))
    if find_recipe(module) is None:
        raise UnreadableError(f'{name} has no recipe; file one with @hookattn.recipe("{name}").')
    moved = _moved(module)
    args, kwargs = _double(args), _double(kwargs)
    with AttentionRecorder(moved, layers=lambda _, m: m is moved) as rec, torch.no_grad():
        moved(*args, **kwargs)
    m = rec.maps[0]
    if source_by_recipe(m.call) is None:
        raise UnreadableError(f"the recipe of {name} does not describe this call; check it on one that it describes.")
    whole = m[...]
    with torch.no_grad():
        expected = replayed(moved, *args, **kwargs).narrow().values()
    _compare("the map", whole, expected, "what replay takes from the module's own forward", tolerance)
    m.verify()
    _compare("the sum of a row", whole.sum(-1), torch.ones_like(whole.sum(-1)), "1", tolerance)
    _compare("a row that is read alone", m[:, :, -1], whole[:, :, -1], "the row of the whole map", tolerance)
    _compare("a head that is read alone", m[:, -1], whole[:, -1], "the head of the whole map", tolerance)


def _moved(module: nn.Module) -> nn.Module:
    """A copy in float64 and eval mode with noise on every parameter."""
    moved = copy.deepcopy(module).double()
    moved.eval()  # some classes return None
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in moved.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.add_(noise.to(parameter.device), alpha=0.2)
    return moved


def _double(value: Any) -> Any:
    return torch.utils._pytree.tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, value)


def _compare(what: str, got: Tensor, expected: Tensor, of: str, tolerance: float) -> None:
    if got.shape != expected.shape:
        raise UnfaithfulMapError(f"{what} has shape {tuple(got.shape)}; {of} has {tuple(expected.shape)}.")
    difference = float((got - expected).abs().max()) if got.numel() else 0.0
    if not difference <= tolerance:
        raise UnfaithfulMapError(f"{what} differs from {of} by {difference:.2g}, more than {tolerance:.2g}.")
