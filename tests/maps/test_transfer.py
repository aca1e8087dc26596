"""What goes from a GPU to the CPU in pieces is what it was, and what must stay in a graph does not go that way."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.inside import copy_into, copy_to_cpu, start_copies, transfer
from support.models import tiny
from torch import Tensor

from hookattn import AttentionRecorder

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=needs_cuda)]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "_PIECE", 1000)
    monkeypatch.setattr(transfer, "_LARGE", 64)


@pytest.mark.parametrize("wanted", [None, torch.float16, torch.float64])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(), (0, 3), (7,), (5, 3, 11, 13), (1, 2001), (1000, 1)])
def test_it_is_what_torch_makes_of_it(device: str, dtype: torch.dtype, wanted: torch.dtype | None, shape: Any) -> None:
    x = torch.randn(shape, device=device).to(dtype)
    for given in (x, x.mT if x.dim() > 1 else x, x[..., ::2] if x.dim() else x):
        found, expected = copy_to_cpu(given, wanted), given.to("cpu", wanted)
        assert (found.dtype, found.device.type) == (expected.dtype, "cpu")
        assert torch.equal(found, expected)


@pytest.mark.parametrize("device", DEVICES)
def test_many_go_where_they_are_told_whatever_their_sizes(device: str) -> None:
    given = [torch.randn(n, 5, device=device) for n in (1, 300, 0, 7, 40, 2, 120)]
    room = torch.full((500, 7), torch.nan)
    places, at = list[Tensor](), 0
    for each in given:
        places.append(room[at : at + len(each), 1:6])
        at += len(each)
    copy_into(zip(places, given))
    assert all(torch.equal(place, each.cpu()) for place, each in zip(places, given))
    assert room.isnan().sum() == room.numel() - sum(each.numel() for each in given)


@pytest.mark.parametrize("device", DEVICES)
def test_copies_that_were_begun_hold_what_was_there_then(device: str) -> None:
    x, room = torch.arange(500.0, device=device), torch.zeros(500)
    copies = start_copies([(room, x * 2)])
    x.zero_()
    copies.finish()
    assert copies.are_made
    assert torch.equal(room, torch.arange(500.0) * 2)


@pytest.mark.parametrize("device", DEVICES)
def test_what_is_in_a_graph_stays_there(device: str) -> None:
    x = torch.randn(50, 50, device=device, requires_grad=True)
    copy_to_cpu(x * 3).sum().backward()
    assert x.grad is not None
    assert (x.grad == 3).all()


@needs_cuda
@pytest.mark.parametrize("options", [{}, {"keep": "maps"}, {"dtype": torch.float16}, {"keep": "maps", "dtype": torch.float64}])
def test_maps_that_are_brought_to_the_cpu_are_those_of_the_device(options: dict[str, Any]) -> None:
    model, x = tiny("vit")
    model, x = model.cuda(), x.cuda()
    with (
        torch.no_grad(),
        AttentionRecorder(model, device="cpu", **options) as there,
        AttentionRecorder(model, **options) as here,
    ):
        model(x)
    for one, other in zip(there.maps.values(), here.maps.values()):
        assert one.device.type == one[...].device.type == "cpu"
        assert torch.equal(one[...], other[...].cpu())
        assert not one[...].is_pinned()
