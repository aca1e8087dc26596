"""A pickle of maps is of the version that made it: another one reads it rightly, or says which that was and what to do."""

from __future__ import annotations

import copy
import io
import pickle
import pickletools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.models import tiny

import hookattn
from hookattn import AttentionRecorder, HookattnError


def record(name: str = "vit", **options: Any) -> AttentionRecorder:
    model, x = tiny(name)
    with AttentionRecorder(model, **options) as rec:
        model(x).sum().backward()
    return rec


def by_torch(found: Any) -> bytes:
    file = io.BytesIO()
    torch.save(found, file)
    return file.getvalue()


PICKLED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "a map": (lambda rec: rec.maps[0], "AttentionMap"),
    "maps": (lambda rec: rec.maps, "Maps"),
    "a list": (lambda rec: [0, *rec.maps[:]], "AttentionMap"),
    "keys": (lambda rec: rec.maps[0].k, "Vectors"),
}


@pytest.mark.parametrize("dump", [pickle.dumps, by_torch])
@pytest.mark.parametrize("what", PICKLED)
def test_in_another_form_it_says_which_version_and_what_to_do(what: str, dump: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    find, kind = PICKLED[what]
    with monkeypatch.context() as before:
        before.setattr("hookattn.maps.pickled.FORM", 7)
        before.setattr(hookattn, "__version__", "9.8.7")
        written = dump(find(record()))
    # what it is made of may not be there any more, and is not looked for
    monkeypatch.delattr("hookattn.maps.reading.Kept")
    with pytest.raises(HookattnError, match=rf"^this {kind} was pickled by hookattn 9\.8\.7, .* \(7, not 1\): load it with"):
        pickle.loads(written) if dump is pickle.dumps else torch.load(io.BytesIO(written), weights_only=False)


@pytest.mark.parametrize("twin", [copy.copy, copy.deepcopy, lambda found: pickle.loads(pickle.dumps(found))])
def test_in_its_own_form_it_is_what_it_was(twin: Any) -> None:
    rec = record("vit_registers", gradients=True)
    maps = twin(rec.maps)
    assert (list(maps), maps.model, maps.called, maps.skipped) == (list(rec.maps), rec.maps.model, "forward", {})
    for one, other in zip(maps.values(), rec.maps.values()):
        assert one[...].equal(other[...])
        assert one.gradient[...].equal(other.gradient[...])
        torch.testing.assert_close(one.image((0, 1)), other.image((0, 1)))
        assert twin(other.k)[...].equal(other.k[...])


# FORM is counted up where one of these is not there any more, or is made of something else: older pickles are read by them
NAMES = {
    "hookattn.image.tokens Tokens",
    "hookattn.maps.attention_map AttentionMap",
    "hookattn.maps.comparison Comparison",
    "hookattn.maps.gradient _arrived",
    "hookattn.maps.lazy Delivery",
    "hookattn.maps.lazy Spec",
    "hookattn.maps.pickled begin",
    "hookattn.maps.reading Kept",
    "hookattn.recipes.places Places",
    "hookattn.recording.maps Maps",
}


def test_what_is_looked_for_when_a_pickle_is_read_is_known() -> None:
    written = pickle.dumps(record(gradients=True, verify=True).maps, protocol=2)
    names = {str(argument) for operation, argument, _ in pickletools.genops(written) if operation.name == "GLOBAL"}
    assert {name for name in names if name.startswith("hookattn")} == NAMES
