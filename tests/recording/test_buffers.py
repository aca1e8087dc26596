"""Memory of maps, in which those of the next forward are made: never what anybody still holds."""

from __future__ import annotations

import copy
import gc
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.image import SWIN, made_of
from support.inside import QK, Buffers, Maps
from support.models import randomise, tiny
from support.modes import operators_of
from support.reading import maps_of, same
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.attention import SDPBackend, sdpa_kernel

from hookattn import AttentionMap, AttentionRecorder

HOLD: dict[str, Callable[[AttentionRecorder], Any]] = {
    "all maps": lambda rec: rec.maps,
    "a map": lambda rec: rec.maps[0],
    "its tensor": lambda rec: rec.maps[0]._origin._attention,  # type: ignore[union-attr]
    "a part of it": lambda rec: rec.maps[0]._origin._attention[:, 0],  # type: ignore[union-attr]
    "its memory": lambda rec: rec.maps[0]._origin._attention.untyped_storage(),  # type: ignore[union-attr]
    "an array of numpy": lambda rec: rec.maps[0]._origin._attention.detach().numpy(),  # type: ignore[union-attr]
}


def value_of(held: Any) -> Tensor:
    if isinstance(held, Maps):
        held = held[0]
    if isinstance(held, torch.UntypedStorage):
        return torch.frombuffer(bytearray(held), dtype=torch.float32)
    return held[...] if isinstance(held, AttentionMap) else torch.as_tensor(held)


@pytest.mark.parametrize("what", HOLD)
def test_what_somebody_holds_is_not_written_over(what: str) -> None:
    model, x = tiny("vit")
    with AttentionRecorder(model, keep="maps") as rec, torch.no_grad():
        for scale in (1, 3):
            model(x * scale)
        held = HOLD[what](rec)
        before = value_of(held).clone()
        for scale in (5, 7):
            model(x * scale)
            assert torch.equal(value_of(held), before)
        assert same({name: m[...] for name, m in rec.maps.items()}, maps_of(model, x * 7))


MODELS: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "plain": lambda: tiny("vit"),
    "relative positions": lambda: tiny("relpos"),
    "shifted windows": made_of("swin_tiny_patch4_window7_224", (40, 72), **SWIN, img_size=(40, 72)),
}


@pytest.mark.parametrize("kind", MODELS)
def test_the_maps_of_the_next_forward_are_made_in_place_of_the_last(kind: str) -> None:
    model, x = MODELS[kind]()
    with AttentionRecorder(model, keep="maps") as rec, torch.no_grad():
        model(x)
        first = {_memory(m) for m in rec.maps.values()}
        expected = {name: m[...] for name, m in rec.maps.items()}
        seen = operators_of(lambda: model(x))
        assert {_memory(m) for m in rec.maps.values()} == first
        assert same({name: m[...] for name, m in rec.maps.items()}, expected)
    assert seen.count("aten.baddbmm.out") == len(rec.maps)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_a_recorder_for_each_forward_makes_its_maps_in_place_of_those_of_the_last_but_one(mode: Any) -> None:
    model, x = tiny("vit")
    expected, places = maps_of(model, x), []
    with mode():
        for _ in range(5):
            with AttentionRecorder(model, keep="maps") as rec:
                model(x)
            places.append([_memory(m) for m in rec.maps.values()])
            assert same({name: m[...] for name, m in rec.maps.items()}, expected)
    # the last recorder is let go when the next one has been entered
    assert set(places[1] + places[2] + places[3] + places[4]) <= set(places[0] + places[1])


@pytest.mark.parametrize("what", HOLD)
def test_what_somebody_holds_of_an_earlier_recorder_is_not_written_over(what: str) -> None:
    model, x = tiny("vit")
    with torch.no_grad():
        with AttentionRecorder(model, keep="maps") as rec:
            model(x)
        held = HOLD[what](rec)
        before = value_of(held).clone()
        for scale in (5, 7, 9):
            with AttentionRecorder(model, keep="maps") as rec:
                model(x * scale)
                model(x * scale)
            assert torch.equal(value_of(held), before)
        assert same({name: m[...] for name, m in rec.maps.items()}, maps_of(model, x * 9))


def test_memory_that_nobody_holds_between_two_recorders_is_gone() -> None:
    model, x = tiny("vit")
    with torch.no_grad():
        with AttentionRecorder(model, keep="maps") as rec:
            model(x)
            model(x * 2)
        storages = [StorageWeakRef(m._origin._attention.untyped_storage()) for m in rec.maps.values()]  # type: ignore[union-attr]
        assert not any(storage.expired() for storage in storages)
        del rec
        assert all(storage.expired() for storage in storages)
        with AttentionRecorder(model, keep="maps") as rec:
            model(x)
    assert same({name: m[...] for name, m in rec.maps.items()}, maps_of(model, x))


def test_the_memory_of_one_model_is_not_given_to_another() -> None:
    model, x = tiny("vit")
    with torch.no_grad():
        with AttentionRecorder(model, keep="maps") as rec:
            model(x)
        with AttentionRecorder(copy.deepcopy(model), keep="maps"):
            assert not any(alike for each in buffers() for alike in each._all.values())
    assert rec.maps


def _memory(m: AttentionMap) -> int:
    return m._origin._attention.data_ptr()  # type: ignore[union-attr]


def test_each_forward_has_maps_of_its_own_where_all_are_kept() -> None:
    model, x = tiny("vit")
    with AttentionRecorder(model, keep="maps", passes="all") as rec, torch.no_grad():
        for scale in (1, 2, 3):
            model(x * scale)
    for scale, maps in zip((1, 2, 3), rec.passes):
        assert same({name: m[...] for name, m in maps.items()}, maps_of(model, x * scale))


def test_images_of_another_size_let_the_memory_of_the_last_go() -> None:
    model = randomise(tiny("vit", dynamic_img_size=True)[0])
    with AttentionRecorder(model, keep="maps") as rec, torch.no_grad():
        for size in (64, 96, 64, 128):
            model(torch.randn(2, 3, size, size))
            held = sum(b.tensor.nbytes for each in buffers() for alike in each._all.values() for b in alike)
            assert held == sum(m[...].nbytes for m in rec.maps.values())
    assert not buffers()


def test_modes_may_change_between_forwards() -> None:
    model, x = tiny("vit")
    expected = maps_of(model, x)
    with AttentionRecorder(model, keep="maps") as rec:
        for mode in (torch.inference_mode, torch.no_grad, torch.enable_grad, torch.inference_mode):
            with mode():
                model(x)
            for name, m in rec.maps.items():
                torch.testing.assert_close(m[...], expected[name])


def test_of_maps_that_go_elsewhere_nothing_stays() -> None:
    model, x = tiny("vit")
    with AttentionRecorder(model, keep="maps", dtype=torch.float16) as rec, torch.no_grad():
        model(x)
        assert not any(alike for each in buffers() for alike in each._all.values())
    assert all(m[...].dtype == torch.float16 for m in rec.maps.values())


def test_what_is_followed_is_made_in_memory_of_its_own() -> None:
    q, k = torch.randn(1, 2, 5, 8, requires_grad=True), torch.randn(1, 2, 5, 8)
    source = QK(q, k)
    made = source.values(torch.empty(source.shape))
    assert made.requires_grad
    assert torch.equal(made, source.values())


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # a kernel that PyTorch has no batching rule for
@pytest.mark.filterwarnings("ignore:`torch.jit.script`")  # which torch.func.jvp calls
def test_maps_are_kept_under_transforms() -> None:
    model, x = tiny("vit", batch=3)

    def first(x: Tensor) -> Tensor:
        with AttentionRecorder(model, keep="maps") as rec, sdpa_kernel(SDPBackend.MATH):
            model(x[None])
        return rec.maps[0][...]

    expected = maps_of(model, x)["blocks.0.attn"]
    torch.testing.assert_close(torch.func.vmap(first)(x)[:, 0], expected)
    torch.testing.assert_close(torch.func.jvp(first, (x[0],), (x[0],))[0], expected[:1])


def test_scores_that_are_mixed_over_heads_are_as_they_were() -> None:
    source = QK(torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8), mix=torch.randn(4, 2))
    assert torch.equal(source.values(torch.empty(source.shape)), source.values())


def test_memory_is_given_out_once_at_a_time() -> None:
    pool = Buffers(nn.Identity())
    first, second = pool.take((3, 4), torch.float32), pool.take((3, 4), torch.float32)
    taken = {first.data_ptr(), second.data_ptr()}
    assert len(taken) == 2
    part = second[1:].numpy()
    del first, second
    third, fourth = pool.take((3, 4), torch.float32), pool.take((3, 4), torch.float32)
    assert third.data_ptr() in taken
    assert fourth.data_ptr() not in taken
    assert part.shape == (2, 4)


@pytest.mark.parametrize("between", [False, True], ids=["one recorder", "two recorders"])
def test_memory_that_other_processes_may_see_is_not_given_out_again(between: bool) -> None:
    model = nn.Identity()
    pool = Buffers(model)
    given = pool.take((3, 4), torch.float32).fill_(1)
    if between:
        pool.leave()
    given.share_memory_()  # as a queue does that hands it to another process, which is counted nowhere
    if between:
        pool = Buffers(model)
    elsewhere: Any = torch.UntypedStorage
    seen = elsewhere._new_shared_fd_cpu(*given.untyped_storage()._share_fd_cpu_())  # type: ignore[no-untyped-call]
    del given
    pool.take((3, 4), torch.float32).fill_(7)
    assert torch.equal(torch.empty(0).set_(seen, 0, (12,)), torch.ones(12))


def test_a_block_that_ends_while_memory_is_given_out_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    pool, empty, given = Buffers(nn.Identity()), torch.empty, list[Tensor]()

    def collect(*args: Any, **kwargs: Any) -> Tensor:
        pool.leave()  # as where a generator is collected that holds the block open
        return empty(*args, **kwargs)

    monkeypatch.setattr(torch, "empty", collect)
    thread = threading.Thread(target=lambda: given.append(pool.take((3, 4), torch.float32)), daemon=True)
    thread.start()
    thread.join(20)
    assert [t.shape for t in given] == [(3, 4)]


def buffers() -> list[Buffers]:
    return [each for each in gc.get_objects() if type(each) is Buffers]  # some are references to what is gone
