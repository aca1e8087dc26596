"""`keep=function`: what it returns for each map is kept, as of a recorded map within rounding, and the map is let go."""

from __future__ import annotations

import gc
import pickle
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from support import elsewhere
from support.inside import forget_what_was_established, no_more_evidence
from support.models import SCORES, B, C, D, H, N, by_hand, plain, tiny
from support.modes import Largest, operations_of
from support.reading import record
from support.reduced import MODELS, Own, alike, figures, late, own, reduced, same
from support.untouched import untouched
from torch import Tensor, nn
from torch.func import vmap
from torch.utils.checkpoint import checkpoint

from hookattn import AttentionMap, AttentionRecorder, LayerNotFoundError, NoMapError, RecorderError, UnreadableError
from hookattn.analysis import entropy

# What it makes


@pytest.mark.filterwarnings("ignore")  # of other packages
@pytest.mark.parametrize("name", MODELS)
def test_what_is_kept_is_what_the_function_makes_of_recorded_maps(name: str) -> None:
    model, x = MODELS[name]()
    calls: list[str] = []
    with torch.no_grad():
        output = model(x)
    expected = late(model, x)
    with untouched(model), AttentionRecorder(model, keep=lambda m: (calls.append(m.name), figures(m))[1]) as rec:
        with torch.no_grad():
            again = model(x)
        assert calls == list(expected)  # while the model runs
    assert calls == list(rec.reduced) == list(expected)
    assert (same if name.startswith("no recipe") else alike)(dict(rec.reduced), expected)
    assert elsewhere.alike(elsewhere.tensors(again), elsewhere.tensors(output))


FUNCTIONS: dict[str, Callable[[AttentionMap], Any]] = {
    "entropy": entropy,
    "rows": lambda m: m.rows("cls"),
    "image": lambda m: m.image("cls", size=64),
    "tokens": lambda m: (m.tokens.grid_size, m.tokens.prefix, m.axes),
    "vectors": lambda m: (m.q[...], m.k[:, 0], m.k.image(), m.v[...]),
    "outputs": lambda m: (m.effective[:, :, 0], m.output(queries="cls")),
    "verified": lambda m: float(m.verify()) < 1e-4,
    "pickled": lambda m: pickle.loads(pickle.dumps(m))[...],
}


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_function_reads_all_that_a_map_has(function: str) -> None:
    model, x = tiny("vit")
    assert alike(reduced(model, x, FUNCTIONS[function]), late(model, x, FUNCTIONS[function]))


@pytest.mark.parametrize("fused", [True, False])
def test_a_map_that_was_watched_has_its_call(fused: bool) -> None:
    model, x = own(fused)

    def function(m: AttentionMap) -> Any:
        return m.x, m.v[...], m.effective[...], m.output(), float(m.verify()) < 1e-4, m.q[...] if fused else None

    expected = late(model, x, function, layers="0")
    assert same(reduced(model, x, function, layers="0"), expected)


@pytest.mark.parametrize("options", [{"dtype": torch.float16}, {"device": "meta"}, {"dtype": torch.float64}], ids=str)
def test_maps_are_delivered_as_the_recorder_was_told(options: dict[str, Any]) -> None:
    model, x = tiny("vit")
    got, expected = (
        reduced(model, x, lambda m: (m[...], m.rows()), **options),
        late(model, x, lambda m: (m[...], m.rows()), **options),
    )
    for name, tensors in got.items():
        for ours, theirs in zip(tensors, expected[name]):
            assert (ours.dtype, ours.device, ours.shape) == (theirs.dtype, theirs.device, theirs.shape)
            assert ours.is_meta or torch.allclose(
                ours.double(), theirs.double(), rtol=0, atol=1e-3 if ours.element_size() < 4 else 1e-6
            )


def test_forwards_follow_each_other_and_the_last_one_is_told() -> None:
    model, x = tiny("vit")
    with AttentionRecorder(model, keep=entropy, called_from=True) as rec, torch.no_grad():
        with pytest.raises(NoMapError, match="no forward"):
            assert rec.reduced
        for images in (x, x.flip(0)):
            model(images)
            assert same(dict(rec.reduced), late(model, images, entropy))
        model.forward_features(x)  # type: ignore[operator]
        assert same(dict(rec.reduced), late(model, x, entropy))
        by_hand(x.flip(0), model)
    assert same(dict(rec.reduced), late(model, x.flip(0), entropy))


def test_a_function_sees_what_was_made_before() -> None:
    model, x = tiny("vit", depth=3)
    before: list[list[str]] = []
    with AttentionRecorder(model, keep=lambda m: before.append([*rec.reduced])) as rec:
        model(x)
    assert before == [[], ["blocks.0.attn"], ["blocks.0.attn", "blocks.1.attn"]]


# While the model runs


def in_a_row(kind: str) -> tuple[nn.Module, list[str], Any]:
    """A model that runs one attention after the other, the names of these, and what it is given."""
    if kind.startswith("no recipe"):
        model: nn.Module = nn.Sequential(nn.Linear(C, C), *(Own(kind.endswith("fused")) for _ in range(3))).eval()
        return model, ["1", "2", "3"], torch.randn(B, N, C)
    model, x = MODELS[kind]()
    return model, AttentionRecorder(model).layers, x


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("kind", ["vit", "swin", "no recipe, fused", "no recipe"])
def test_input_and_map_are_gone_when_the_module_has_run(kind: str, fails: bool) -> None:
    model, layers, x = in_a_row(kind)
    late(model, x, layers=layers)  # what is established once
    seen: list[weakref.ref[Any]] = []
    held: list[int] = []

    def function(m: AttentionMap) -> Tensor:
        whole = m[...]
        seen.extend([weakref.ref(m), weakref.ref(whole), weakref.ref(m.x)])
        if fails:
            try:
                raise KeyError(whole.shape)
            except KeyError:
                raise ValueError("of what holds frames")  # noqa: B904
        return whole.sum(-1)

    def count(_: nn.Module, args: Any) -> None:
        held.append(sum(ref() is not None for ref in seen))
        seen.extend(map(weakref.ref, args[:1]))

    gc.collect()
    gc.disable()
    try:
        with AttentionRecorder(model, layers, keep=function) as rec, torch.no_grad():
            for name in layers:
                model.get_submodule(name).register_forward_pre_hook(count, prepend=True)
            model(x.clone())
            assert held == [0] * len(layers)
            count(model, ())
        assert held[-1] == 0
        assert len(rec.reduced) == len(layers) == len(seen) / 4
    finally:
        gc.enable()


def test_a_row_makes_no_product_of_queries_and_keys() -> None:
    model, x = plain(), torch.randn(B, N, C).double()
    with torch.no_grad():
        alone = operations_of(lambda: model(x))
        with AttentionRecorder(model, keep=lambda m: m[:, :, 0]):
            model(x)  # the shape of a map is found once, by arithmetic of shapes
            assert operations_of(lambda: model(x)) == alone + B * H * 2 * N * D
        with AttentionRecorder(model, keep=lambda m: m[...]):
            assert operations_of(lambda: model(x)) == alone + B * H * SCORES


def test_a_row_of_a_module_that_was_watched_is_made_of_what_it_gave_to_the_kernel() -> None:
    model, x = nn.Sequential(Own()).eval(), torch.randn(B, N, C)
    with torch.no_grad():
        late(model, x, layers="0")
        alone = operations_of(lambda: model(x))
        with AttentionRecorder(model, "0", keep=lambda m: m[:, :, 0]):
            assert operations_of(lambda: model(x)) == alone + B * H * 2 * N * D


def test_a_row_of_many_tokens_forms_nothing_of_their_square() -> None:
    model, tokens = plain().float(), 2_048
    with AttentionRecorder(model, keep=lambda m: m[:, :, 0]), torch.no_grad(), Largest() as seen:
        model(torch.randn(1, tokens, C))
    assert seen.elements < tokens**2


# Other hooks, edits, modes


@pytest.mark.parametrize("kind", ["vit", "no recipe, fused"])
def test_the_map_is_that_of_what_later_hooks_have_made_of_the_input_and_is_reduced_once(kind: str) -> None:
    model, layers, x = in_a_row(kind)
    late(model, x, layers=layers)
    calls: list[str] = []

    def function(m: AttentionMap) -> Any:
        calls.append(m.name)
        return figures(m), m.x, m.k[...]

    first, last = (model.get_submodule(name).register_forward_pre_hook for name in (layers[0], layers[-1]))
    with AttentionRecorder(model, layers, keep=function) as rec, AttentionRecorder(model, layers) as other, torch.no_grad():
        handles = first(lambda _, args: (args[0] * 2, *args[1:])), last(lambda *_: None)  # which might change it
        model(x)
    for handle in handles:
        handle.remove()
    assert sorted(calls) == sorted(layers)
    assert same(dict(rec.reduced), {name: (figures(m), m.x, m.k[...]) for name, m in other.maps.items()})


def test_edits_are_made_and_the_map_is_the_one_before() -> None:
    model, x = tiny("vit")
    calls: list[str] = []
    with AttentionRecorder(model) as rec, rec.edit({0: lambda a: a.flip(-1)}), torch.no_grad():
        expected = model(x)
    other = AttentionRecorder(model, keep=lambda m: (calls.append(m.name), figures(m))[1])
    with other, other.edit({0: lambda a: a.flip(-1)}), torch.no_grad():
        assert torch.equal(model(x), expected)
    assert calls == list(rec.maps)
    assert alike(dict(other.reduced), {name: figures(m) for name, m in rec.maps.items()})


@pytest.mark.parametrize("followed", [False, True])
@pytest.mark.parametrize("kind", ["vit", "no recipe"])
def test_in_train_mode_nothing_else_is_drawn(kind: str, followed: bool) -> None:
    model, layers, x = in_a_row(kind)
    if kind == "vit":
        model, x = tiny("vit", proj_drop_rate=0.3, attn_drop_rate=0.3, drop_path_rate=0.3)
        nn.utils.parametrizations.spectral_norm(model.blocks[1].attn.qkv)  # type: ignore[index,union-attr]
    model.train()
    hooks = [model.get_submodule(name).register_forward_pre_hook for name in layers]
    state = {name: value.clone() for name, value in model.state_dict().items()}

    def run(**options: Any) -> tuple[AttentionRecorder, Tensor]:
        model.load_state_dict(state)
        torch.manual_seed(3)
        with AttentionRecorder(model, layers, **options) as rec, torch.no_grad():
            handles = [hook(lambda *_: None) for hook in hooks] if followed else []
            output = model(x)
        for handle in handles:
            handle.remove()
        return rec, torch.cat([output.flatten(), torch.rand(3)])

    expected = run()
    kept = {name: figures(m) for name, m in expected[0].maps.items()}
    got = run(keep=lambda m: (torch.rand(9), figures(m))[1])
    assert torch.equal(got[1], expected[1])
    assert same(dict(got[0].reduced), kept)


def test_what_a_function_computes_under_autocast_is_not_cast() -> None:
    model, x = tiny("vit")

    def function(m: AttentionMap) -> Tensor:
        return m[:, :, 0] @ m[...].mean(1).mT

    with torch.autocast("cpu", dtype=torch.bfloat16), AttentionRecorder(model) as rec, torch.no_grad():
        model(x)
    with torch.autocast("cpu", dtype=torch.bfloat16), AttentionRecorder(model, keep=function) as kept, torch.no_grad():
        model(x)
    for name, m in rec.maps.items():
        torch.testing.assert_close(kept.reduced[name], function(m), rtol=0, atol=2e-3)  # queries and keys are bfloat16


def test_a_softmax_of_the_function_is_not_one_of_a_module_around() -> None:
    class Outer(Own):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Own(False)

        def forward(self, x: Tensor, fails: bool = False) -> Tensor:
            q, k, v = self.qkv(x).unflatten(-1, (3, H, D)).permute(2, 0, 3, 1, 4)
            v = v + self.inner(x).unflatten(-1, (H, D)).transpose(1, 2)
            return self.proj(((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    def function(m: AttentionMap) -> Tensor:
        return (m[...] @ m[...].mT).softmax(-1)

    model, x = nn.Sequential(Outer()).eval(), torch.randn(B, N, C)
    expected = late(model, x, function, layers=["0", "0.inner"])
    assert same(reduced(model, x, function, layers=["0", "0.inner"]), expected)


@pytest.mark.parametrize("kind", ["vit", "no recipe"])
def test_in_a_graph_what_is_made_is_in_it(kind: str) -> None:
    model, layers, x = in_a_row(kind)
    gradients = []
    for options in ({}, {"keep": lambda m: m[:, :, 0].square().sum()}):
        with AttentionRecorder(model, layers, detach=False, **options) as rec:  # type: ignore[arg-type]
            images = x.clone().requires_grad_()
            model(images)
        sums = rec.reduced.values() if options else [m[:, :, 0].square().sum() for m in rec.maps.values()]
        gradients.append(torch.autograd.grad(sum(sums), images))
    assert same(*gradients)
    with AttentionRecorder(model, layers, keep=lambda m: m.rows(0) if kind == "vit" else m[:, :, 0]) as rec:
        model(x.requires_grad_())
    assert not any(rows.requires_grad for rows in rec.reduced.values())


class Probe(nn.Module):
    """A function of a map with parameters of its own, of which autograd saves something."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, 1, 1))

    def forward(self, m: AttentionMap) -> Tensor:
        return (m[...] * self.weight).sum(1)


@pytest.mark.parametrize("followed", [False, True])
@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_find_the_forward_they_ran_before(reentrant: bool, detach: bool, followed: bool) -> None:
    model, x = tiny("vit")
    x.requires_grad_()
    expected = torch.autograd.grad(model(x).square().sum(), [x, *model.parameters()])
    rows = late(model, x, lambda m: m[...].sum(1))
    for block in model.blocks:  # type: ignore[union-attr]
        run = partial(checkpoint, block.forward, use_reentrant=reentrant)
        block.forward = lambda x, run=run, **_: run(x)
    with AttentionRecorder(model, keep=Probe(), detach=detach) as rec:
        if followed:
            model.blocks[0].attn.register_forward_pre_hook(lambda *_: None)  # type: ignore[index,union-attr]
        loss = model(x).square().sum()
        loss.backward()
    for p, grad in zip([x, *model.parameters()], expected, strict=True):
        assert p.grad is not None
        assert torch.equal(p.grad, grad)
    assert same({n: t.detach() for n, t in rec.reduced.items()}, rows)


@pytest.mark.parametrize("followed", [False, True])
def test_a_module_that_counts_its_calls_is_read_after_the_call(followed: bool) -> None:
    class Counting(Own):
        count = 0

        def forward(self, x: Tensor, fails: bool = False) -> Tensor:
            self.count += 1
            return super().forward(x, fails)

    model, x = nn.Sequential(Counting(False)).eval(), torch.randn(B, N, C)
    model(x)  # from now on it is an attribute of its own
    with AttentionRecorder(model, "0", keep="maps") as rec, torch.no_grad():
        model(x)
    with AttentionRecorder(model, "0", keep=lambda m: (m[...], m.v.shape)) as kept, torch.no_grad():
        if followed:
            model[0].register_forward_pre_hook(lambda *_: None)
        model(x)
    assert same(kept.reduced["0"], (rec.maps["0"][...], (B, H, N, D)))


# Axes that are established at the end


@pytest.mark.parametrize("fused", [True, False])
def test_a_map_whose_axes_are_not_known_yet_is_reduced_when_it_is_asked_for_or_at_the_end(fused: bool) -> None:
    model, layers, x = in_a_row("no recipe, fused" if fused else "no recipe")
    calls: list[str] = []
    for asked in (False, True):
        forget_what_was_established()
        calls.clear()
        with AttentionRecorder(model, layers, keep=lambda m: (calls.append(m.name), figures(m))[1]) as rec, torch.no_grad():
            with no_more_evidence():
                model(x)
            assert calls == []
            if asked:
                assert list(rec.reduced) == layers
                assert calls == layers
                with no_more_evidence():
                    model(x)
                assert calls == [*layers, *layers]
        assert calls[-3:] == layers
        assert same(dict(rec.reduced), late(model, x, layers=layers))


def test_what_waits_notes_nothing_of_what_runs_after_its_module() -> None:
    model, x = nn.Sequential(Own(False), nn.Softmax(-1), nn.Linear(C, C)).eval(), torch.randn(B, N, C)
    forget_what_was_established()
    seen: list[weakref.ref[Any]] = []
    with AttentionRecorder(model, "0", keep=figures) as rec, torch.no_grad():
        with model[1].register_forward_hook(lambda _, args, output: seen.extend(map(weakref.ref, (*args, output)))):
            model(x)
        assert [ref() for ref in seen] == [None, None]
    assert list(rec.reduced) == ["0"]


def test_what_is_asked_for_while_its_module_runs_is_made_then_and_stays() -> None:
    model, x = nn.Sequential(Own()).eval(), torch.randn(B, N, C)
    expected = late(model, x, layers="0")
    calls: list[str] = []
    with AttentionRecorder(model, "0", keep=lambda m: (calls.append(m.name), figures(m))[1]) as rec, torch.no_grad():
        model[0].proj.register_forward_hook(lambda *_: ([*rec.reduced], None)[1])  # type: ignore[union-attr]
        model(x)
    assert calls == ["0"]
    assert same(dict(rec.reduced), expected)


# What goes wrong


def fail_in(name: str, m: AttentionMap) -> Tensor:
    if m.name == name:
        raise ZeroDivisionError("by nought")
    return m[:, :, 0]


@pytest.mark.parametrize("kind", ["vit", "no recipe"])
def test_an_error_of_the_function_is_kept_and_told_by_name_and_line(kind: str) -> None:
    model, layers, x = in_a_row(kind)
    with torch.no_grad():
        expected = model(x)
    with untouched(model), AttentionRecorder(model, layers, keep=partial(fail_in, layers[0])) as rec, torch.no_grad():
        assert torch.equal(model(x), expected)
    for _ in range(2):
        with pytest.raises(
            RecorderError, match=rf"raised for '{layers[0]}': ZeroDivisionError: by nought\n.*in fail_in"
        ) as told:
            rec.reduced[layers[0]]
        assert isinstance(told.value.__cause__, ZeroDivisionError)
        assert told.value.__cause__.__traceback__ is None
    assert list(rec.reduced) == layers
    assert alike(rec.reduced[layers[1]], late(model, x, lambda m: m[:, :, 0], layers=layers)[layers[1]])
    with pytest.raises(LayerNotFoundError, match=r"nothing of 'block'.*There is|Did you mean"):
        rec.reduced["block"]


def test_what_the_user_handles_meanwhile_keeps_its_traceback() -> None:
    model, x = tiny("vit")
    with AttentionRecorder(model, keep=partial(fail_in, "blocks.0.attn")) as rec:
        try:
            raise KeyError("of the user")
        except KeyError as error:
            model(x)
            handled = error
    assert handled.__traceback__ is not None
    with pytest.raises(RecorderError) as told:
        rec.reduced["blocks.0.attn"]
    assert told.value.__cause__ is not None
    assert told.value.__cause__.__context__ is None


def test_an_interrupt_in_the_function_is_one_of_the_forward() -> None:
    model, x = tiny("vit")

    def interrupt(m: AttentionMap) -> None:
        raise KeyboardInterrupt

    with untouched(model), pytest.raises(KeyboardInterrupt), AttentionRecorder(model, keep=interrupt):
        model(x)


@pytest.mark.parametrize("function", [lambda m: m, lambda m: m.k, lambda m: m.effective])
def test_a_map_that_is_returned_as_it_is_says_that_it_is_gone(function: Callable[[AttentionMap], Any]) -> None:
    model, x = tiny("vit")
    with AttentionRecorder(model, keep=function) as rec:
        model(x)
    with pytest.raises(RecorderError, match=r"raised for 'blocks\.0\.attn'.*it returned .*return m\[\.\.\.\]"):
        rec.reduced["blocks.0.attn"]


@pytest.mark.parametrize(
    "asked",
    [lambda m: m[...], lambda m: m.shape, lambda m: m.rows(0), lambda m: m.x, lambda m: m.k, lambda m: m.effective[...]],
)
def test_a_map_that_is_kept_elsewhere_says_that_it_was_let_go(asked: Callable[[AttentionMap], Any]) -> None:
    for kind in ("vit", "no recipe"):
        model, layers, x = in_a_row(kind)
        maps: list[AttentionMap] = []
        with AttentionRecorder(model, layers, keep=maps.append) as rec:
            model(x)
        assert set(rec.reduced.values()) == {None}
        with pytest.raises(RecorderError, match="let go"):
            asked(maps[0])


def test_maps_are_refused_with_the_way_to_what_was_made() -> None:
    model, x = tiny("vit")
    rec = record(model, x, keep=entropy)
    for asked in (lambda: rec.maps, lambda: rec.passes, rec.rows, rec.verify, lambda: rec.save("maps.safetensors")):
        with pytest.raises(RecorderError, match=r"let go.*rec\.reduced\["):
            asked()
    with pytest.raises(RecorderError, match=r"keep=function.*rec\.maps"):
        assert record(model, x).reduced
    assert repr(rec.reduced) == "Reduced: blocks.0.attn, blocks.1.attn"
    assert "blocks.0.attn" in rec.reduced


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 3}, r"keep=3 is not known: .* or a function of a map"),
        ({"keep": entropy, "passes": "all"}, r"passes=\"all\" .* read rec\.reduced after each forward"),
        ({"keep": entropy, "gradients": True}, r"gradients=True .* keep=\"maps\""),
        ({"keep": entropy, "verify": True}, r"verify=True .* m\.verify\(\)"),
    ],
    ids=str,
)
def test_what_goes_with_no_function_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AttentionRecorder(tiny("vit")[0], **options)


def test_what_forms_no_map_is_skipped_and_the_function_not_called() -> None:
    model, x = tiny("vit")
    calls: list[str] = []
    with AttentionRecorder(model, ["blocks.0.mlp", "blocks.1.attn"], keep=lambda m: calls.append(m.name)) as rec:
        model(x)
    assert "blocks.0.mlp" in rec.skipped
    assert calls == list(rec.reduced) == ["blocks.1.attn"]
    assert "blocks.0.mlp" not in rec.reduced
    with pytest.raises(UnreadableError, match=r"'blocks\.0\.mlp'"):
        rec.reduced["blocks.0.mlp"]


def test_a_module_that_raises_has_nothing_and_holds_nothing_after_the_block() -> None:
    model, x = nn.Sequential(Own()).eval(), torch.randn(B, N, C)
    late(model, x, layers="0")
    held = weakref.ref(x)
    with AttentionRecorder(model, "0", keep=figures) as rec, torch.no_grad(), pytest.raises(ArithmeticError):
        model[0](x, True)
    del x
    assert held() is None
    with pytest.raises(UnreadableError, match="midway"):
        rec.reduced["0"]


def test_nothing_is_made_while_an_error_is_on_its_way() -> None:
    model, x = tiny("vit")
    calls: list[str] = []
    with AttentionRecorder(model, 0, keep=lambda m: calls.append(m.name)) as rec:
        attn = model.blocks[0].attn  # type: ignore[index,union-attr]
        attn.register_forward_pre_hook(lambda *_: None)  # so that the map is not made before
        attn.proj.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(x)
        assert calls == []
    assert calls == list(rec.reduced) == ["blocks.0.attn"]


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # a kernel that PyTorch has no batching rule for
def test_what_was_made_under_vmap_is_read_inside_of_it() -> None:
    model, x = tiny("vit")

    def inside(images: Tensor) -> dict[str, Tensor]:
        with AttentionRecorder(model, keep=lambda m: m[:, :, 0]) as rec:
            model(images)
        return dict(rec.reduced)

    got = vmap(inside)(torch.stack([x, -x]))
    for name, rows in late(model, x, lambda m: m[:, :, 0]).items():
        torch.testing.assert_close(got[name][0], rows, rtol=0, atol=1e-6)
    with AttentionRecorder(model, keep=lambda m: m[:, :, 0]) as rec:
        vmap(model)(torch.stack([x, -x]))
    with pytest.raises(UnreadableError, match=r"ran under torch\.vmap.*inside of what is mapped"):
        rec.reduced["blocks.0.attn"]
