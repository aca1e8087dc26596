"""`keep=function` of modules with a recipe: it reads the queries and keys that they make themselves, which are made once."""

from __future__ import annotations

from collections.abc import Callable
from threading import Thread, current_thread, main_thread
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.heard import Around, Twice, declining
from support.inside import own_registers, project_heads
from support.models import B, C, D, H, N, plain, randomise, tiny
from support.modes import operations_of, operators_of
from support.reading import record
from support.reduced import MODELS, alike, figures, late, reduced
from timm.layers import Attention
from torch import Tensor, nn
from torch.func import functional_call

from hookattn import QK, AttentionMap, AttentionRecorder, project, recipe
from hookattn.analysis import compute_statistics, entropy, mean_attention_distance, received

Function = Callable[[AttentionMap], Any]
FUNCTIONS: dict[str, Function] = {
    "row": lambda m: m[:, :, 0],
    "whole": lambda m: m[...],
    "statistics": lambda m: compute_statistics(m, entropy, received),
    "queries and keys": lambda m: (m.q[...], m.k[:, 0], m.k[0, :, 3:]),
    "again and again": lambda m: (m[...], m[:, 1], m[:, :, 0], m.q[:, :, 0], entropy(m)),
}
HEARD = ["vit", "rope", "swin", "twice", "transformers DINOv2", "transformers CLIP"]


def attention(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> QK:
    """The recipe of timm's attention."""
    return QK(*project(self.qkv, x, "b n (parts h d) -> parts b h n d", parts=2, of=3, h=self.num_heads))


def products(run: Callable[[], Any]) -> list[str]:
    """The products of a matrix of tokens and a weight that are made while something runs."""
    return [name for name in operators_of(run) if name.startswith(("aten.addmm", "aten.mm", "aten.linear"))]


@pytest.mark.filterwarnings("ignore")  # of other packages
@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("name", HEARD)
def test_no_projection_is_made_but_those_of_the_module(name: str, function: str) -> None:
    model, x = MODELS[name]()
    with torch.no_grad():
        alone = products(lambda: model(x))
        with AttentionRecorder(model, keep=FUNCTIONS[function]) as rec:
            model(x)  # the shape of a map is found once, by arithmetic of shapes
            assert products(lambda: model(x)) == alone
    assert len(rec.reduced) > 1
    assert alike(dict(rec.reduced), late(model, x, FUNCTIONS[function]))


def test_the_figures_of_the_command_line_are_made_of_the_module_s_own_projections() -> None:
    model, x = tiny("vit_registers")

    def function(m: AttentionMap) -> Any:
        return m.rows("cls"), *compute_statistics(m, entropy, mean_attention_distance, received)

    with torch.no_grad():
        alone = operations_of(lambda: model(x))
        tokens = late(model, x, lambda m: m.shape)["blocks.0.attn"][2]
        with AttentionRecorder(model, keep=lambda m: m.rows("cls")):
            rows = operations_of(lambda: model(x)) - alone
        with AttentionRecorder(model, keep=lambda m: m[...]):
            whole = operations_of(lambda: model(x)) - alone
    assert rows * tokens == whole  # rows of heard queries with heard keys, and no more
    assert alike(reduced(model, x, function), late(model, x, function))


@pytest.mark.parametrize("name", ["relpos", "vit_registers"])
def test_what_a_function_makes_is_what_it_makes_of_recorded_maps(name: str) -> None:
    model, x = tiny(name)
    assert alike(reduced(model, x), late(model, x))


def test_normed_queries_and_keys_are_made_of_what_was_projected() -> None:
    model, x = plain(qk_norm=True, norm_layer=nn.LayerNorm), torch.randn(B, N, C).double()
    with torch.no_grad():
        alone = operators_of(lambda: model(x))
        with AttentionRecorder(model, keep=lambda m: (m[:, :, 0], m[...], m.shape, entropy(m))) as rec:
            model(x)
            seen = operators_of(lambda: model(x))
    for operator, more in (("aten.addmm.default", 0), ("aten.native_layer_norm.default", 2)):  # once, for all that is read
        assert seen.count(operator) == alone.count(operator) + more
    torch.testing.assert_close(rec.reduced["0"][1], late(model, x, lambda m: m[...])["0"], rtol=0, atol=1e-12)


# When it is called


class Apart(Attention):
    """Makes keys, values and queries by a layer each, after something else."""

    order, counts = "kvq", False

    def __init__(self) -> None:
        super().__init__(C, H)
        self.before, self.count = nn.Identity(), 0
        self.q, self.k, self.v = (nn.Linear(C, C) for _ in range(3))

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.count += self.counts
        self.before(x)
        made = {name: getattr(self, name)(x).unflatten(-1, (H, D)).transpose(1, 2) for name in self.order}
        return self.proj(F.scaled_dot_product_attention(*(made[n] for n in "qkv")).transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


def by_layers(self: Any, x: Tensor) -> QK:
    return QK(project_heads(self.q, x, H), project_heads(self.k, x, H), scale=self.scale)


def described(patch: pytest.MonkeyPatch, cls: type[Attention], by: Any = attention) -> type[Attention]:
    """A class that has a recipe while a test runs."""
    own_registers(patch)
    recipe(cls)(by)
    return cls


def apart(monkeypatch: pytest.MonkeyPatch, order: str = "kvq") -> tuple[nn.Module, Any, Tensor]:
    module: Any = randomise(described(monkeypatch, Apart, by_layers)()).eval().double()
    module.order = order
    return nn.Sequential(module), module, torch.randn(B, N, C).double()


@pytest.mark.parametrize("order", ["kvq", "qkv", "vqk", "vkq"])
def test_it_is_called_once_when_the_last_of_the_layers_has_run(monkeypatch: pytest.MonkeyPatch, order: str) -> None:
    model, module, x = apart(monkeypatch, order)
    events: list[str] = []
    for name in ("before", "proj"):
        module.get_submodule(name).register_forward_hook(lambda *_, name=name: events.append(name))
    with AttentionRecorder(model, keep=lambda m: (events.append("called"), m[...], m.k[...])) as rec, torch.no_grad():
        alone = operations_of(lambda: model(x)) and len(rec.reduced)
        for _ in range(3):
            events.clear()
            model(x)
        assert events == ["before", "called", "proj"]
        assert alone == 1
    q, k = (getattr(module, n)(x).unflatten(-1, (H, D)).transpose(1, 2) for n in "qk")
    _, whole, keys = rec.reduced["0"]
    torch.testing.assert_close(whole, (q @ k.mT * D**-0.5).softmax(-1), rtol=0, atol=1e-12)
    torch.testing.assert_close(keys, k, rtol=0, atol=1e-12)


def test_all_that_a_map_has_is_there_in_a_module_that_counts_its_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    model, module, x = apart(monkeypatch)
    module.counts = True

    def function(m: AttentionMap) -> Any:
        return m.x, m.k[...], m.q[:, :, 0], m.v[...], m.output(), float(m.verify())

    with AttentionRecorder(model, keep=function) as rec, torch.no_grad():
        model(x)
        count = module.count
        model(x)
        assert module.count == count + 1
    assert torch.equal(rec.reduced["0"][0], x)
    torch.testing.assert_close(rec.reduced["0"][3], module.v(x).unflatten(-1, (H, D)).transpose(1, 2), rtol=0, atol=1e-12)


def test_one_that_was_asked_for_meanwhile_is_not_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model, module, x = apart(monkeypatch)
    calls: list[str] = []
    with AttentionRecorder(model, keep=lambda m: (calls.append(m.name), m[...])[1]) as rec, torch.no_grad():
        module.before.register_forward_hook(lambda *_: [*rec.reduced] and None)
        for count in (1, 2):
            model(x)
            assert len(calls) == count
    assert torch.allclose(rec.reduced["0"], late(model, x, lambda m: m[...])["0"], rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["vit", "no recipe"])
def test_an_interrupt_is_not_answered_by_another_call(kind: str) -> None:
    model, x = tiny("vit") if kind == "vit" else (nn.Sequential(plain()), torch.randn(B, N, C).double())
    calls: list[str] = []

    def interrupt(m: AttentionMap) -> None:
        calls.append(m.name)
        raise KeyboardInterrupt

    with AttentionRecorder(model, keep=interrupt), pytest.raises(KeyboardInterrupt):
        model(x)
    assert len(calls) == 1


# Layers that do not what the recipe says


class Fails(Attention):
    """Stops before it has projected anything."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        raise ArithmeticError("midway")


@pytest.mark.parametrize("kind", [Twice, Around])
def test_a_module_that_projects_in_another_way_is_reduced_all_the_same(
    kind: type[Attention], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model, x = (
        randomise(nn.Sequential(described(monkeypatch, kind)(C, H, qkv_bias=True)).eval()).double(),
        torch.randn(B, N, C).double(),
    )
    calls: list[str] = []
    with AttentionRecorder(model, keep=lambda m: (calls.append(m.name), m[...], m.x)[1:]) as rec, torch.no_grad():
        for _ in range(2):
            model(x)
        assert calls == ["0", "0"]
        q, k, _ = model[0].qkv(x).unflatten(-1, (3, H, D)).permute(2, 0, 3, 1, 4)  # type: ignore[operator]
    torch.testing.assert_close(rec.reduced["0"][0], (q @ k.mT * D**-0.5).softmax(-1), rtol=0, atol=1e-12)


def test_what_a_failed_call_waited_for_is_heard_by_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = randomise(nn.Sequential(described(monkeypatch, Fails)(C, H)).eval())
    x, calls = torch.randn(B, N, C), list[str]()
    with AttentionRecorder(model, keep=lambda m: calls.append(m.name)), torch.no_grad():
        with pytest.raises(ArithmeticError):
            model(x)
        model[0].qkv(x)
        assert calls == []
    assert calls == ["0"]  # of the captured call, when the block ends


def test_hooks_of_others_on_the_layer_are_part_of_it() -> None:
    model, x = plain(), torch.randn(B, N, C).double()
    with AttentionRecorder(model, keep=figures) as rec, torch.no_grad():
        model(x)  # now the layer is known to be one to wait for
        with model[0].qkv.register_forward_hook(lambda _, args, output: output * 1.5):  # type: ignore[union-attr]
            model(x)
            expected = late(model, x)
    assert alike(dict(rec.reduced), expected)


def test_a_layer_that_is_more_than_a_projection_runs_once_for_the_module_and_once_for_the_function() -> None:
    class Lora(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            runs.append(self)
            return super().forward(x) * 2

    runs: list[Any] = []
    model, x = nn.Sequential(Attention(C, H)).eval(), torch.randn(B, N, C)
    model[0].qkv = Lora(C, 3 * C).eval()
    with AttentionRecorder(model, keep=lambda m: m[...]) as rec, torch.no_grad():
        model(x)
        runs.clear()
        model(x)
        assert len(runs) == 2
    assert torch.equal(rec.reduced["0"], late(model, x, lambda m: m[...])["0"])


def test_a_call_that_its_recipe_declines_is_reduced_beside_one_that_it_describes(monkeypatch: pytest.MonkeyPatch) -> None:
    own_registers(monkeypatch)
    attn, x, mask = declining(), torch.randn(2, 5, 16), torch.randn(5, 5)
    q, k, _ = attn.qkv(x).unflatten(-1, (3, 4, 4)).permute(2, 0, 3, 1, 4)
    for order in ((None, mask, None, mask), (mask, None, mask, None)):
        with AttentionRecorder(attn, keep=lambda m: m[...]) as rec, torch.no_grad():
            for given in order:
                attn(x, attn_mask=given)
                (whole,) = rec.reduced.values()
                expected = (q @ k.mT / 2 + (0.0 if given is None else given)).softmax(-1)
                torch.testing.assert_close(whole, expected, rtol=0, atol=1e-6)


def test_a_source_of_one_s_own_is_not_broken_off(monkeypatch: pytest.MonkeyPatch) -> None:
    own_registers(monkeypatch)

    class Wrapped(Attention):  # type: ignore[misc]
        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return super().forward(x)  # type: ignore[no-any-return]

    class Opaque:
        def __init__(self, of: Any) -> None:
            self.of = of

        def __getattr__(self, name: str) -> Any:
            return getattr(self.of, name)

    @recipe(Wrapped)
    def wrapped(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return Opaque(QK(*project(self.qkv, x, "b n (parts h d) -> parts b h n d", parts=2, of=3, h=self.num_heads)))

    model, x = nn.Sequential(Wrapped(C, H)).eval(), torch.randn(B, N, C)
    calls: list[str] = []

    def function(m: AttentionMap) -> Tensor:
        calls.append(m.name)
        return m[...]

    expected = late(model, x, function)["0"]
    calls.clear()
    assert alike(reduced(model, x, function)["0"], expected)
    assert calls == ["0"]


# Others who run the module meanwhile


def test_another_thread_that_runs_the_layers_leaves_it_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model, module, x = apart(monkeypatch)
    calls: list[bool] = []

    def run_layers() -> None:
        with torch.no_grad():
            module.k(x), module.q(x)

    def meanwhile(*_: Any) -> None:
        other = Thread(target=run_layers)
        other.start()
        other.join()

    with AttentionRecorder(model, keep=lambda m: (calls.append(current_thread() is main_thread()), m[...])[1]) as rec:
        with torch.no_grad():
            model(x)  # from now on it is known which layers to wait for
            module.before.register_forward_hook(meanwhile)
            model(x)
        assert calls == [True, True]
    torch.testing.assert_close(rec.reduced["0"], late(model, x, lambda m: m[...])["0"], rtol=0, atol=1e-12)


def test_what_a_function_runs_with_other_weights_is_heard_by_no_other_recorder() -> None:
    model, x = plain(), torch.randn(B, N, C).double()
    attn: Any = model[0]
    other = {name: p * 3 for name, p in attn.named_parameters()}

    def function(m: AttentionMap) -> None:
        functional_call(attn, other, (m.x,))

    with torch.no_grad(), AttentionRecorder(model, keep=function) as first:
        model(x)  # its hook on the layer comes first
        with AttentionRecorder(model, keep="maps") as kept, AttentionRecorder(model, keep=lambda m: m[...]) as rec:
            model(x)
    expected = late(model, x, lambda m: m[...])["0"]
    assert first.reduced["0"] is None
    for whole in (kept.maps["0"][...], rec.reduced["0"]):
        torch.testing.assert_close(whole, expected, rtol=0, atol=1e-12)


def test_outputs_are_those_of_the_model_alone_bit_for_bit() -> None:
    for name in HEARD[:4]:
        model, x = MODELS[name]()
        with torch.no_grad():
            expected = model(x)
            with AttentionRecorder(model, keep=figures):
                assert torch.equal(model(x), expected)
                assert torch.equal(model(x), expected)


def test_hooks_are_gone_from_the_layers_after_the_block() -> None:
    model, x = tiny("vit")
    with AttentionRecorder(model, keep=figures), torch.no_grad():
        model(x)
        assert any(m._forward_hooks for n, m in model.named_modules() if n.endswith("qkv"))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert alike(record(model, x, keep=figures).reduced["blocks.0.attn"], late(model, x)["blocks.0.attn"])
