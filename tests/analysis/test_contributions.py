"""Contributions against the definition: every vector A_ij v_j W held at once, in float64."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.inside import read_in_chunks
from support.models import ANY_DTYPE, TINY, B, C, N, plain, randomise, tiny_double
from support.modes import Operators
from timm.layers import Attention
from timm.models.cait import TalkingHeadAttn
from timm.models.convit import GPSA
from torch import Tensor, nn

from hookattn import AttentionRecorder, RecorderError, UnreadableError
from hookattn.analysis import contributions, entropy, rollout

# each head has a norm of its own, or there is a residual
MORE = {"differential", "differential_parallel", "parallel", "parallel_qk_norm"}
PROJECTED = [name for name in ANY_DTYPE if name not in MORE]


def recorded(model: nn.Module, x: Tensor, **options: Any) -> Any:
    with AttentionRecorder(model, **options) as rec, torch.no_grad():
        model(x)
    return rec.maps


def vectors(attention: Tensor, values: Tensor, module: Any) -> Tensor:
    """(batch, heads, queries, keys, dim): what each head brings of each key to each query."""
    (batch, heads, queries, keys), width = attention.shape, values.shape[-1]
    each = torch.zeros(batch, heads, queries, keys, heads * width, dtype=torch.float64)
    for h in range(heads):
        each[:, h, :, :, h * width : h * width + width] = attention[:, h, :, :, None] * values[:, h, None]
    if isinstance(norm := getattr(module, "norm", None), nn.LayerNorm):  # divides by the deviation of all of them
        scale = each.sum((1, 3)).var(-1, correction=0, keepdim=True).add(norm.eps).sqrt()
        each = (each - each.mean(-1, keepdim=True)) / scale[:, None, :, None] * norm.weight
    return each @ module.proj.weight.T


def defined(each: Tensor, kind: str, heads: str | None) -> Tensor:
    """(batch, heads or 1, queries, keys)."""
    whole = each.sum((1, 3))
    each = each.sum(1, keepdim=True) if heads == "sum" else each
    if kind == "norm":
        return each.square().sum(-1).sqrt()
    return (each * (whole / whole.norm(dim=-1, keepdim=True))[:, None, :, None]).sum(-1)


KINDS = [(kind, heads) for kind in ("norm", "projection") for heads in (None, "sum")]


@pytest.mark.parametrize("name", PROJECTED)
@pytest.mark.parametrize(("kind", "heads"), KINDS)
def test_they_are_those_of_the_definition(name: str, kind: Any, heads: Any) -> None:
    model, x = tiny_double(name)
    for key, m in recorded(model, x).items():
        module: Any = model.get_submodule(key)
        expected = defined(vectors(m[...], m.v[...], module), kind, heads)
        found = contributions(m, kind, heads)
        assert found.shape == expected.shape
        torch.testing.assert_close(found[...], expected, rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(found[1, -1, 2:5, ::2], expected[1, -1, 2:5, ::2], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("build", [lambda: TalkingHeadAttn(24, 3), lambda: GPSA(24, 3)], ids=["talking heads", "gated sum"])
@pytest.mark.parametrize(("kind", "heads"), KINDS)
def test_what_multiplies_the_values_is_what_is_weighted(build: Any, kind: Any, heads: Any) -> None:
    torch.manual_seed(0)
    model: Any = randomise(build()).double().eval()
    m = recorded(model, torch.randn(2, 16, 24).double())[0]
    expected = defined(vectors(m.effective[...], m.v[...], model), kind, heads)
    torch.testing.assert_close(contributions(m, kind, heads)[...], expected, rtol=1e-7, atol=1e-9)


def test_projections_sum_to_the_norm_of_what_is_brought_and_norms_to_no_less() -> None:
    m = recorded(plain(), torch.randn(B, N, C).double())[0]
    brought = m.output().sum(1).norm(dim=-1)
    for heads in (None, "sum"):
        torch.testing.assert_close(contributions(m, "projection", heads)[...].sum((1, 3)), brought)
        assert (contributions(m, "norm", heads)[...].sum((1, 3)) >= brought).all()
    assert (contributions(m, "projection")[...] < 0).any()


def test_any_part_is_that_part() -> None:
    m = recorded(plain(), torch.randn(B, N, C).double())[0]
    for kind, heads in KINDS:
        n: Any = contributions(m, kind, heads)
        whole = n[...]
        for index in ((slice(None), slice(None), 0), (1, 0, 3, 5), (0, slice(0, 2)), ([1, 0], slice(None), slice(3, 9, 2))):
            torch.testing.assert_close(n[index], whole[index])


def test_they_are_read_and_drawn_like_maps(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = tiny_double("vit_registers")
    maps = recorded(model, x)
    found = [contributions(m, heads="sum") for m in maps.values()]
    torch.testing.assert_close(found[0].rows("cls"), found[0][:, :, 0])
    grid = maps[0].tokens.grid_size
    torch.testing.assert_close(found[0].image("cls"), found[0][:, 0, 0, 5:].unflatten(-1, grid))
    whole, figures = found[1][...], entropy(found[1])
    read_in_chunks(monkeypatch, 50)
    torch.testing.assert_close(entropy(found[1]), figures)
    torch.testing.assert_close(found[1].image("mean"), whole[:, 0, 5:, 5:].mean(1).unflatten(-1, grid))
    mixed = 0.5 * found[0][...].mean(1) + 0.5 * torch.eye(whole.shape[-1])
    torch.testing.assert_close(rollout(found), (0.5 * whole.mean(1) + 0.5 * torch.eye(whole.shape[-1])) @ mixed)
    assert found[0].axes == maps[0].axes
    with pytest.raises(RecorderError, match="that of the map"):
        found[0].verify()


def test_shares_are_rows_that_sum_to_1() -> None:
    model, x = tiny_double("vit_registers")
    maps = recorded(model, x)
    for kind, heads in KINDS:
        whole, found = (contributions(maps[0], kind, heads, shares=shares)[...] for shares in (False, True))  # type: ignore[arg-type]
        torch.testing.assert_close(found, whole / whole.sum(-1, keepdim=True))
    rolled = rollout([contributions(m, shares=True) for m in maps.values()])
    torch.testing.assert_close(rolled.sum(-1), torch.ones_like(rolled[..., 0]))


def test_no_vector_is_held_for_each_pair() -> None:
    m = recorded(plain(), torch.randn(B, N, C).double())[0]
    for kind, heads in KINDS:
        n: Any = contributions(m, kind, heads)
        n[0, 0, 0]
        sizes: list[int] = []

        def see(func: Any, out: Any, args: Any, kwargs: Any, sizes: list[int] = sizes) -> None:
            sizes.append(out.numel() if isinstance(out, Tensor) else 0)

        with Operators(see):
            n[...]
        assert max(sizes) < B * N * N * C


def test_float32_is_close() -> None:
    torch.manual_seed(0)
    model, x = randomise(Attention(24, 3)).eval(), torch.randn(2, 7, 24)
    expected = {each: contributions(recorded(model.double(), x.double())[0], *each)[...] for each in KINDS}  # type: ignore[arg-type]
    m = recorded(model.float(), x)[0]
    for each in KINDS:
        found = contributions(m, *each)  # type: ignore[arg-type]
        assert found.dtype == found[...].dtype == torch.float32
        torch.testing.assert_close(found[...].double(), expected[each], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", sorted(MORE & TINY.keys()))
def test_more_than_a_projection_is_refused(name: str) -> None:
    model, x = tiny_double(name)
    with pytest.raises(UnreadableError, match="does something else to what heads bring"):
        contributions(recorded(model, x)[0])[...]


def test_other_words_are_refused() -> None:
    m = recorded(plain(), torch.randn(B, N, C).double())[0]
    with pytest.raises(ValueError, match="'norm' or 'projection'"):
        contributions(m, "length")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'norm' or 'projection'"):
        contributions(m, heads="mean")  # type: ignore[arg-type]


class SelfAttention(nn.Module):
    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(C, 4, batch_first=batch_first)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.attn(x, x, x, need_weights=False)[0]
        return out


@pytest.mark.parametrize("batch_first", [True, False])
def test_several_images_in_attention_that_has_queries_before_them(batch_first: bool) -> None:
    model = randomise(SelfAttention(batch_first)).double().eval()
    x = torch.randn(3, N, C, dtype=torch.float64)
    (m,) = recorded(model, x if batch_first else x.transpose(0, 1)).values()
    module = SimpleNamespace(proj=model.attn.out_proj)
    for kind, heads in KINDS:
        expected = defined(vectors(m[...], m.v[...], module), kind, heads)
        torch.testing.assert_close(contributions(m, kind, heads)[...], expected, rtol=1e-9, atol=1e-11)
    with torch.no_grad():
        own = model(x if batch_first else x.transpose(0, 1))
    own = own if batch_first else own.transpose(0, 1)
    torch.testing.assert_close(m.output().sum(1) + model.attn.out_proj.bias, own, rtol=1e-9, atol=1e-11)
