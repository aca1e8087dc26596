"""What goes to prefix tokens and to patches of high norm, against sums over columns of whole maps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.image import SWIN, made_of, swin_places
from support.models import tiny
from support.reading import record, record_one
from torch import Tensor

from hookattn import AttentionRecorder, StaleMapError, TokenError
from hookattn.analysis import find_high_norms, registers, summarize_heads


def features_with(places: list[tuple[int, int, int]], images: int = 2, side: int = 4) -> Tensor:
    """Norms of about 7, and of 70 at (image, row, column)."""
    directions = torch.nn.functional.normalize(torch.randn(images, 48, side, side), dim=1)
    features = directions * (7 + torch.rand(images, 1, side, side))
    for image, row, column in places:
        features[image, :, row, column] *= 10
    return features


def test_shares_are_sums_over_columns_of_the_map() -> None:
    recorded = record(*tiny("vit_registers"))
    rows = registers(recorded, features_with([(0, 1, 2), (0, 3, 3), (1, 0, 0)]))
    assert [row[:3] for row in rows] == [(f"blocks.{depth}.attn", depth, head) for depth in range(2) for head in range(3)]
    for row in rows:
        columns = recorded.maps[row.layer][:, row.head].double().mean(1)
        assert list(row.prefix) == ["cls", "reg0", "reg1", "reg2", "reg3"]
        assert list(row.prefix.values()) == pytest.approx(columns[:, :5].mean(0).tolist(), rel=1e-5)
        high = columns[0, 5 + 1 * 4 + 2] + columns[0, 5 + 3 * 4 + 3] + columns[1, 5]
        assert row.high_norm == pytest.approx(float(high) / 2, rel=1e-5)
        assert high > 0.01
    for row, summary in zip(rows, summarize_heads(recorded)):
        assert sum(row.prefix.values()) == pytest.approx(summary.prefix, rel=1e-5)


@pytest.mark.parametrize(("query", "number"), [("cls", 0), ("reg2", 3), ((2, 1), 5 + 2 * 4 + 1), (7, 7)])
def test_shares_may_be_those_of_one_query(query: Any, number: int) -> None:
    recorded = record(*tiny("vit_registers"))
    for row in registers(recorded, features_with([(1, 2, 0)]), query=query):
        given = recorded.maps[row.layer][:, row.head, number].double()
        assert list(row.prefix.values()) == pytest.approx(given[:, :5].mean(0).tolist(), rel=1e-5)
        assert row.high_norm == pytest.approx(float(given[1, 5 + 2 * 4]) / 2, rel=1e-5)


def test_windows_are_put_back_before_patches_are_looked_up() -> None:
    model, x = made_of("swin_tiny_patch4_window7_224", (64, 64), **SWIN, img_size=64)()
    recorded = record(model, x)
    high = torch.zeros(len(x), 16, 16, dtype=torch.bool)
    high[0, 3, 14] = high[0, 0, 0] = high[-1, 9, 5] = True
    rows = registers(recorded.maps[:2], torch.where(high[:, None], 70.0, 7.0).expand(-1, 48, -1, -1))
    for row in rows:
        places = swin_places(model.layers[0].blocks[row.depth], 16, 16)
        attention = recorded.maps[row.layer][:, row.head].double().unflatten(0, (len(x), -1))
        columns = attention.mean(2) / len(places)  # (images, windows, keys)
        expected = torch.stack([columns[i][high[i].flatten()[places]].sum() for i in range(len(x))]).mean()
        assert row.high_norm == pytest.approx(float(expected), rel=1e-5)
        assert not row.prefix
    for row in registers(recorded.maps[1], torch.where(high[:, None], 70.0, 7.0), query=(3, 12)):
        picture = recorded.maps[1].image((3, 12), heads=row.head).double()
        assert row.high_norm == pytest.approx(float((picture * high).sum() / len(x)), rel=1e-5)


def test_without_features_no_patch_is_of_high_norm() -> None:
    m = record_one(*tiny("vit_registers"))
    assert all(row.high_norm != row.high_norm and row.prefix for row in registers(m))
    m = record_one(*made_of("vit_base_patch16_siglip_224", (48, 64), depth=1, embed_dim=48, num_heads=3, img_size=(48, 64))())
    assert not any(row.prefix for row in registers(m, query=(0, 1)))


def test_norms_that_are_out_of_line_are_found() -> None:
    places = [(0, 1, 2), (1, 3, 3), (1, 0, 0)]
    features = features_with(places)
    assert [tuple(place) for place in find_high_norms(features).nonzero().tolist()] == sorted(places)
    assert not find_high_norms(features_with([])).any()
    assert not find_high_norms(torch.randn(8, 384, 16, 16) * 5).any()
    assert not find_high_norms(torch.ones(2, 48, 4, 4)).any()
    norms = features.double().square().sum(1).sqrt()
    for threshold in (7.5, 71.0, 1000.0):
        assert torch.equal(find_high_norms(features, threshold), norms > threshold)
    rows = registers(record_one(*tiny("vit_registers")), features, threshold=0.0)
    for row in rows:
        assert sum(row.prefix.values()) + row.high_norm == pytest.approx(1.0)


def test_features_are_those_that_timm_gives() -> None:
    model, x = tiny("vit_registers", depth=3)
    with AttentionRecorder(model) as rec, torch.no_grad():
        model(x)
        features = model.forward_intermediates(x, indices=1, norm=False, intermediates_only=True)[-1]
    before_norm = {}
    model.norm.register_forward_pre_hook(lambda _, args: before_norm.update(x=args[0]))
    with torch.no_grad():
        model(x)
    norms = before_norm["x"][:, 5:].norm(dim=-1).view(2, 4, 4)
    highest = float(norms.flatten().sort().values[-2])
    assert torch.equal(find_high_norms(features, highest), norms > highest)
    assert len(registers(rec, features)) == 9


def test_what_does_not_fit_says_why() -> None:
    m = record_one(*tiny("vit_registers"))
    with pytest.raises(TokenError, match=r"'blocks\.0\.attn' lie on 2 grids of \(4, 4\), and features on 2 of \(5, 5\)"):
        registers(m, features_with([], side=5))
    with pytest.raises(TokenError, match=r"features on 3 of"):
        registers(m, features_with([], images=3))
    with pytest.raises(ValueError, match=r"\(images, channels, rows, columns\), not \(2, 16, 48\).*forward_intermediates"):
        registers(m, torch.randn(2, 16, 48))
    with pytest.raises(TokenError, match="leave query= out"):
        registers(m, query="mean")
    with pytest.raises(TokenError, match="there is no 'reg9' token"):
        registers(m, query="reg9")
    encoder = torch.nn.MultiheadAttention(8, 2, batch_first=True)
    with AttentionRecorder(encoder) as rec, torch.no_grad():
        encoder(x := torch.randn(1, 5, 8), x, x, need_weights=False)
    with pytest.raises(TokenError):
        registers(rec)


def test_maps_that_are_stale_say_so() -> None:
    model, x = tiny("vit_registers")
    recorded = record(model, x)
    with torch.no_grad():
        model.blocks[1].attn.qkv.weight.add_(1)
    with pytest.raises(StaleMapError, match=r"blocks\.1\.attn"):
        registers(recorded)
