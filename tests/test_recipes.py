"""Recipe == replay == the module's own unfused softmax, for every class that has a recipe."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import reference
from support.inside import call_of, find_recipe, own_registers, refile, registered, replay, replay_of
from support.models import ANY_DTYPE, TINY, randomise, tiny
from support.oracle import softmaxes_of, unfused
from timm.layers import Attention
from torch import Tensor, nn

from hookattn import AttentionMap, AttentionRecorder, UnfaithfulMapError, recipe
from hookattn.testing import check_recipe


def record(model: nn.Module, x: Tensor, **options: Any) -> list[AttentionMap]:
    with AttentionRecorder(model, **options) as rec, torch.no_grad():
        model(x)
    return list(rec.maps.values())


@torch.no_grad()
def own_softmax(m: AttentionMap) -> Tensor:
    """What the module itself forms on the arguments it was called with, unfused."""
    module, args, kwargs = call_of(m)
    return softmaxes_of(module, *args, **kwargs)[0]


@pytest.mark.parametrize("name", TINY)
def test_recipe_is_replay_is_the_unfused_softmax(name: str) -> None:
    model, x = tiny(name)
    maps = record(model, x)
    assert len(maps) == sum(find_recipe(module) is not None for module in model.modules()) > 0
    for m in maps:
        torch.testing.assert_close(m[...], own_softmax(m), rtol=0, atol=2e-6)
        torch.testing.assert_close(m[...], replay_of(m), rtol=0, atol=1e-6)
        torch.testing.assert_close(m[...].sum(-1), torch.ones(m.shape[:3]), rtol=0, atol=1e-6)
        assert m.shape == m[...].shape
        assert m.dtype == m[...].dtype == torch.float32


@pytest.mark.parametrize("name", TINY)
def test_maps_put_back_leave_the_output_as_it_was(name: str) -> None:
    model, x = tiny(name)
    with AttentionRecorder(model) as rec:
        model(x)
    assert 0 <= rec.verify() < 1e-4


@pytest.mark.parametrize("name", ANY_DTYPE)
def test_in_bfloat16_maps_are_nearer_to_float64_than_the_unfused_path(name: str) -> None:
    model, x = tiny(name)
    half = copy.deepcopy(model).bfloat16()
    with AttentionRecorder(half) as rec, torch.no_grad():
        half(x.bfloat16())
    for m in rec.maps.values():
        module, *given = call_of(m)
        exact = call_softmaxes(copy.deepcopy(module).double(), *as_double(tuple(given)))
        eager = call_softmaxes(module, *given)
        assert m.dtype == torch.float32
        assert rms(m[...] - exact) <= rms(eager - exact)  # the largest error is that of q and k themselves, in both


@torch.no_grad()
def call_softmaxes(module: nn.Module, args: Any, kwargs: Any) -> Tensor:
    with unfused(module) as maps:
        module(*args, **kwargs)
    return maps[0].double()


def as_double(value: Any) -> Any:
    return torch.utils._pytree.tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, value)


def rms(difference: Tensor) -> float:
    return float(difference.pow(2).mean().sqrt())


@pytest.mark.parametrize("name", ANY_DTYPE)
def test_a_float64_model_has_float64_maps(name: str) -> None:
    model, x = tiny(name)
    model, x = model.double(), x.double()
    for m in record(model, x):
        assert m.dtype == torch.float64
        torch.testing.assert_close(m[...], own_softmax(m), rtol=0, atol=1e-14)


# Masks, gates and widths that no registered model uses, but every one of these classes takes


def attention_modules() -> dict[str, nn.Module]:
    """Modules of the timm at hand, with those of the options that it knows."""
    from timm.layers import Attention, AttentionRope, LayerNorm
    from timm.models import vision_transformer
    from timm.models.eva import EvaAttention

    def made(cls: Any, *args: int, **options: Any) -> nn.Module:
        known = inspect.signature(cls).parameters
        module: nn.Module = cls(*args, **{name: value for name, value in options.items() if name in known})
        return module

    norms = {"norm_layer": LayerNorm, "qk_norm": True, "gated": True}
    works = hasattr(EvaAttention(32, 4, scale_norm=False), "head_dim")  # timm 1.0.24 and before raise on qk_norm
    eva = norms if works else {"norm_layer": LayerNorm}
    modules = {
        "attention": made(Attention, 32, 4, qkv_bias=True, scale_norm=True, attn_head_dim=12, **norms),
        "rope_fused": made(AttentionRope, 32, 4, **norms),
        "rope_gqa": made(AttentionRope, 32, 4, qkv_fused=False, num_kv_heads=2, rotate_half=True, **norms),
        "eva_fused": made(EvaAttention, 32, 4, **eva),
        "eva_bias_separate": made(EvaAttention, 32, 4, qkv_bias_separate=True, norm_layer=LayerNorm),
        "eva_split": made(EvaAttention, 32, 4, qkv_fused=False, **eva),
        "parallel": vision_transformer.ParallelScalingBlock(32, 4, qkv_bias=True, qk_norm=True),
    }
    if hasattr(vision_transformer, "DiffParallelScalingBlock"):
        from timm.layers.diff_attention import DiffAttention

        modules["diff_attention"] = DiffAttention(32, 2, qkv_bias=True, qk_norm=True)
        modules["diff_parallel"] = vision_transformer.DiffParallelScalingBlock(32, 2, qkv_bias=True, qk_norm=True)
    return modules


def masks(tokens: int, batch: int) -> dict[str, dict[str, Any]]:
    square = torch.rand(tokens, tokens) > 0.3
    square.fill_diagonal_(True)
    each = torch.rand(batch, 1, tokens, tokens) > 0.3
    each[..., 0] = True
    return {
        "none": {},
        "bool": {"attn_mask": square},
        "bool_per_image": {"attn_mask": each},
        "float": {"attn_mask": torch.randn(batch, 1, tokens, tokens)},
        "minus_infinity": {"attn_mask": torch.zeros(tokens, tokens).masked_fill(~square, float("-inf"))},
        "causal": {"is_causal": True},
    }


CASES = [
    (name, mask)
    for name, module in attention_modules().items()
    for mask, given in masks(2, 1).items()
    if given.keys() <= inspect.signature(module.forward).parameters.keys()
]


@pytest.mark.parametrize(("name", "mask"), CASES)
def test_masks_norms_gates_and_head_widths(name: str, mask: str) -> None:
    module = randomise(attention_modules()[name]).eval()
    x, given = torch.randn(2, 9, 32), masks(9, 2)[mask]
    if "rope" in name or name.startswith("eva"):
        given = {**given, "rope": torch.randn(8, 16)}
    with AttentionRecorder(module) as rec, torch.no_grad(), unfused(module) as expected:
        module(x, **given)
    m = rec.maps[0]
    torch.testing.assert_close(m[...], expected[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(m[...], replay_of(m), rtol=0, atol=1e-6)
    torch.testing.assert_close(m[:, 1:, 3:7], expected[0][:, 1:, 3:7], rtol=0, atol=1e-6)
    torch.testing.assert_close(m[1, 0, 5], expected[0][1, 0, 5], rtol=0, atol=1e-6)
    m.verify()


def test_beit_adds_its_own_and_the_shared_bias() -> None:
    from timm.models.beit import Attention

    module = randomise(Attention(32, 4, qkv_bias=True, qkv_bias_separate=True, window_size=(2, 3))).eval()
    shared = torch.randn(1, 4, 7, 7)
    with AttentionRecorder(module) as rec, torch.no_grad(), unfused(module) as expected:
        module(torch.randn(2, 7, 32), shared_rel_pos_bias=shared)
    torch.testing.assert_close(rec.maps[0][...], expected[0], rtol=0, atol=1e-6)
    check_recipe(module, torch.randn(2, 7, 32), shared_rel_pos_bias=shared)


MULTIHEAD: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "batch_second": ({"batch_first": False}, {}),
    "no_bias": ({"bias": False}, {}),
    "bias_kv": ({"add_bias_kv": True}, {}),
    "zero_attn": ({"add_zero_attn": True}, {}),
    "bias_kv_zero_attn_masked": ({"add_bias_kv": True, "add_zero_attn": True}, {"attn_mask": "bool", "key_padding_mask": True}),
    "other_widths": ({"kdim": 20, "vdim": 12}, {}),
    "bool_mask": ({}, {"attn_mask": "bool"}),
    "float_mask": ({}, {"attn_mask": "float"}),
    "mask_per_head": ({}, {"attn_mask": "heads"}),
    "padding": ({}, {"key_padding_mask": True}),
    "padding_and_mask": ({}, {"attn_mask": "bool", "key_padding_mask": True}),
    "causal_hint": ({}, {"attn_mask": "causal", "is_causal": True}),
}


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("name", MULTIHEAD)
def test_multihead_attention_gives_the_weights_pytorch_gives(name: str, need_weights: bool) -> None:
    options, asked = MULTIHEAD[name]
    options = {"batch_first": True, **options}
    module = randomise(nn.MultiheadAttention(32, 4, **options)).eval()
    q, k, v = torch.randn(2, 5, 32), torch.randn(2, 7, options.get("kdim", 32)), torch.randn(2, 7, options.get("vdim", 32))
    if asked.get("is_causal"):
        k, v = k[:, :5], v[:, :5]
    padding = torch.zeros(2, k.shape[1], dtype=torch.bool)
    padding[1, 4:] = True
    mask = {
        "bool": torch.rand(5, 7) > 0.7,
        "float": torch.randn(5, 7),
        "heads": torch.randn(8, 5, 7),
        "causal": torch.ones(5, 5, dtype=torch.bool).triu(1),
    }
    given: dict[str, Any] = {**asked}
    if "attn_mask" in asked:
        given["attn_mask"] = mask[asked["attn_mask"]]
    if "key_padding_mask" in asked:
        given["key_padding_mask"] = padding
    if not options["batch_first"]:
        q, k, v = (t.transpose(0, 1) for t in (q, k, v))
    with torch.no_grad():
        _, expected = module(q, k, v, average_attn_weights=False, **given)
    with AttentionRecorder(module) as rec:
        module(q, k, v, need_weights=need_weights, **given)
    m = rec.maps[0]
    torch.testing.assert_close(m[...], expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(m[...], replay_of(m), rtol=0, atol=1e-6)
    m.verify()


def test_multihead_attention_without_a_batch_axis_has_a_batch_of_one() -> None:
    module = randomise(nn.MultiheadAttention(32, 4)).eval()
    x = torch.randn(5, 32)
    with AttentionRecorder(module) as rec, torch.no_grad():
        _, expected = module(x, x, x, average_attn_weights=False)
    torch.testing.assert_close(rec.maps[0][...], expected.unsqueeze(0), rtol=0, atol=1e-6)


def test_a_transformer_encoder_layer_does_not_go_around_the_hooks() -> None:
    layer = nn.TransformerEncoderLayer(32, 4, batch_first=True).eval()  # has a fast path that calls no module
    with AttentionRecorder(layer) as rec, torch.inference_mode():
        layer(torch.randn(2, 5, 32))
    assert rec.verify() < 1e-5


def test_a_row_that_is_closed_throughout_is_what_sdpa_makes_of_it() -> None:
    from timm.layers import Attention

    module = randomise(Attention(32, 4)).eval()
    mask = torch.rand(6, 6) > 0.5
    mask[2] = False
    with AttentionRecorder(module) as rec:
        module(torch.randn(2, 6, 32), attn_mask=mask)
    m = rec.maps[0]
    assert torch.equal(m[:, :, 2], torch.zeros(2, 4, 6))
    m.verify()


# Wrapped projections


class LowRank(nn.Module):
    """A LoRA-like wrapper: the layer's output plus a low-rank one."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer
        self.down, self.up = nn.Linear(layer.in_features, 2), nn.Linear(2, layer.out_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.up(self.down(x))


class Doubled(nn.Module):
    """A parametrisation."""

    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def wrap_lora(module: Any) -> None:
    module.qkv = LowRank(module.qkv)


def wrap_parametrised(module: Any) -> None:
    nn.utils.parametrize.register_parametrization(module.qkv, "weight", Doubled())


def wrap_hooked(module: Any) -> None:
    module.qkv.register_forward_hook(lambda _module, _args, y: y + 0.3 * y.sin())


def wrap_pre_hooked(module: Any) -> None:
    module.qkv.register_forward_pre_hook(lambda _, args: (args[0].tanh(),))


def wrap_patched(module: Any) -> None:
    plain = module.qkv.forward
    module.qkv.forward = lambda x: plain(x) ** 2


def wrap_subclass(module: Any) -> None:
    class Cubed(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) ** 3

    module.qkv.__class__ = Cubed


@pytest.mark.parametrize("wrap", [wrap_lora, wrap_parametrised, wrap_hooked, wrap_pre_hooked, wrap_patched, wrap_subclass])
def test_a_wrapped_projection_is_called_not_cut(wrap: Any) -> None:
    model, x = tiny("vit_qk_norm")
    for block in model.blocks:
        wrap(block.attn)
    randomise(model, 0.1)
    for m in record(model, x):
        torch.testing.assert_close(m[...], own_softmax(m), rtol=0, atol=1e-6)


def test_a_hook_of_somebody_else_that_changes_x_is_seen() -> None:
    model, x = tiny("vit")
    for block in model.blocks:
        block.attn.register_forward_pre_hook(lambda _, args: (args[0] * 3,))
    maps = record(model, x)
    with torch.no_grad(), unfused(model) as expected:
        model(x)
    torch.testing.assert_close(maps[0][...], expected[0], rtol=0, atol=1e-6)


# Mutations: every term that a recipe could leave out


def mutations() -> dict[str, tuple[str, Any]]:
    """What is switched off while the recipe runs, and on which model."""

    def zero(attribute: str) -> Any:
        def mutate(module: Any, patch: pytest.MonkeyPatch) -> None:
            parts = attribute.split(".")
            for part in parts[:-1]:
                module = getattr(module, part)
            patch.setitem(module._parameters, parts[-1], nn.Parameter(torch.zeros_like(getattr(module, parts[-1]))))

        return mutate

    def identity(*attributes: str) -> Any:
        def mutate(module: Any, patch: pytest.MonkeyPatch) -> None:
            for attribute in attributes:
                patch.setitem(module._modules, attribute, nn.Identity())

        return mutate

    def nothing(attribute: str) -> Any:
        return lambda module, patch: patch.setitem(module._modules, attribute, None)

    def value(attribute: str, changed: Any) -> Any:
        def mutate(module: Any, patch: pytest.MonkeyPatch) -> None:
            patch.setattr(module, attribute, changed)
            if attribute == "scale":
                patch.setattr(module, "fused_attn", False)  # fused, `scale` is not looked at

        return mutate

    def no_table(module: Any, patch: pytest.MonkeyPatch) -> None:
        patch.setitem(module._parameters, "relative_position_bias_table", None)

    return {
        "vit: bias": ("vit", zero("qkv.bias")),
        "vit: scale": ("vit", value("scale", 1.0)),
        "vit: query norm": ("vit_qk_norm", identity("q_norm")),
        "vit: key norm": ("vit_qk_norm", identity("k_norm")),
        "rope: scale": ("rope_axial", value("scale", 1.0)),
        "rope: bias": ("rope_axial", zero("qkv.bias")),
        "rope: norms": ("rope_gqa", identity("q_norm", "k_norm")),
        "rope: query bias": ("rope_gqa", zero("q_proj.bias")),
        "eva: layout": ("rope_half", value("rotate_half", False)),
        "eva: scale": ("eva_fused", value("scale", 1.0)),
        "eva: query bias": ("eva_fused", zero("q_bias")),
        "eva: split query bias": ("eva_split", zero("q_proj.bias")),
        "beit: query bias": ("beit", zero("q_bias")),
        "beit: scale": ("beit", value("scale", 1.0)),
        "beit: table": ("beit", no_table),
        "relpos: scale": ("relpos", value("scale", 1.0)),
        "relpos: query norm": ("relpos_qk_norm", identity("q_norm")),
        "relpos: relative bias": ("relpos", nothing("rel_pos")),
        "parallel: scale": ("parallel", value("scale", 1.0)),
        "parallel: norm before": ("parallel", identity("in_norm")),
        "parallel: norms": ("parallel_qk_norm", identity("q_norm", "k_norm")),
        "differential: scale": ("differential", value("scale", 1.0)),
        "differential parallel: norm before": ("differential_parallel", identity("in_norm")),
    }


@pytest.mark.parametrize("mutation", [m for m, (name, _) in mutations().items() if name in TINY])
def test_a_recipe_that_drops_a_term_is_caught(mutation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipe sees a module with one term taken out; the oracles see the module as it is."""
    name, mutate = mutations()[mutation]
    model, x = tiny(name)
    m = record(model, x)[0]
    expected = own_softmax(m)
    module, *_ = call_of(m)
    for class_name in (c for c in registered() if c == f"{type(module).__module__}.{type(module).__qualname__}"):
        whole = registered()[class_name]

        def without(self: Any, *args: Any, **kwargs: Any) -> Any:
            with pytest.MonkeyPatch.context() as patch:
                mutate(self, patch)
                return whole(self, *args, **kwargs)  # noqa: B023

        refile(monkeypatch, class_name, without)
    assert (m[...] - expected).abs().max() > 1e-3
    assert (m[...] - replay_of(m)).abs().max() > 1e-3
    with pytest.raises(UnfaithfulMapError, match="is not the one its output came from"):
        m.verify()


@pytest.mark.parametrize("argument", ["rope", "attn_mask", "shared_rel_pos_bias", "shared_rel_pos"])
def test_a_recipe_that_drops_an_argument_is_caught(argument: str) -> None:
    name = {"rope": "rope_axial", "shared_rel_pos_bias": "beit_shared", "shared_rel_pos": "relpos_shared"}.get(argument, "vit")
    model, x = tiny(name)
    module = next(m for m in model.modules() if find_recipe(m))
    received: dict[str, Any] = {}
    watching = module.register_forward_pre_hook(lambda _, a, kw: received.update(kw, x=a[0]), with_kwargs=True)
    with watching, torch.no_grad():
        model(x)
    x = received.pop("x")
    if argument == "attn_mask":
        received["attn_mask"] = torch.randn(x.shape[1], x.shape[1])
    with AttentionRecorder(module) as rec:
        module(x, **received)
    m = rec.maps[0]
    assert received[argument] is not None
    without = replay(module, x, **{**received, argument: None})
    torch.testing.assert_close(m[...], replay_of(m), rtol=0, atol=1e-6)
    assert (m[...] - without).abs().max() > 1e-3


# Recipes of users


class TheirAttention(nn.Module):
    """Somebody's own attention, with a temperature."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads, self.scale = num_heads, (dim // num_heads) ** -0.5
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.temperature = nn.Parameter(torch.ones(num_heads, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q * self.temperature, k, v, scale=self.scale)
        return self.proj(y.transpose(1, 2).reshape(b, n, c))


def test_a_user_files_a_recipe_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    from hookattn import QK, project

    own_registers(monkeypatch)
    module = randomise(TheirAttention(32, 4)).eval()
    x = torch.randn(2, 6, 32)
    with pytest.raises(Exception, match=r"has no recipe; file one with @hookattn.recipe\("):
        check_recipe(module, x)

    @recipe(TheirAttention)
    def theirs(self: Any, x: Tensor) -> QK:
        q, k = project(self.qkv, x, "b n (parts h d) -> parts b h n d", parts=2, of=3, h=self.num_heads)
        return QK(q, k, scale=self.scale * self.temperature)

    check_recipe(module, x)
    with pytest.raises(ValueError, match="has a recipe already"):
        recipe(TheirAttention)(theirs)


@pytest.mark.parametrize("wrong", ["temperature", "bias", "scale"])
def test_check_recipe_catches_a_wrong_recipe(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from hookattn import QK

    own_registers(monkeypatch)

    @recipe(TheirAttention)
    def theirs(self: Any, x: Tensor) -> QK:
        y = F.linear(x, self.qkv.weight, None if wrong == "bias" else self.qkv.bias)
        q, k, _ = y.reshape(*x.shape[:2], 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        scale = 1.0 if wrong == "scale" else self.scale
        return QK(q, k, scale=scale if wrong == "temperature" else scale * self.temperature)

    with pytest.raises(UnfaithfulMapError):
        check_recipe(TheirAttention(32, 4), torch.randn(2, 6, 32))


class Holder(nn.Module):
    """Another version of a class, which holds the attention in place of being it."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x)  # type: ignore[no-any-return]


def test_a_recipe_may_be_one_for_some_modules_of_a_class_and_for_some_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    from hookattn import QK

    own_registers(monkeypatch)
    calls = []

    @recipe(Holder, where=lambda module: hasattr(module, "is_plain"))
    def held(self: Any, x: Tensor) -> Any:
        calls.append(x)
        q, k, _ = self.attention.qkv(x).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        return QK(q, k) if self.is_plain else NotImplemented

    model, x = nn.Sequential(randomise(Holder())).eval(), torch.randn(2, 7, 32)
    assert AttentionRecorder(model).layers == ["0.attention"]
    assert find_recipe(model[0]) is None
    maps = []
    for model[0].is_plain in (True, False):
        assert AttentionRecorder(model).layers == ["0", "0.attention"]
        for keep in ("inputs", "maps"):
            with AttentionRecorder(model, "0", keep=keep) as rec, torch.no_grad():
                model(x)
            assert rec.maps[0].shape == (2, 4, 7, 7)
            maps.append(rec.maps[0][...])
    assert calls
    for m in maps[1:]:
        torch.testing.assert_close(m, maps[0], rtol=0, atol=1e-6)


def test_a_derived_class_is_read_by_the_recipe_of_its_base() -> None:
    from timm.layers import Attention

    class Derived(Attention):  # type: ignore[misc]
        pass

    assert find_recipe(Derived(32, 4)) is find_recipe(Attention(32, 4))


def test_the_map_is_the_definition() -> None:
    from hookattn import QK

    q, k, bias, mask = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 7, 4), torch.randn(3, 5, 7), torch.rand(2, 1, 5, 7) > 0.4
    mask[1, 0, 3] = False
    got = QK(q, k, scale=0.7, bias=bias, mask=mask).probabilities()
    torch.testing.assert_close(got.double(), reference.attention(q, k, 0.7, bias, mask), rtol=0, atol=1e-6)
    narrow = QK(q, k, scale=0.7, bias=bias, mask=mask).narrow(slice(1, 2), slice(None, None, 2), torch.tensor([4, 0]))
    assert torch.equal(narrow.probabilities(), got[1:2, ::2][:, :, [4, 0]])
