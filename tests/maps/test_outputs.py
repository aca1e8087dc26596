"""What heads add to an output sums to it, and each part is what the definition says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from packaging.version import Version
from support.models import ANY_DTYPE, B, C, D, H, N, enliven, plain, randomise, tiny_double
from support.modes import Functions
from timm.layers import Attention
from timm.layers.diff_attention import DiffAttention
from timm.models.cait import ClassAttn, TalkingHeadAttn
from timm.models.convit import GPSA
from timm.models.efficientvit_msra import CascadedGroupAttention
from timm.models.eva import EvaAttention
from timm.models.levit import Attention as LevitAttention
from timm.models.swin_transformer import WindowAttention
from timm.models.twins import LocallyGroupedAttn
from timm.models.volo import OutlookAttention
from timm.models.xcit import XCA
from torch import Tensor, nn

from hookattn import AttentionRecorder, StaleMapError, TokenError, UnreadableError


def recorded(model: nn.Module, *args: Any, **options: Any) -> Any:
    with AttentionRecorder(model, **options) as rec, torch.no_grad():
        model(*args)
    return rec.maps


def ran(model: nn.Module, module: nn.Module, x: Tensor) -> Tensor:
    """What a module of a model puts out."""
    found = []
    handle = module.register_forward_hook(lambda _, args, out: found.append(out))
    with torch.no_grad():
        model(x)
    handle.remove()
    output: Tensor = found[0]
    return output


def without_maps(model: nn.Module, module: nn.Module, x: Tensor) -> Tensor:
    """The same where all that softmaxes and fused attention put out is zero."""

    def see(func: Any, out: Any, args: Any, kwargs: Any) -> Any:
        name = getattr(func, "__name__", "")
        return torch.zeros_like(out) if name in ("softmax", "scaled_dot_product_attention") else None

    given = []
    handle = module.register_forward_pre_hook(lambda _, args, kwargs: given.append((args, kwargs)), with_kwargs=True)
    with torch.no_grad():
        model(x)
    handle.remove()
    with torch.no_grad(), Functions(see):
        output: Tensor = module.forward(*given[0][0], **given[0][1])
    return output


@pytest.mark.parametrize("name", ANY_DTYPE)
def test_parts_sum_to_the_output(name: str) -> None:
    model, x = tiny_double(name)
    for key, m in recorded(model, x).items():
        module = model.get_submodule(key)
        whole, nothing = ran(model, module, x), without_maps(model, module, x)
        parts = m.output()
        assert parts.shape == (*m.effective.shape[:3], whole.shape[-1])
        torch.testing.assert_close(parts.sum(1) + nothing, whole, rtol=0, atol=1e-11)
        assert parts.abs().amax((0, 2, 3)).min() > 1e-3


def test_each_part_is_that_of_the_definition() -> None:
    model: Any = plain()
    x = torch.randn(B, N, C).double()
    m, attn = recorded(model, x)[0], model[0]
    q, k, v = attn.qkv(x).reshape(B, N, 3, H, D).permute(2, 0, 3, 1, 4)
    attention = (q @ k.mT * D**-0.5).softmax(-1)
    for h in range(H):
        expected = attention[:, h] @ v[:, h] @ attn.proj.weight[:, h * D : h * D + D].T
        torch.testing.assert_close(m.output()[:, h], expected)
        torch.testing.assert_close(m.output(h)[:, 0], expected)
    torch.testing.assert_close(m.output([3, 1], [5, 2]), m.output()[:, [3, 1]][:, :, [5, 2]])
    torch.testing.assert_close(m.output(slice(1, 3), 7), m.output()[:, 1:3, 7])
    torch.testing.assert_close(m.output(queries=slice(4, None, 3)), m.output()[:, :, 4::3])


MODULES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "class attention": (lambda: ClassAttn(24, 3), (2, 7, 24)),
    "windows": (lambda: WindowAttention(24, 3, window_size=(3, 3)), (8, 9, 24)),
    "windows that are padded": (lambda: LocallyGroupedAttn(24, 3, ws=3), (2, 16, 24)),
    "an activation of channels": (lambda: LevitAttention(24, 8, 3, resolution=(3, 3), use_conv=True), (2, 24, 3, 3)),
    "a cascade of heads": (
        lambda: CascadedGroupAttention(24, 8, 3, attn_ratio=1, resolution=4, kernels=(3, 3, 3)),
        (2, 24, 4, 4),
    ),
    "norms in between": (lambda: EvaAttention(24, 3, norm_layer=nn.LayerNorm, scale_norm=True), (2, 7, 24)),
    "differential": (lambda: DiffAttention(24, 3, depth=2, norm_layer=nn.LayerNorm, scale_norm=True), (2, 7, 24)),
}


def called(model: nn.Module, x: Tensor) -> Any:
    return (x, (4, 4)) if isinstance(model, LocallyGroupedAttn) else (x,)


def tokens_of(y: Tensor, like: Tensor) -> Tensor:
    """An output as (batch, tokens, dim)."""
    return y.flatten(2).mT if y.dim() == 4 else y


@pytest.mark.parametrize("kind", MODULES)
def test_parts_sum_to_the_output_whatever_comes_after_the_map(kind: str) -> None:
    torch.manual_seed(0)
    build, size = MODULES[kind]
    model, x = randomise(build()).double(), torch.randn(*size).double()
    model.train(mode=False)
    args = called(model, x)

    def see(func: Any, out: Any, args: Any, kwargs: Any) -> Any:
        name = getattr(func, "__name__", "")
        return torch.zeros_like(out) if name in ("softmax", "scaled_dot_product_attention") else None

    with torch.no_grad():
        whole = model(*args)
        with Functions(see):
            nothing = model(*args)
    m = recorded(model, *args)[0]
    parts = m.output().sum(1)
    expected = tokens_of(whole - nothing, parts)
    if kind == "windows that are padded":  # rows and columns of zeros around 4 x 4 tokens, in windows of 3 x 3
        parts = parts.view(2, 2, 2, 3, 3, 24).transpose(2, 3).reshape(2, 6, 6, 24)
        assert (parts[:, 4:] == 0).all()
        parts = parts[:, :4, :4].flatten(1, 2)
    torch.testing.assert_close(parts, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("build", [lambda: TalkingHeadAttn(24, 3), lambda: GPSA(24, 3)], ids=["talking heads", "gated sum"])
def test_parts_of_mixed_maps_are_those_of_the_definition(build: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model: Any = randomise(build()).double().eval()
    m = recorded(model, torch.randn(2, 16, 24).double())[0]
    expected = torch.einsum("bhqk,bhke,dhe->bhqd", m.effective[...], m.v[...], model.proj.weight.unflatten(1, (3, -1)))
    torch.testing.assert_close(m.output(), expected)
    with torch.no_grad():
        whole = model(m.x)
    torch.testing.assert_close(m.output().sum(1) + model.proj.bias, whole)


def test_norms_divide_by_what_they_do_for_all_heads() -> None:
    torch.manual_seed(0)
    model: Any = randomise(EvaAttention(24, 3, norm_layer=nn.LayerNorm, scale_norm=True)).double().eval()
    m = recorded(model, torch.randn(2, 7, 24).double())[0]
    brought = m[...] @ m.v[...]
    scale = brought.transpose(1, 2).flatten(2).var(-1, correction=0, keepdim=True).add(model.norm.eps).sqrt()
    for h in range(3):
        alone = torch.zeros_like(brought)
        alone[:, h] = brought[:, h]
        alone = alone.transpose(1, 2).flatten(2)
        normed = (alone - alone.mean(-1, keepdim=True)) / scale * model.norm.weight
        torch.testing.assert_close(m.output()[:, h], normed @ model.proj.weight.T)


class LeadsLast(nn.Module):
    """Tokens first, then images, as `nn.MultiheadAttention` has it; what comes after is told."""

    def __init__(self, after: Any = lambda y: y) -> None:
        super().__init__()
        self.qkv, self.out, self.after = nn.Linear(12, 36), nn.Linear(12, 10), after

    def forward(self, x: Tensor) -> Any:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 6)).permute(2, 1, 3, 0, 4)
        y = ((q @ k.mT).softmax(-1) @ v).permute(2, 0, 1, 3).flatten(2)
        return self.after(self.out(y))


def attending(after: Any) -> nn.Module:
    class OwnAttention(LeadsLast):
        pass

    return OwnAttention(after)


AFTER: dict[str, Callable[[Tensor], Any]] = {
    "nothing": lambda y: y,
    "channels first": lambda y: y.permute(1, 2, 0),
    "a gate": lambda y: y * torch.linspace(-1, 1, 10).to(y),
    "one of several outputs": lambda y: {"about": torch.ones(3), "y": y},
}


@pytest.mark.parametrize("kind", AFTER)
def test_places_are_found_wherever_they_stand(kind: str) -> None:
    torch.manual_seed(0)
    model, x = randomise(attending(AFTER[kind])).double(), torch.randn(5, 3, 12).double()
    parts = recorded(model, x)[0].output()
    q, k, v = model.qkv(x).unflatten(-1, (3, 2, 6)).permute(2, 1, 3, 0, 4)
    each = torch.einsum("bhqk,bhke,dhe->bhqd", (q @ k.mT).softmax(-1), v, model.out.weight.unflatten(1, (2, 6)))
    if kind == "a gate":
        each = each * torch.linspace(-1, 1, 10).double()
    torch.testing.assert_close(parts, each)


REFUSED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str]] = {
    "channels": (lambda: XCA(24, 3), (2, 7, 24), "attends to channels"),
    "places that are mixed": (lambda: OutlookAttention(24, 3), (2, 4, 4, 24), "mixes places"),
    "an activation over heads": (lambda: attending(lambda y: y.relu()), (5, 3, 12), "one by one"),
    "a norm by hand": (lambda: attending(lambda y: y / y.norm(dim=-1, keepdim=True)), (5, 3, 12), "one by one"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_does_not_sum_is_refused_by_name(kind: str) -> None:
    torch.manual_seed(0)
    build, size, reason = REFUSED[kind]
    model, x = randomise(build()).double(), torch.randn(*size).double()
    model.train(mode=False)
    with pytest.raises(UnreadableError, match=reason):
        recorded(model, x)[0].output()


def test_queries_are_chosen_like_rows() -> None:
    model, x = tiny_double("vit_registers")
    m = recorded(model, x)[0]
    torch.testing.assert_close(m.output(queries="cls"), m.output()[:, :, 0])
    torch.testing.assert_close(m.output(queries=(1, 2)), m.output()[:, :, m.query_tokens.index((1, 2))])
    swin: Any = timm.create_model("swin_tiny_patch4_window7_224", img_size=64, window_size=4, depths=(1,), num_heads=(3,))
    with pytest.raises(TokenError, match="by number"):
        recorded(swin.eval(), torch.randn(1, 3, 64, 64))[0].output(queries=(1, 2))


def test_a_model_in_half_precision_has_parts_in_float32() -> None:
    torch.manual_seed(0)
    model, x = randomise(Attention(24, 3)).eval(), torch.randn(2, 7, 24)
    expected = recorded(model, x)[0].output()
    found = recorded(model.bfloat16(), x.bfloat16())[0].output()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0, atol=0.1)
    assert recorded(model, x.bfloat16(), dtype=torch.float16)[0].output().dtype == torch.float16


def test_dropout_is_left_out_and_the_model_left_as_it_was() -> None:
    torch.manual_seed(0)
    model: Any = randomise(EvaAttention(24, 3, norm_layer=nn.LayerNorm, scale_norm=True, attn_drop=0.5, proj_drop=0.5)).double()
    x = torch.randn(2, 7, 24).double()
    m = recorded(model.train(), x)[0]
    before, state = torch.get_rng_state(), {k: v.clone() for k, v in model.state_dict().items()}
    parts = m.output()
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert torch.equal(parts, m.output())
    torch.testing.assert_close(parts, recorded(model.eval(), x)[0].output())


def test_parts_are_in_the_graph_where_maps_are() -> None:
    with AttentionRecorder(model := plain(), detach=False) as rec:
        model(x := torch.randn(B, N, C).double().requires_grad_())
    (grad,) = torch.autograd.grad(rec.maps[0].output(2).sum(), x)
    assert grad.abs().sum() > 0
    assert not recorded(plain(), x.detach())[0].output().requires_grad


def test_what_is_stale_is_not_read() -> None:
    m = recorded(model := plain(), torch.randn(B, N, C).double())[0]
    with torch.no_grad():
        next(model.parameters()).add_(1)
    for read in (m.output, lambda: m.effective[...]):
        with pytest.raises(StaleMapError):
            read()


@pytest.mark.parametrize("name", ["cait_xxs24_224", "convit_tiny"])
def test_all_layers_of_a_model_sum(name: str) -> None:
    if name == "convit_tiny" and Version(timm.__version__) < Version("1.0.31"):
        pytest.skip("its positions are float32 there")
    torch.manual_seed(0)
    x = torch.randn(2, 3, 32, 32)
    model: Any = enliven(timm.create_model(name, img_size=32, embed_dim=48, depth=2, num_heads=4), x).double()
    x = x.double()
    for key, m in recorded(model, x).items():
        module: Any = model.get_submodule(key)
        torch.testing.assert_close(m.output().sum(1) + module.proj.bias, ran(model, module, x))
