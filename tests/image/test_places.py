"""Where queries and keys lie on the image, against what moves when one place of a feature map does.

The oracle knows nothing of layouts: it changes the feature map that goes into a block at one (row, col), sees which queries and
keys of the map are others than before, and these must be the ones that are named for (row, col).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from support.image import (
    Place,
    build,
    some_places,
)
from support.inside import form_of
from support.places import CASES, HIERA, Case, patches
from support.reading import record
from torch import Tensor, nn

from hookattn import QK, AttentionMap, TokenError
from hookattn.image import Tokens

# The oracle


@contextmanager
def moving(model: nn.Module, site: str, part: Callable[[Tensor, int, Place], Tensor], places: list[Place]) -> Iterator[None]:
    """Add noise to what goes into a module ("block:in") or comes out of it ("block:out"): in image i + 1 at the i-th place."""
    name, _, side = site.partition(":")

    def moved(x: Tensor) -> Tensor:
        x = x.clone()
        for image, place in enumerate(places, start=1):
            part(x, image, place).add_(torch.randn_like(part(x, image, place)))
        return x

    module = model.get_submodule(name)
    if side == "in":
        handle = module.register_forward_pre_hook(lambda module, args: (moved(args[0]), *args[1:]))
    else:
        handle = module.register_forward_hook(lambda module, args, out: moved(out))
    with handle:
        yield


def what_moved(m: AttentionMap, images: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(windows, queries) and (windows, keys) that are others than in the first image, image by image."""
    source = form_of(m)
    if isinstance(source, QK):
        parts = [part.unflatten(0, (images, -1)) for part in (source.q, source.k)]
        yield from zip(*(differ(part[1:], part[0]).any(2).any(-1) for part in parts))
        return
    scores = source.tensor[:, :1].unflatten(0, (images, -1))  # of one head: the next may be made of what this one gives
    for moved in differ(scores[1:], scores[0])[:, :, 0]:
        queries = moved.double().mean(-1) > 0.5
        yield queries, (moved & ~queries[..., None]).any(1)


def differ(a: Tensor, b: Tensor) -> Tensor:
    """Where two results differ by more than the last bits, which are others for images in other places of a batch."""
    return (a - b).abs() > 1e-9 * b.abs().max()


def named(tokens: Tokens, place: Place, how: str, found: Tensor) -> Tensor:
    """(windows, tokens): those that are named for a place; of what has been found, those that stand for nothing."""
    kind, *sides = how.split()
    cell = [int(side) for side in sides] * 2 if len(sides) < 2 else [int(side) for side in sides]
    row, column = (place[0] // cell[0], place[1] // cell[1]) if cell else place
    nothing = torch.zeros_like(tokens.select("mean")[0])
    if kind == "every" and (place[0] % cell[0] or place[1] % cell[1]):
        return nothing
    if row < tokens.grid_size[0] and column < tokens.grid_size[1]:
        try:
            return tokens.select((row, column))[0]
        except TokenError:
            return nothing
    return nothing if tokens.places is None else found & (tokens.places[0] < 0)  # a cell that is not full


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_what_is_named_for_a_place_is_what_moves_with_it(case: Case) -> None:
    model = build(case.model, *case.more, **case.options)
    places = some_places(case.grid)
    shape = case.size[1:] if len(case.size) > 2 else (3, *case.size)
    x = torch.randn(1, *shape).double().expand(len(places) + 1, *shape)
    block = case.attention.rpartition(".")[0]
    site = {"image": ":in", "block": f"{block}:in", "attention": f"{case.attention}:in"}.get(case.site, case.site)
    with moving(model, site, case.part, places):
        m = record(model, x, layers=case.attention).maps[0]
        moved = list(what_moved(m, len(x)))
    assert m.query_tokens.windows == m.tokens.windows
    assert m.axes[0] == ("batch" if m.tokens.windows == 1 else "batch * windows")
    for place, (queries, keys) in zip(places, moved):
        for tokens, found, how in ((m.query_tokens, queries, case.queries), (m.tokens, keys, case.keys)):
            expected = found if how == "none" else named(tokens, place, how, found)
            if how.startswith("near"):
                assert (found | ~expected).all() or not found.any(), (how, place, found.nonzero(), expected.nonzero())
                assert found.sum() <= 9
            else:
                assert torch.equal(found, expected), (how, place, found.nonzero(), expected.nonzero())


@pytest.mark.parametrize("block", range(1, 5))
def test_the_tokens_of_hiera_are_named_for_where_reroll_puts_them(block: int) -> None:
    """Queries and keys of a block that comes later are unrolled; the model's own `reroll` tells which is which."""
    model = build("hiera_tiny_224", **HIERA)
    attention = model.blocks[block].attn
    m = record(model, torch.randn(1, 3, 64, 96).double()).maps[f"blocks.{block}.attn"]
    (rows, columns), count = m.tokens.grid_size, m.x.shape[1]
    assert rows * columns == count
    order = model.reroll(torch.arange(count).reshape(1, -1, 1), block - 1)[0, ..., 0]
    windows = m.shape[0]
    assert windows == (count // attention.q_stride // attention.window_size if attention.use_mask_unit_attn else 1)
    for row in range(rows):
        for column in range(columns):
            selected = m.tokens.select((row, column))[0].nonzero().tolist()
            token = int(order[row, column])
            assert selected == [[token % windows, token // windows]]
    pooled = model.reroll(torch.arange(count // attention.q_stride).reshape(1, -1, 1), block)[0, ..., 0]
    assert m.query_tokens.grid_size == tuple(pooled.shape)
    for (row, column), token in zip(torch.cartesian_prod(*map(torch.arange, pooled.shape)).tolist(), pooled.flatten().tolist()):
        assert m.query_tokens.select((row, column))[0].nonzero().tolist() == [[token % windows, token // windows]]


# Odds and ends of windows


@pytest.mark.parametrize("name", ["tnt_s_legacy_patch16_224", "tnt_b_patch16_224"])
def test_the_inner_attention_of_tnt_sees_the_pixels_of_a_patch(name: str) -> None:
    model = build(name, img_size=(64, 96), depth=1, embed_dim=48, num_heads_outer=3)
    places = some_places((16, 24))
    x = torch.randn(1, 3, 64, 96).double().repeat(len(places) + 1, 1, 1, 1)
    with moving(model, ":in", patches(4), places):
        m = record(model, x, layers="blocks.0.attn_in").maps[0]
    assert m.tokens.grid_size == (16, 24)
    assert m.tokens.windows == 24
    moved = (m.x.unflatten(0, (len(x), -1))[1:] - m.x.unflatten(0, (len(x), -1))[0]).abs().sum(-1)
    for place, change in zip(places, moved):
        selected = m.tokens.select(place)[0]
        assert change[selected].min() > 0
        around = m.tokens.lay_out(change[None, :, None])[0, 0].nonzero() - torch.tensor(place)
        assert around.abs().max() <= 2  # convolutions of 7 x 7, 4 apart
