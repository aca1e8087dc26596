"""What linear layers put out in compiled graphs: maps that are made of it, and what is not to be taken for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from packaging.version import Version
from support import heard
from support.heard import Crossed, Model, Twice, break_off, breaking, crossed, declining
from support.inside import note_projections, own_registers, read_by
from support.models import B, C, D, H, N, randomise, tiny
from support.reading import read
from support.reduced import MODELS, alike, late
from timm.layers import Attention
from torch import Tensor, nn

from hookattn import QK, AttentionRecorder, RecorderError, project, recipe
from hookattn.analysis import compute_statistics, entropy

pytestmark = [
    pytest.mark.usefixtures("nothing_compiled_yet", "quickly"),
    pytest.mark.skipif(Version(torch.__version__).release < (2, 11), reason="graphs of this torch do not outlive a hook"),
]
KEPT: dict[str, Any] = {
    "maps": "maps",
    "row": lambda m: m[:, :, 0],
    "statistics": lambda m: compute_statistics(m, entropy),
    "queries": lambda m: (m.q[...], m[...]),
}


@pytest.mark.filterwarnings("ignore")  # of other packages
@pytest.mark.parametrize("keep", KEPT)
@pytest.mark.parametrize("name", ["vit", "rope", "swin", "transformers DINOv2", "transformers CLIP"])
def test_queries_and_keys_are_those_that_the_graph_makes(name: str, keep: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = MODELS[name]()
    compiled, computed = torch.compile(model), note_projections(monkeypatch)
    with torch.no_grad():
        alone = compiled(x)
        with AttentionRecorder(compiled, keep=KEPT[keep]) as rec:
            for _ in range(2):
                assert alike(compiled(x), alone)
    assert not computed
    found = {name: m[...] for name, m in rec.maps.items()} if keep == "maps" else dict(rec.reduced)
    expected = late(model, x, (lambda m: m[...]) if keep == "maps" else KEPT[keep])
    assert alike({name.replace("_orig_mod.", ""): each for name, each in found.items()}, expected)


def test_graphs_for_inputs_alone_are_not_taken_for_those_that_tell_of_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = tiny("vit")
    compiled, computed = torch.compile(model), note_projections(monkeypatch)
    with torch.no_grad():
        with AttentionRecorder(compiled) as late:
            compiled(x)
        with AttentionRecorder(compiled, keep="maps") as rec:
            compiled(x)
    assert not computed
    torch.testing.assert_close(read(rec), read(late), rtol=0, atol=1e-6)


# What is not what a layer puts out


def lora(attn: Any) -> None:
    """A forward put on a layer."""
    more = nn.Linear(C, 3 * C).requires_grad_(False)
    attn.qkv.forward = lambda x: F.linear(x, attn.qkv.weight, attn.qkv.bias) + more(x)


class Larger(nn.Linear):
    """A layer that puts out something else than its function."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


def of_a_class(attn: Any) -> None:
    attn.qkv.__class__ = Larger


class OtherBias(Attention):
    """Calls the function of its layer with another bias."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        q, k, v = F.linear(x, self.qkv.weight, bias=self.other).unflatten(-1, (3, H, D)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class OtherWeight(Attention):
    """Makes queries and keys of weights that it makes itself, and something else of the input by a layer."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        q, k, v = F.linear(x, self.qkv.weight * 1, self.qkv.bias).unflatten(-1, (3, H, D)).permute(2, 0, 3, 1, 4)
        return self.proj(x) * F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


MEDDLED: dict[str, tuple[type[Attention], Callable[[Any], Any]]] = {
    "a forward put on": (Attention, lora),
    "a class of its own": (Attention, of_a_class),
    "another bias": (OtherBias, lambda attn: attn.register_parameter("other", nn.Parameter(torch.randn(3 * C)))),
    "another weight": (OtherWeight, lambda _: None),
    "something else first": (Twice, lambda _: None),
    "the function": (heard.Around, lambda _: None),
}


@pytest.mark.parametrize("keep", ["maps", "row"])
@pytest.mark.parametrize("how", MEDDLED)
def test_maps_are_those_of_an_eager_recorder_whatever_layers_do(how: str, keep: str, monkeypatch: pytest.MonkeyPatch) -> None:
    read_by(monkeypatch)
    torch.manual_seed(0)
    kind, meddle = MEDDLED[how]
    model, x = nn.Sequential(randomise(kind(C, H, qkv_bias=True))).eval(), torch.randn(B, N, C)
    meddle(model[0])
    compiled = torch.compile(model)
    with torch.no_grad():
        with torch.compiler.set_stance("force_eager"), AttentionRecorder(model) as expected:
            model(x)
        with AttentionRecorder(compiled, keep=KEPT[keep]) as rec:
            compiled(x)
    m = expected.maps[0]
    found, wanted = (rec.maps[0][...], m[...]) if keep == "maps" else (*rec.reduced.values(), m[:, :, 0])
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
    if keep == "maps":  # it waits for nothing that does not come
        with pytest.raises(RecorderError, match="was let go"):
            _ = rec.maps[0].x


class OwnQuery(Crossed):
    """Makes its queries of weights that it makes itself."""

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        q, k = F.linear(x, self.qk.weight * 1, self.qk.bias), self.qk(context)
        return F.scaled_dot_product_attention(*[t.unflatten(-1, (H, D)).transpose(1, 2) for t in (q, k, context)])


class Before(Model):
    """A model that calls a layer of attention before it calls attention."""

    def forward(self, x: Tensor, context: Tensor) -> Tensor:  # type: ignore[override]
        return self.attn.qk(x).sum() + self.attn(x, context)  # type: ignore[no-any-return,operator]


@pytest.mark.parametrize("around", [Model, Before])
def test_what_a_layer_puts_out_elsewhere_is_not_waited_for(around: type[Model], monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, context, expected = crossed(monkeypatch, kind=OwnQuery)
    compiled = torch.compile(around(model.attn).eval())  # type: ignore[arg-type]
    with torch.no_grad(), AttentionRecorder(compiled, keep="maps") as rec:
        compiled(x, context)
        torch.testing.assert_close(rec.maps[0][...], expected, rtol=0, atol=1e-6)
        with pytest.raises(RecorderError, match="was let go"):
            _ = rec.maps[0].x


class KeysByHand(nn.Module):
    """Attention whose keys are made of a parameter, first."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.num_heads, self.key = nn.Linear(C, C), H, nn.Parameter(torch.randn(C, C))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        k = F.linear(context, self.key)
        q, k = (t.unflatten(-1, (H, D)).transpose(1, 2) for t in (self.query(x), k))
        return F.scaled_dot_product_attention(q, k, k)


@pytest.mark.parametrize("keep", ["maps", "row"])
def test_what_a_recipe_makes_itself_is_made_of_what_the_module_was_called_with(
    keep: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    own_registers(monkeypatch)

    @recipe(KeysByHand)
    def by_hand(self: Any, x: Tensor, context: Tensor) -> QK:
        (q,) = project(self.query, x, "b n (parts h d) -> parts b h n d", parts=1, of=1, h=self.num_heads)
        return QK(q, F.linear(context, self.key).unflatten(-1, (H, D)).transpose(1, 2))

    torch.manual_seed(0)
    attn: Any
    attn, x, context = randomise(KeysByHand()).eval(), torch.randn(B, N, C), torch.randn(B, N, C)
    q, k = (t.unflatten(-1, (H, D)).transpose(1, 2) for t in (attn.query(x), F.linear(context, attn.key)))
    expected = (q @ k.mT * D**-0.5).softmax(-1).detach()
    compiled, computed = torch.compile(Model(attn)), note_projections(monkeypatch)
    with torch.no_grad(), AttentionRecorder(compiled, keep=KEPT[keep]) as rec:
        compiled(x, context)
    found, wanted = (rec.maps[0][...], expected) if keep == "maps" else (*rec.reduced.values(), expected[:, :, 0])
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
    assert not computed


@pytest.mark.parametrize("in_a_graph", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize("keep", ["maps", "row"])
def test_a_layer_that_is_called_with_two_inputs_has_two_outputs(
    keep: str, in_a_graph: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x, context, expected = crossed(monkeypatch)
    call, computed = torch.compile(model) if in_a_graph else model, note_projections(monkeypatch)
    with torch.no_grad():
        call(x, context)
        for _ in range(2):
            with AttentionRecorder(call, keep=KEPT[keep]) as rec:
                call(x, context)
            found, wanted = (rec.maps[0][...], expected) if keep == "maps" else (*rec.reduced.values(), expected[:, :, 0])
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
    assert not computed


@pytest.mark.parametrize("keep", ["maps", "row"])
def test_a_call_that_a_recipe_declines_is_read_before_it_runs(keep: str, monkeypatch: pytest.MonkeyPatch) -> None:
    own_registers(monkeypatch)
    model, x, mask = Model(randomise(declining())), torch.randn(2, 5, 16), torch.ones(5, 5).tril().bool()
    compiled, rows = torch.compile(model), list[Tensor]()
    with torch.no_grad():
        with torch.compiler.set_stance("force_eager"), AttentionRecorder(model) as expected:
            model(x, attn_mask=mask)
        m = expected.maps[0]
        for options in ({}, {"attn_mask": mask}):
            with AttentionRecorder(compiled, keep="maps" if keep == "maps" else lambda m: rows.append(m[:, :, 0])) as rec:
                compiled(x, **options)
                assert len(rows) == (keep == "row")
                assert torch.overrides._get_current_function_mode_stack() == []  # type: ignore[no-untyped-call]
                wanted = [rec.maps[0][...], m[...]] if keep == "maps" else [rows.pop(), m[:, :, 0]]
    torch.testing.assert_close(*wanted, rtol=0, atol=1e-6)


def test_a_forward_that_was_broken_off_leaves_the_next_one_its_maps(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, context, expected = crossed(monkeypatch, break_off)
    compiled = torch.compile(model)
    with torch.no_grad(), AttentionRecorder(compiled, keep="maps", passes="all") as rec:
        compiled(x, context)
        breaking.append("broken off")
        with pytest.raises(ArithmeticError, match="broken off"):
            compiled(context, x)
        compiled(x, context)
    for maps in (rec.passes[0], rec.passes[-1]):
        torch.testing.assert_close(maps[0][...], expected, rtol=0, atol=1e-6)
