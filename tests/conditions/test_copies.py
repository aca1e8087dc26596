"""Copies of the model that are made inside the block work, are not recorded and carry nothing of ours."""

from __future__ import annotations

import copy
import copyreg
import io
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.models import tiny
from support.reading import maps_of, read, same
from support.untouched import hooks_of_ours
from torch import Tensor, nn

from hookattn import AttentionRecorder, RecorderError


def saved_and_loaded(model: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[nn.Module], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": saved_and_loaded,
}


def numbers_of_hooks(model: nn.Module) -> list[Any]:
    """The numbers of hooks, in all the dicts that a module has of them, and with which types of hooks."""
    held = [vars(m)[name] for m in model.modules() for name in vars(nn.Module()) if "hook" in name]
    return [{number: type(hook) for number, hook in each.items()} if isinstance(each, dict) else each for each in held]


def nothing(*given: Any) -> None:
    pass


class Copied(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        copy.deepcopy(self)
        return x


@pytest.mark.parametrize("call", ["__call__", "forward_features"])
@pytest.mark.parametrize("made", COPIES)
@pytest.mark.parametrize("options", [{}, {"called_from": True}], ids=str)
def test_a_copy_made_inside_the_block_works_is_not_recorded_and_carries_nothing_of_ours(
    call: str, made: str, options: dict[str, Any]
) -> None:
    model, x = tiny("vit")
    expected = maps_of(model, x)
    with AttentionRecorder(model, passes="all", **options) as rec, torch.no_grad():
        output = getattr(model, call)(x)
        twin = COPIES[made](model)
        assert torch.equal(getattr(twin, call)(x), output)
        getattr(twin, call)(-x)
    assert len(rec.passes) == 1
    assert same(read(rec), expected)
    assert torch.equal(getattr(twin, call)(x), output)
    assert numbers_of_hooks(twin) == numbers_of_hooks(model)
    with AttentionRecorder(twin) as rec, torch.no_grad():
        twin(x)
    assert same(read(rec), expected)


def test_a_file_written_inside_the_block_does_not_need_hookattn() -> None:
    file = io.BytesIO()
    model, x = tiny("vit")
    with AttentionRecorder(model, called_from=True), torch.no_grad():
        model(x)
        torch.save(model, file)
    assert b"hookattn" not in file.getvalue()


def test_a_model_that_is_watched_can_be_copied_in_the_middle_of_it() -> None:
    model = nn.Sequential(nn.Linear(3, 3), Copied())
    with AttentionRecorder(model):
        model(torch.randn(2, 3))


@pytest.mark.parametrize("made", COPIES)
def test_hooks_of_others_are_copied_with_the_model_and_their_handles_take_them_off_the_copy(made: str) -> None:
    model, x = tiny("vit")
    kept: Any = model
    kept.handles = [model.blocks[0].register_forward_hook(nothing, with_kwargs=True)]  # type: ignore[index, union-attr]
    kept.handles += [m.register_forward_pre_hook(nothing) for m in (model, model.blocks[0].attn)]  # type: ignore[index, union-attr]
    expected = numbers_of_hooks(model)
    with AttentionRecorder(model, called_from=True), AttentionRecorder(model, keep="maps"), torch.no_grad():
        model(x)
        twin = COPIES[made](model)
        assert not hooks_of_ours(twin)
    assert numbers_of_hooks(twin) == expected == numbers_of_hooks(model)
    for handle in twin.handles:
        handle.remove()
    assert not any(each for each in numbers_of_hooks(twin) if each is not None)


def test_a_shallow_copy_shares_its_hooks_with_the_model_as_it_does_outside() -> None:
    model, _ = tiny("vit")
    with AttentionRecorder(model):
        assert copy.copy(model)._forward_pre_hooks is model._forward_pre_hooks


def test_how_classes_are_copied_is_the_same_after_the_block_and_what_others_say_of_one_stays() -> None:
    model, x = tiny("vit")
    before = dict(copyreg.dispatch_table)
    one, two = AttentionRecorder(model), AttentionRecorder(model, called_from=True)
    with one:
        two.__enter__()
    assert not hooks_of_ours(copy.deepcopy(model))  # of `two`
    two.__exit__(None, None, None)
    assert copyreg.dispatch_table == before
    copyreg.pickle(type(model), theirs := lambda module: module.__reduce_ex__(4))  # type: ignore[arg-type]
    try:
        with AttentionRecorder(model):
            assert copyreg.dispatch_table[type(model)] is theirs
            assert torch.equal(copy.deepcopy(model)(x), model(x))
        assert copyreg.dispatch_table.pop(type(model)) is theirs
    finally:
        copyreg.dispatch_table.pop(type(model), None)
    assert copyreg.dispatch_table == before


@pytest.mark.parametrize("made", COPIES)
def test_a_copy_of_a_transformer_takes_the_fast_path(made: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model, x = nn.TransformerEncoder(layer, 2).eval(), torch.randn(2, 5, 16)
    calls: list[str] = []
    fast = torch._transformer_encoder_layer_fwd
    monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", lambda *given: calls.append("fast") or fast(*given))
    with AttentionRecorder(model), torch.no_grad():
        model(x)
        assert not calls
        COPIES[made](model)(x)
        assert len(calls) == 2


@pytest.mark.parametrize("made", COPIES)
def test_a_copy_made_inside_the_block_can_be_scripted_and_the_model_says_so(made: str) -> None:
    model, x = tiny("vit", depth=1)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # scripting is deprecated from torch 2.9 on
        expected = torch.jit.script(model)(x)
        with AttentionRecorder(model) as rec:
            with pytest.raises(RecorderError, match=r"torch\.jit\.script\(copy\.deepcopy\(model\)\)"):
                torch.jit.script(model)
            model(x)
            twin = COPIES[made](model)
            torch.testing.assert_close(torch.jit.script(twin)(x), expected)
        assert same(read(rec), maps_of(model, x))
        torch.testing.assert_close(torch.jit.script(twin)(x), expected)
        torch.testing.assert_close(torch.jit.script(model)(x), expected)


@pytest.mark.parametrize("options", [{}, {"keep": "maps"}, {"gradients": True}], ids=str)
def test_a_file_that_is_written_inside_is_the_one_that_is_written_outside(options: dict[str, Any]) -> None:
    """So whatever loads the one loads the other, `weights_only` with the classes of the model too."""
    model, x = tiny("vit", depth=1)
    expected = pickle.dumps(model)
    with AttentionRecorder(model, **options):
        model(x)
        got = pickle.dumps(model)
    assert pickle.dumps(model) == expected
    assert got == expected
