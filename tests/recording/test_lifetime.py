"""What is held, and what goes when it is dropped, without the help of the garbage collector."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.inside import REMEMBERED
from support.models import tiny
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from hookattn import AttentionRecorder, UnreadableError
from hookattn.analysis import rollout

OPTIONS: list[dict[str, Any]] = [
    {},
    {"keep": "maps"},
    {"passes": "all"},
    {"detach": False},
    {"keep": "maps", "detach": False},
    {"called_from": True},
]
FORWARDS = ["__call__", "forward_features"]


@pytest.fixture(autouse=True)
def _no_garbage_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    gc.freeze()  # what was there before is not counted
    yield
    gc.enable()


class Watch:
    """Weak references to all that the attention modules of a model are called with and put out."""

    def __init__(self, model: nn.Module) -> None:
        self.seen: list[weakref.ref[Any]] = []
        for name, module in model.named_modules():
            if name.endswith("attn"):
                module.register_forward_hook(self.note)

    def note(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        self.seen += [weakref.ref(args[0]), weakref.ref(output)]

    @property
    def alive(self) -> int:
        return sum(reference() is not None for reference in self.seen)


def read_everything(rec: AttentionRecorder) -> None:
    """Use a recorder in every way, so that all it caches is cached."""
    for m in rec.maps.values():
        repr(m), m.shape, m[...], m[0, 0, 0], m.tokens, m.image()
    repr(rec)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("call", FORWARDS)
def test_dropping_recorder_and_maps_frees_what_they_held(options: dict[str, Any], call: str) -> None:
    model, x = tiny("vit")
    watch = Watch(model)
    with AttentionRecorder(model, **options) as rec:
        getattr(model, call)(x)
        read_everything(rec)
    read_everything(rec)
    assert watch.seen
    maps = rec.maps
    held = [weakref.ref(rec), weakref.ref(maps[0]), weakref.ref(maps)]
    if "keep" not in options:
        rec.verify()
        held.append(weakref.ref(maps[0].x))
    del rec, maps
    assert [reference() for reference in held] == [None] * len(held)
    assert watch.alive == 0


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_map_that_is_taken_out_holds_its_own_call_and_no_other(options: dict[str, Any]) -> None:
    model, x = tiny("vit", depth=3)
    with AttentionRecorder(model, **options) as rec, torch.no_grad():
        model(x)
    m, other = rec.maps[1], weakref.ref(rec.maps[0])
    expected, recorder = m[...], weakref.ref(rec)
    del rec
    assert recorder() is None
    assert other() is None
    assert torch.equal(m[...], expected)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_dropping_model_and_recorder_frees_the_model(options: dict[str, Any]) -> None:
    model, x = tiny("vit")
    with AttentionRecorder(model, **options) as rec:
        model(x)
        model.forward_features(x)
        read_everything(rec)
    parts = [weakref.ref(part) for part in [*model.modules(), *model.parameters()]]
    del model, rec
    assert sum(part() is not None for part in parts) == 0


@pytest.mark.parametrize("options", [{}, {"keep": "maps"}, {"passes": "all"}, {"called_from": True}], ids=str)
@pytest.mark.parametrize("call", FORWARDS)
def test_nothing_of_the_autograd_graph_is_kept_alive(options: dict[str, Any], call: str) -> None:
    model, x = tiny("vit")
    saved: list[weakref.ref[Any]] = []

    def pack(tensor: Tensor) -> Tensor:
        alias = tensor.detach()
        saved.append(weakref.ref(alias))
        return alias

    with AttentionRecorder(model, **options) as rec:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = getattr(model, call)(x)
        assert any(reference() is not None for reference in saved)
        del output
        assert [reference() for reference in saved if reference() is not None] == []
    assert all(m[...].sum() > 0 for m in rec.maps.values())


@pytest.mark.parametrize("options", OPTIONS[:2] + OPTIONS[3:], ids=str)
@pytest.mark.parametrize("call", FORWARDS)
def test_ten_forwards_hold_no_more_than_one(options: dict[str, Any], call: str) -> None:
    model, x = tiny("vit", depth=1, batch=1)
    watch = Watch(model)
    counts = []
    with AttentionRecorder(model, **options) as rec:
        for i in range(10):
            getattr(model, call)(x)
            if i in (0, 9):
                counts.append((watch.alive, sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())))
    assert counts[1] == counts[0]
    assert len(rec.passes) == 1


CALLS: dict[str, Any] = {
    "bare": lambda attn, x: attn(x, x, x),
    "by name": lambda attn, x: attn(query=x, key=x, value=x),
    "by both": lambda attn, x: attn(x, x, value=x, need_weights=False),
    "with more than tensors": lambda attn, x: attn(x, x, value=x, key_padding_mask=nn.Parameter(torch.zeros(x.shape[:2]))),
}


@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize("call", CALLS)
def test_arguments_are_cut_off_from_the_graph_however_they_come(call: str, detach: bool) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = nn.MultiheadAttention(16, 2, batch_first=True)

        def forward(self, x: Tensor) -> Any:
            return CALLS[call](self.attn, x * 2)

    model = Model()
    with AttentionRecorder(model, detach=detach) as rec:
        model(torch.randn(2, 5, 16, requires_grad=True))
    kept = rec.maps[0].call
    assert {each.requires_grad for each in (kept.x, *kept.tensors)} == {not detach}


@pytest.mark.parametrize("call", FORWARDS)
def test_variables_of_the_caller_are_not_kept_alive(call: str) -> None:
    """Looking at the frames that called must not pin what they had in hand."""
    model, x = tiny("vit")
    mine = torch.zeros(3)
    reference = weakref.ref(mine)
    with AttentionRecorder(model, keep="maps") as rec, torch.no_grad():
        getattr(model, call)(x)
        del mine
        assert reference() is None
    assert len(rec.maps) == 2


@pytest.mark.parametrize("call", FORWARDS)
def test_images_are_not_kept_alive(call: str) -> None:
    model, x = tiny("vit")
    reference = weakref.ref(x)
    with AttentionRecorder(model) as rec, torch.no_grad():
        getattr(model, call)(x)
    del x
    assert reference() is None
    assert len(rec.maps) == 2


def test_a_map_that_could_not_be_computed_keeps_nothing() -> None:
    """Neither the input nor, through the traceback of its error, anything else."""
    model, _ = tiny("vit")
    y = torch.randn(1, 17, 48)
    reference = weakref.ref(y)
    with AttentionRecorder(model, "blocks.0.mlp", keep="maps") as rec, torch.no_grad():
        model.blocks[0].mlp(y)
    del y
    assert reference() is None
    for _ in range(2):
        with pytest.raises(UnreadableError):
            rec.maps[0]
    held = weakref.ref(rec)
    del rec
    assert held() is None


def test_what_called_from_remembers_goes_with_the_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[WeakTensorKeyDictionary] = []

    class Noted(WeakTensorKeyDictionary):
        def __init__(self) -> None:
            super().__init__()
            made.append(self)

    monkeypatch.setattr(REMEMBERED, Noted)
    model, x = tiny("vit")
    with AttentionRecorder(model, keep="maps", called_from=True) as rec, torch.no_grad():
        model(x)
    assert len(rec.maps) == 2
    assert [len(noted) for noted in made] == [0]


def storages() -> int:
    """How many pieces of memory the tensors alive lie in."""
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), Tensor)]
    return len({t.untyped_storage().data_ptr() for t in tensors})


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"keep": "maps"}, {"called_from": True}, {"keep": "maps", "called_from": True}], ids=str
)
def test_twenty_batches_that_are_read_hold_no_more_than_two(options: dict[str, Any], training: bool) -> None:
    model, _ = tiny("vit", depth=2, batch=1)
    nn.utils.parametrizations.spectral_norm(model.blocks[0].attn.qkv)  # type: ignore[index,union-attr]
    model.train(training)
    counts = []
    with AttentionRecorder(model, **options) as rec, torch.no_grad():
        for i in range(20):
            model(torch.randn(1, 3, 64, 64))
            rec.maps[0][:, :, 0], rec.maps[-1].image(), rollout(rec.maps)
            if i in (1, 19):
                counts.append(storages())
    assert counts[1] == counts[0]


def test_maps_that_are_kept_elsewhere_hold_nothing_on_the_device_of_the_model() -> None:
    model, x = tiny("vit")
    watch = Watch(model)
    with torch.no_grad():
        model(x)  # what is made once stays
        before = storages()
        with AttentionRecorder(model, keep="maps", device="meta", passes="all") as rec:
            for _ in range(3):
                model(x)
            assert storages() <= before + 1  # all of meta is one
            assert watch.alive == 0
    assert [m.device.type for maps in rec.passes for m in maps.values()] == ["meta"] * 6
    assert rec.maps[0].shape == rec.maps[0][...].shape == (2, 3, 17, 17)


def test_inputs_that_are_kept_are_the_module_s_own_memory() -> None:
    model, x = tiny("vit")
    seen: list[Tensor] = []
    model.blocks[1].attn.register_forward_pre_hook(lambda _, args: seen.append(args[0]))  # type: ignore[index,union-attr]
    with AttentionRecorder(model) as rec:
        model(x)
    assert rec.maps[1].x.untyped_storage().data_ptr() == seen[0].untyped_storage().data_ptr()
    assert rec.maps[1].x.untyped_storage().nbytes() == seen[0].numel() * 4
