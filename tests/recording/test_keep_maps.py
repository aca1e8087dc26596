"""`keep="maps"`: made of what the module projects itself while it runs once, and its input is let go."""

from __future__ import annotations

import gc
import weakref
from contextlib import ExitStack
from threading import Thread, current_thread, main_thread
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.heard import Around, Twice, declining
from support.inside import find_recipe, own_registers, project_heads, read_by
from support.models import SCORES, TINY, B, C, D, H, N, plain, randomise, tiny
from support.modes import operations_of
from support.reading import read, same
from timm.layers import Attention
from torch import Tensor, nn
from torch.overrides import BaseTorchFunctionMode

from hookattn import QK, AttentionRecorder, RecorderError, UnreadableError


@pytest.mark.parametrize("norm", [False, True])
def test_maps_that_are_kept_are_made_of_the_projections_of_the_forward(norm: bool) -> None:
    model, x = plain(qk_norm=norm, norm_layer=nn.LayerNorm), torch.randn(B, N, C).double()
    with torch.no_grad():
        alone = operations_of(lambda: model(x))
        with AttentionRecorder(model, keep="maps") as rec:
            assert operations_of(lambda: model(x)) == alone + B * H * SCORES
        kept = rec.maps[0][...]
        with AttentionRecorder(model) as rec:
            model(x)
    torch.testing.assert_close(kept, rec.maps[0][...], rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", [Twice, Around])
def test_a_module_that_projects_in_another_way_than_its_recipe_is_read_all_the_same(
    kind: type[Attention], monkeypatch: pytest.MonkeyPatch
) -> None:

    read_by(monkeypatch)
    torch.manual_seed(0)
    model, x = randomise(nn.Sequential(kind(C, H, qkv_bias=True)).eval()).double(), torch.randn(B, N, C).double()
    with torch.no_grad():
        with AttentionRecorder(model, keep="maps") as rec:
            model(x)
        q, k, _ = model[0].qkv(x).unflatten(-1, (3, H, D)).permute(2, 0, 3, 1, 4)  # type: ignore[operator]
    torch.testing.assert_close(rec.maps[0][...], (q @ k.mT * D**-0.5).softmax(-1), rtol=0, atol=1e-12)
    with pytest.raises(RecorderError, match="was let go"):
        assert rec.maps[0].x


class Own(nn.Module):
    """Attention of one's own, which no recipe knows."""

    def __init__(self, fused: bool = True, dropout: float = 0.0) -> None:
        super().__init__()
        self.fused, self.dropout, self.num_heads = fused, dropout, H
        self.qkv, self.proj = nn.Linear(C, 3 * C), nn.Linear(C, C)

    def forward(self, x: Tensor, fails: type[BaseException] | None = None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, H, D)).permute(2, 0, 3, 1, 4)
        if fails is not None:
            raise fails
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout)
        else:
            y = (q @ k.mT * D**-0.5).softmax(-1) @ v
        return self.proj(y.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


def own(**options: Any) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = randomise(nn.Sequential(nn.Sequential(Own(**options))).eval()).double()
    assert find_recipe(model[0][0]) is None  # type: ignore[index]
    return model, torch.randn(B, N, C).double()


@pytest.mark.parametrize("fused", [True, False])
def test_a_module_that_no_recipe_knows_is_run_once(fused: bool) -> None:
    model, x = own(fused=fused)
    with torch.no_grad():
        with AttentionRecorder(model, "0.0") as first:
            model(x)
        assert first.maps[0].shape == (B, H, N, N)  # its axes are established by this reading, once
        alone = operations_of(lambda: model(x))
        with AttentionRecorder(model, "0.0", keep="maps") as rec:
            assert operations_of(lambda: model(x)) == alone + fused * B * H * SCORES
        with AttentionRecorder(model, keep="maps"):
            model(x)  # watched for modules that form maps
            assert torch.overrides._get_current_function_mode_stack() == []  # type: ignore[no-untyped-call]
            assert operations_of(lambda: model(x)) == alone + fused * B * H * SCORES
    with AttentionRecorder(model, "0.0", keep="maps") as followed, AttentionRecorder(model, "0.0") as late:
        model(x)
    assert not followed.maps[0][...].requires_grad
    for kept in (rec, followed):
        torch.testing.assert_close(kept.maps[0][...], late.maps[0][...], rtol=0, atol=1e-12)


class Packed(nn.Module):
    """Calls PyTorch's attention itself, then weighs channels by a softmax of another shape."""

    def __init__(self, *asked: bool | None) -> None:
        super().__init__()
        self.num_heads, self.layer, self.asked = H, nn.Linear(C, 3 * C), asked
        self.proj = nn.Linear(C, C)

    def forward(self, x: Tensor) -> Tensor:
        x, layer, proj = x.transpose(0, 1), self.layer, self.proj
        own = (layer.weight, layer.bias, None, None, False, 0.0, proj.weight, proj.bias)
        y = F.multi_head_attention_forward(x, x, x, C, H, *own, False, *self.asked)[0].transpose(0, 1)
        return y * x.mean(0).softmax(-1)[:, None] if self.asked else y


@pytest.mark.parametrize("asked", [(), (None, False)], ids=["weights", "none, by position"])
def test_what_a_module_asks_of_pytorch_s_function_is_a_map_of_heads(asked: Any) -> None:
    model, x = randomise(nn.Sequential(Packed(*asked)).eval()).double(), torch.randn(B, N, C).double()
    with torch.no_grad():
        expected = model(x)
        with AttentionRecorder(model, "0") as late, AttentionRecorder(model, "0", keep="maps") as kept:
            assert torch.equal(model(x), expected)
    q, k, _ = model[0].layer(x).unflatten(-1, (3, H, D)).permute(2, 0, 3, 1, 4)  # type: ignore[operator]
    for rec in (late, kept):
        torch.testing.assert_close(rec.maps[0][...], (q @ k.mT * D**-0.5).softmax(-1), rtol=0, atol=1e-12)


class KeysFirst(Attention):
    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        k, q, v = self.k(x), self.q(x), self.v(x)
        q, k, v = (t.unflatten(-1, (H, D)).transpose(1, 2) for t in (q, k, v))
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


def test_keys_that_are_projected_before_queries_are_taken_too(monkeypatch: pytest.MonkeyPatch) -> None:
    from hookattn import QK

    def recipe(self: Any, x: Tensor) -> QK:
        return QK(project_heads(self.q, x, H), project_heads(self.k, x, H), scale=self.scale)

    read_by(monkeypatch, recipe)
    module = KeysFirst(C, H)
    module.q, module.k, module.v = (nn.Linear(C, C) for _ in range(3))
    model, x = nn.Sequential(randomise(module)).eval().double(), torch.randn(B, N, C).double()
    with torch.no_grad():
        alone = operations_of(lambda: model(x))
        with AttentionRecorder(model, keep="maps"):
            model(x)  # which layers to hear is known from then on
            assert operations_of(lambda: model(x)) == alone + B * H * SCORES


def test_another_thread_that_runs_the_module_leaves_the_map_alone() -> None:
    model, x = own()
    with AttentionRecorder(model, "0.0", keep="maps") as rec, torch.no_grad():
        flipped = x.flip(0)

        def meanwhile(*_: Any) -> None:
            if current_thread() is main_thread():
                other = Thread(target=model, args=(flipped,))
                other.start()
                other.join()

        with model[0][0].qkv.register_forward_hook(meanwhile):  # type: ignore[index]
            model(x)
    with AttentionRecorder(model, "0.0") as late, torch.no_grad():
        model(x)
    with pytest.raises(RecorderError, match="was let go"):
        assert rec.maps[0].x
    torch.testing.assert_close(rec.maps[0][...], late.maps[0][...], rtol=0, atol=1e-12)


def test_modes_and_devices_come_and_go_while_a_recorder_overhears() -> None:
    model, x = own()
    torch.set_default_device("cpu")
    mine, device = BaseTorchFunctionMode(), torch.device("cpu")
    mine.__enter__()
    with AttentionRecorder(model, "0.0", keep="maps") as rec, torch.no_grad():
        model(x)
        mine.__exit__(None, None, None)
        torch.set_default_device(None)  # which insists on a device below all modes
        with device:
            model(x)
    assert rec.maps[0].shape == (B, H, N, N)
    with device, AttentionRecorder(model, "0.0", keep="maps"), torch.no_grad():
        model(x)
    assert torch.overrides._get_current_function_mode_stack() == []  # type: ignore[no-untyped-call]


def test_a_module_that_drops_while_it_evaluates_is_left_to_it() -> None:
    model, x = own(dropout=0.5)
    torch.manual_seed(1)
    expected = model(x)
    with AttentionRecorder(model, "0.0", keep="maps") as rec:
        torch.manual_seed(1)
        assert torch.equal(model(x), expected)
    torch.testing.assert_close(rec.maps[0][...].sum(-1), torch.ones(B, H, N).double())


@pytest.mark.parametrize("fused", [True, False])
def test_softmaxes_of_hooks_and_of_other_recorders_are_not_the_module_s(fused: bool) -> None:
    model, x = own(fused=fused)

    def recomputes(module: nn.Module, args: Any, output: Tensor) -> None:
        (output @ output.mT).softmax(-1)

    recorders = [
        AttentionRecorder(model, "0.0"),
        *(AttentionRecorder(model, name, keep="maps") for name in ("0.0", ["0", "0.0"])),
    ]
    with ExitStack() as stack, torch.no_grad():
        stack.enter_context(model[0].register_forward_hook(recomputes))
        late, rec, around = (stack.enter_context(each) for each in recorders)
        stack.enter_context(rec.edit({"0.0": lambda a: a.flip(-1)}))
        model(x)
    assert list(around.maps) == ["0", "0.0"]
    for m in (*rec.maps.values(), *around.maps.values()):
        torch.testing.assert_close(m[...], late.maps[0][...], rtol=0, atol=1e-12)


def test_layers_of_the_model_stay_on_their_fast_path() -> None:
    model, x = own()
    layer = nn.TransformerEncoderLayer(C, H, 2 * C, batch_first=True).double().eval()
    fast, model = [], nn.Sequential(model, layer).eval()
    with torch.no_grad(), AttentionRecorder(model, "0.0.0", keep="maps") as rec, pytest.MonkeyPatch.context() as patch:
        through = torch._transformer_encoder_layer_fwd
        patch.setattr(torch, "_transformer_encoder_layer_fwd", lambda *args: [fast.append(1), through(*args)][1])
        model(x)
    assert fast
    assert rec.maps[0].shape == (B, H, N, N)


@pytest.mark.parametrize("fails", [ValueError, KeyboardInterrupt])
def test_no_mode_stays_where_a_forward_fails(fails: type[BaseException]) -> None:
    model, x = own()
    with BaseTorchFunctionMode() as mine:
        with AttentionRecorder(model, ["0.0"], keep="maps") as rec:
            with pytest.raises(fails), BaseTorchFunctionMode():
                model[0][0](x, fails)  # type: ignore[index]
            with pytest.raises(UnreadableError if fails is ValueError else fails):
                rec.maps[0][...]
            model[0][0](x)  # type: ignore[index]
            with pytest.raises(RecorderError, match="was let go"):
                assert rec.maps[0].x
            with pytest.raises(fails):
                model[0][0](x, fails)  # type: ignore[index]
        assert torch.overrides._get_current_function_mode_stack() == [mine]  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("name", TINY)
def test_maps_that_are_kept_are_those_computed_from_the_inputs(name: str) -> None:
    model, x = tiny(name)
    with AttentionRecorder(model) as late, AttentionRecorder(model, keep="maps") as kept, torch.no_grad():
        model(x)
    assert same(read(kept), read(late))
    for a, b in zip(kept.maps.values(), late.maps.values()):
        assert (a.name, a.shape, a.dtype, a.device) == (b.name, b.shape, b.dtype, b.device)
        assert repr(a) == repr(b)


@pytest.mark.parametrize("keep", ["inputs", "maps"])
def test_keep_maps_lets_the_input_go_and_keep_inputs_holds_it(keep: Any) -> None:
    model, x = tiny("vit")
    seen: list[weakref.ref[Tensor]] = []

    def watch(module: nn.Module, args: tuple[Any, ...]) -> None:
        seen.append(weakref.ref(args[0]))

    gc.disable()
    try:
        with AttentionRecorder(model, keep=keep) as rec, torch.no_grad():
            with model.blocks[0].attn.register_forward_pre_hook(watch):
                model(x)
            inside = seen[0]() is not None
        after = seen[0]() is not None
    finally:
        gc.enable()
    assert inside == after == (keep == "inputs")
    if keep == "inputs":
        assert rec.maps[0].x is seen[0]()
    else:
        for forbidden in (lambda m: m.x, lambda m: m.call, lambda m: m.verify()):
            with pytest.raises(RecorderError, match=r"let go.*keep=\"inputs\""):
                forbidden(rec.maps[0])


def test_maps_that_are_kept_let_go_of_all_tensors_of_the_call_however_they_were_given() -> None:
    attn, given = Attention(16, 4), {"x": torch.randn(2, 5, 16), "attn_mask": torch.zeros(5, 5)}
    held = [weakref.ref(tensor) for tensor in given.values()]
    with AttentionRecorder(attn, keep="maps") as rec, torch.no_grad():
        attn(**given)
    given.clear()
    assert [tensor() for tensor in held] == [None, None]
    assert rec.maps[0].shape == (2, 4, 5, 5)


def test_a_call_that_its_recipe_declines_is_kept_after_one_that_it_describes(monkeypatch: pytest.MonkeyPatch) -> None:
    own_registers(monkeypatch)
    attn, x, mask = declining(), torch.randn(2, 5, 16), torch.randn(5, 5)
    with AttentionRecorder(attn, keep="maps", passes="all") as rec, torch.no_grad():
        for given in (None, mask, None, mask):
            attn(x, attn_mask=given)
    q, k, _ = attn.qkv(x).unflatten(-1, (3, 4, 4)).permute(2, 0, 3, 1, 4)
    for maps, added in zip(rec.passes, (0.0, mask, 0.0, mask), strict=True):
        torch.testing.assert_close(maps[0][...], (q @ k.mT / 2 + added).softmax(-1), rtol=0, atol=1e-6)
