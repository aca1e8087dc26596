"""What cannot be read is refused by name and with the reason, and nothing stays on the model."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from support.models import tiny
from support.reading import maps_of, same
from support.untouched import untouched
from timm.layers import Attention
from torch import Tensor, nn

from hookattn import (
    AttentionRecorder,
    HookattnError,
    LayerNotFoundError,
    ModelError,
    NoMapError,
    RecorderError,
    TokenError,
    UnreadableError,
)

# Models


@pytest.mark.parametrize(
    "model", [timm.create_model("resnet18", num_classes=0), nn.Linear(2, 2)], ids=lambda m: type(m).__name__
)
def test_a_model_without_attention_has_no_maps_and_is_told_why(model: nn.Module) -> None:
    x = torch.randn(2, 3, 32, 32) if isinstance(model, timm.models.ResNet) else torch.randn(2, 2)
    message = rf"{type(model).__name__} ran and was watched: none of its modules.*layers=\[\.\.\.\].*@hookattn\.recipe"
    with untouched(model):
        with AttentionRecorder(model) as rec:
            model(x)
            model(x)
        with pytest.raises(NoMapError, match=message):
            rec.maps  # noqa: B018


def test_a_model_whose_attention_forms_no_map_is_refused_with_the_reason() -> None:
    model = timm.create_model("coat_tiny", num_classes=0)
    message = r"CoaT has no attention map.*'serial_blocks1\.0\.factoratt_crpe': FactorAttnConvRelPosEnc: .*no pair of a query"
    with untouched(model), pytest.raises(ModelError, match=message):
        AttentionRecorder(model)


def test_attention_that_forms_no_map_is_skipped_by_name_and_with_the_reason() -> None:
    model = timm.create_model("lamhalobotnet50ts_256").eval()
    pairless = "LambdaLayer: its softmax runs over positions alone; no pair of a query and a key has a weight"
    with untouched(model):
        with AttentionRecorder(model) as rec, torch.no_grad():
            model(torch.randn(1, 3, 256, 256))
        assert rec.skipped == {"stages.1.1.self_attn": pairless, "stages.1.3.self_attn": pairless}
        assert list(rec.maps) == [
            "stages.2.1.self_attn",
            "stages.2.3.self_attn",
            "stages.2.5.self_attn",
            "stages.3.1.self_attn",
        ]
        with pytest.raises(UnreadableError, match=r"'stages\.1\.1\.self_attn' has no map.*LambdaLayer: .*positions"):
            AttentionRecorder(model, layers=["stages.1.1.self_attn"])


# Arguments


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": "all"}, r"keep='all' is not known: keep=\"inputs\" or keep=\"maps\""),
        ({"keep": None}, r"keep=None is not known"),
        ({"passes": "first"}, r"passes='first' is not known: passes=\"last\" or passes=\"all\""),
        ({"passes": True}, r"passes=True is not known"),
    ],
    ids=str,
)
def test_unknown_words_are_refused_with_those_that_are_known(options: dict[str, Any], message: str) -> None:
    model, _ = tiny("vit")
    with untouched(model), pytest.raises(ValueError, match=message):
        AttentionRecorder(model, **options)


def test_options_are_given_by_name() -> None:
    with pytest.raises(TypeError):
        AttentionRecorder(tiny("vit")[0], None, "maps")


# The order of things


def test_entering_twice_is_refused_and_the_first_block_goes_on() -> None:
    model, x = tiny("vit")
    expected = maps_of(model, x)
    rec = AttentionRecorder(model)
    with untouched(model), rec, torch.no_grad():
        with pytest.raises(RecorderError, match=r"open already.*make another one, or leave the block"):
            rec.__enter__()
        model(x)
    assert same({name: m[...] for name, m in rec.maps.items()}, expected)


@pytest.mark.parametrize(
    "asked", [lambda rec: rec.maps, lambda rec: rec.passes, lambda rec: rec.verify()], ids=["maps", "passes", "verify"]
)
def test_maps_before_any_forward_are_refused_and_the_way_in_told(asked: Callable[[AttentionRecorder], object]) -> None:
    model, x = tiny("vit")
    rec = AttentionRecorder(model)
    message = r"no forward of the VisionTransformer has run inside the block.*with AttentionRecorder\(model\) as rec:"
    with pytest.raises(NoMapError, match=message):
        asked(rec)
    with rec, pytest.raises(NoMapError, match=message):
        asked(rec)
    model(x)
    with pytest.raises(NoMapError, match=message):
        asked(rec)


class Bypass(nn.Module):
    """A model that goes around its attention."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = Attention(48, num_heads=3)

    def forward(self, x: Tensor) -> Tensor:
        return x


@pytest.mark.parametrize("passes", ["last", "all"])
def test_a_forward_that_reaches_no_attention_is_told_apart_from_none(passes: Any) -> None:
    model = Bypass()
    with untouched(model), AttentionRecorder(model, passes=passes) as rec:
        model(torch.randn(1, 4, 48))
    with pytest.raises(NoMapError, match=r"a forward ran, but it called none of attn\..*compiled.*layers=\[\.\.\.\]"):
        rec.maps  # noqa: B018


def test_a_forward_of_a_copy_is_no_forward_of_the_model() -> None:
    model, x = tiny("vit")
    twin, _ = tiny("vit")
    with AttentionRecorder(model) as rec, torch.no_grad():
        twin(x)
    with pytest.raises(NoMapError, match="the very object the recorder was made with"):
        rec.maps  # noqa: B018


def test_an_unknown_map_and_an_unknown_query_are_refused() -> None:
    model, x = tiny("vit")
    with AttentionRecorder(model) as rec, torch.no_grad():
        model(x)
    with pytest.raises(LayerNotFoundError, match=r"no map was recorded of 'blocks\.1'\. Did you mean .*'blocks\.1\.attn'"):
        rec.maps["blocks.1"]
    with pytest.raises(TokenError, match=r"there is no 'clss' token\. There is: query='cls'"):
        rec.maps[0].image("clss")


# Modules that form no map


@pytest.mark.parametrize("keep", ["inputs", "maps"])
def test_a_module_that_forms_no_softmax_is_refused_when_it_is_read(keep: Any) -> None:
    model, x = tiny("vit")
    with torch.no_grad():
        expected = model(x)
    with untouched(model), torch.no_grad(), AttentionRecorder(model, ["blocks.0.mlp", -1], keep=keep) as rec:
        assert torch.equal(model(x), expected)
    assert list(rec.maps) == ["blocks.1.attn"]
    assert set(rec.skipped) == {"blocks.0.mlp"}
    if keep == "inputs":
        assert rec.verify() < 1e-5  # what cannot be read stops nothing else
    readings: list[Callable[[], object]] = [lambda: rec.maps["blocks.0.mlp"], lambda: rec.maps[1]]
    for reading in readings:
        with (
            untouched(model),
            pytest.raises(
                UnreadableError, match=r"'blocks\.0\.mlp': .*Mlp: .*multiplies no two activations.*@hookattn\.recipe"
            ),
        ):
            reading()
    assert rec.maps["blocks.1.attn"].shape == (2, 3, 17, 17)


class OddSoftmax(nn.Module):
    """Softmaxes that are no map over (batch, head, query, key), and two that are in odd ways."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.num_heads = how, 2

    def forward(self, x: Tensor) -> Tensor:
        scores = x @ x.mT
        if self.how == "over queries":
            return scores.softmax(-2) @ x
        if self.how == "two shapes":
            return scores[..., :2].unsqueeze(1).softmax(-1).sum() + scores.unsqueeze(1).softmax(-1).sum()
        if self.how == "for logging":
            return x * scores.softmax(-1).amax()
        return scores.softmax(-1) @ x


@pytest.mark.parametrize("keep", ["inputs", "maps"])
@pytest.mark.parametrize("how", ["two shapes", "for logging"])
def test_softmaxes_that_are_no_map_are_refused(how: str, keep: Any) -> None:
    model, x = OddSoftmax(how), torch.randn(1, 4, 8)
    expected = model(x)
    with untouched(model), AttentionRecorder(nn.ModuleDict({"odd": model}), "odd", keep=keep) as rec:
        assert torch.equal(model(x), expected)
    with pytest.raises(UnreadableError, match=r"'odd': OddSoftmax: .*@hookattn\.recipe"):
        rec.maps[0][...]


@pytest.mark.parametrize("keep", ["inputs", "maps"])
@pytest.mark.parametrize("how", ["over queries", "no heads"])
def test_what_multiplies_the_values_is_the_map_however_it_is_normalised(how: str, keep: Any) -> None:
    model, x = OddSoftmax(how), torch.randn(1, 4, 8)
    with untouched(model), AttentionRecorder(nn.ModuleDict({"odd": model}), "odd", keep=keep) as rec:
        model(x)
    true = (x @ x.mT).softmax(-2 if how == "over queries" else -1)[:, None]
    torch.testing.assert_close(rec.maps[0][...], true, rtol=0, atol=1e-6)


@pytest.mark.parametrize("keep", ["inputs", "maps"])
def test_a_module_that_is_replaced_inside_the_block_is_named(keep: Any) -> None:
    model, x = tiny("vit", depth=3)
    with AttentionRecorder(model, keep=keep) as rec, torch.no_grad():
        model.blocks[1].attn = copy.deepcopy(model.blocks[1].attn)
        model(x)
    assert list(rec.maps) == ["blocks.0.attn", "blocks.2.attn", "blocks.1.attn"]
    assert rec.maps["blocks.2.attn"][...].isfinite().all()
    with pytest.raises(UnreadableError, match=r"'blocks\.1\.attn' was replaced by another module inside the block"):
        rec.maps["blocks.1.attn"][...]


def test_every_refusal_can_be_caught_as_one() -> None:
    errors = [ModelError, RecorderError, LayerNotFoundError, NoMapError, UnreadableError, TokenError]
    assert all(issubclass(error, HookattnError) for error in errors)
    assert issubclass(ModelError, TypeError)
    assert issubclass(TokenError, ValueError)
    assert issubclass(LayerNotFoundError, LookupError)
    assert issubclass(NoMapError, LookupError)


class Folded(nn.Module):
    """Heads folded into the batch, and no attribute that tells how many there are."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)

    def parts(self, x: Tensor) -> Tensor:
        return self.qkv(x).reshape(*x.shape[:2], 3, 4, 4).permute(2, 0, 3, 1, 4)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.parts(x).flatten(1, 2)
        return ((q @ k.mT).softmax(-1) @ v).unflatten(0, (-1, 4)).transpose(1, 2).flatten(2)


def test_heads_that_are_folded_into_the_batch_are_told_apart_by_what_they_feed() -> None:
    model, x = Folded(), torch.randn(2, 5, 16)
    with AttentionRecorder(nn.Sequential(model), layers="0") as rec, torch.no_grad():
        model(x)
    q, k, _ = model.parts(x)
    torch.testing.assert_close(rec.maps[0][...], (q @ k.mT).softmax(-1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, "float16", float], ids=str)
def test_a_dtype_that_holds_no_probabilities_is_refused(dtype: Any) -> None:
    with pytest.raises(ValueError, match=r"holds no probabilities: dtype=torch\.float32"):
        AttentionRecorder(tiny("vit")[0], dtype=dtype)


class Holding(nn.Module):
    """A module that keeps a recorder, as somebody may write a training module."""

    def __init__(self) -> None:
        super().__init__()
        self.model, x = tiny("vit")
        with AttentionRecorder(self.model) as self.rec, torch.no_grad():
            self.model(x)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_recorder_is_not_copied_and_says_what_is(copied: Callable[[Any], Any]) -> None:
    holding = Holding()
    with pytest.raises(RecorderError, match=r"not copied or pickled: rec\.maps are"):
        copied(holding.rec)
    if copied is not copy.copy:
        with pytest.raises(RecorderError, match=r"open it where the module is called"):
            copied(holding)
    assert copy.deepcopy(holding.rec.maps)[0].shape == (2, 3, 17, 17)
