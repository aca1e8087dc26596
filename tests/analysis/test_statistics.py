"""Figures taken over chunks of rows, against the same of the whole map, number by number."""

from __future__ import annotations

import pydoc
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import reference
from support.image import SHRUNK, SWIN, VIT, made_of
from support.inside import QK, Chunk, Sum, is_reading, kept, lost, read_in_chunks
from support.models import randomise, tiny
from support.modes import Operators, operators_of, peak_of
from support.reading import record_one
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves

from hookattn import AttentionMap, AttentionRecorder, StaleMapError, TokenError, UnreadableError
from hookattn.analysis import (
    Statistic,
    compute_statistics,
    contributions,
    divergence_from_mean,
    entropy,
    head_mean,
    mean_attention_distance,
    received,
)

PLAIN = {entropy: reference.entropy, received: reference.received, head_mean: reference.head_mean}
FOUR = (*PLAIN, mean_attention_distance)
NAMES = [statistic.__name__ for statistic in FOUR]


class Unknown(nn.Module):
    """Attention no recipe knows: by SDPA, closed where a mask says so, or by its own softmax."""

    def __init__(self, mask: Tensor | None = None, *, fused: bool = True) -> None:
        super().__init__()
        self.qkv, self.mask, self.fused = nn.Linear(16, 48), mask, fused

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        if self.fused:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask)
        scores = q @ k.transpose(-2, -1)
        return (scores if self.mask is None else scores.masked_fill(~self.mask, float("-inf"))).softmax(-1) @ v


def unknown(**options: Any) -> tuple[nn.Module, Tensor]:
    return randomise(Unknown(**options)).eval(), torch.randn(3, 11, 16)


def closed(rows: int, keys: int) -> Tensor:
    """(rows, keys): every query may attend to some keys, the second to none."""
    mask = torch.rand(rows, keys) < 0.6
    mask[:, 0] = True
    mask[1] = False
    return mask


MECHANISMS: dict[str, tuple[Callable[[], tuple[nn.Module, Any]], Any]] = {
    "plain": (lambda: tiny("vit", batch=3), 1),
    "registers": (lambda: tiny("vit_registers"), -1),
    "two softmaxes": (made_of("convit_tiny", (48, 48), img_size=48, local_up_to_layer=1, depth=1), 0),
    "relative positions": (lambda: tiny("relpos"), 0),
    "talking heads": (made_of("cait_xxs24_224", (32, 48), img_size=(32, 48), depth=1), 0),
    "class attention": (made_of("cait_xxs24_224", (32, 48), img_size=(32, 48), depth=1), -1),
    "pooling": (made_of("vit_base_patch16_siglip_224", (48, 64), **VIT, img_size=(48, 64)), -1),
    "shifted windows": (made_of("swin_tiny_patch4_window7_224", (40, 72), **SWIN, img_size=(40, 72)), 1),
    "pooled keys": (made_of("pvt_v2_b0", (64, 96), **SHRUNK), "stages.1.blocks.0.attn"),
    "channels": (made_of("xcit_nano_12_p16_224", (32, 48), img_size=(32, 48), depth=1), 0),
    "replay": (unknown, 0),
    "replay of a softmax": (partial(unknown, fused=False), 0),
    "closed rows": (lambda: unknown(mask=closed(11, 11)), 0),
}


@pytest.mark.parametrize("chunk", [1, 500, 10**9])
@pytest.mark.parametrize("keep", ["inputs", "maps"])
@pytest.mark.parametrize("name", MECHANISMS)
def test_figures_of_chunks_are_those_of_the_whole_map(
    monkeypatch: pytest.MonkeyPatch, name: str, keep: Any, chunk: int
) -> None:
    make, layer = MECHANISMS[name]
    m = record_one(*make(), layer, keep=keep)
    whole = m[...]
    read_in_chunks(monkeypatch, chunk)
    for found, (statistic, expected) in zip(compute_statistics(m, *PLAIN), PLAIN.items()):
        torch.testing.assert_close(found, expected(whole).to(whole), rtol=1e-5, atol=1e-6)
        assert torch.equal(statistic(m), found)


def test_figures_are_what_they_are_called() -> None:
    m = record_one(*tiny("vit"))
    torch.testing.assert_close(received(m).sum(-1), torch.ones(2, 3))
    torch.testing.assert_close(head_mean(m).sum(-1), torch.ones(2, 17))
    one_hot, flat = (kept(a.expand(2, 3, 17, 17), m) for a in (torch.eye(17), torch.tensor(1 / 17)))
    assert (entropy(one_hot) == 0).all()
    torch.testing.assert_close(entropy(flat), torch.full((2, 3, 17), 17.0).log())
    assert torch.equal(mean_attention_distance(one_hot), torch.zeros(2, 3))


@pytest.mark.parametrize("factor", [0.0, 1.0, 30.0, 1e4], ids=["flat", "as it comes", "steep", "at one key"])
@pytest.mark.parametrize("closing", ["nothing", "a mask", "a bias", "all of a row"])
def test_entropy_is_as_exact_as_the_map(closing: str, factor: float) -> None:
    """Against a softmax and logarithms in float64 of the same queries and keys."""
    q, k = torch.randn(2, 3, 11, 8) * factor, torch.randn(2, 3, 11, 8)
    opened = closed(11, 11) if closing == "all of a row" else torch.eye(11).bool() | (torch.rand(11, 11) < 0.6)
    bias = torch.randn(11, 11).masked_fill(~opened, float("-inf")) if closing == "a bias" else None
    mask = None if closing in ("nothing", "a bias") else opened
    scores = q.double() @ k.double().mT * 8**-0.5 + (0 if bias is None else bias)
    whole = (scores if mask is None else scores.masked_fill(~mask, float("-inf"))).softmax(-1).nan_to_num(0.0)
    expected = -torch.xlogy(whole, whole).sum(-1)
    chunk = QK(q, k, bias=bias, mask=mask).chunk()
    assert chunk.scores is not None
    for found in (chunk, Chunk(chunk.values)):
        assert (found.entropies() >= 0).all()
        torch.testing.assert_close(found.entropies().double(), expected, rtol=1e-5, atol=2e-6 * max(1.0, factor))


@pytest.mark.parametrize("name", ["plain", "relative positions", "shifted windows", "replay", "closed rows"])
def test_scores_of_which_a_map_is_the_softmax_are_used_and_given_up_to_nobody(name: str) -> None:
    make, layer = MECHANISMS[name]
    m = record_one(*make(), layer)
    first, seen = m[...], operators_of(lambda: entropy(m))
    assert "aten.log_.default" in seen
    assert "aten.clamp_min.default" not in seen
    assert torch.equal(m[...], first)


# Distances


@pytest.mark.parametrize("name", ["class attention", "pooling", "channels", "replay"])
def test_distances_that_are_none_are_refused_with_what_to_do(name: str) -> None:
    make, layer = MECHANISMS[name]
    m = record_one(*make(), layer)
    with pytest.raises(TokenError, match=r"m\.image|m\[\.\.\.\]"):
        compute_statistics(m, entropy, mean_attention_distance)


# How it is read


@pytest.mark.parametrize("keep", ["inputs", "maps"])
@pytest.mark.parametrize("wanted", [[statistic] for statistic in FOUR] + [list(FOUR)], ids=[*NAMES, "all"])
def test_no_more_than_a_chunk_is_held(monkeypatch: pytest.MonkeyPatch, wanted: list[Statistic], keep: Any) -> None:
    model, _ = tiny("vit", img_size=512, patch_size=16, embed_dim=12, depth=1)
    m = record_one(model, torch.randn(2, 3, 512, 512), keep=keep)
    assert m.shape == (2, 3, 1025, 1025)
    chunk = 3 * 1025 * 80
    read_in_chunks(monkeypatch, chunk)
    results = sum(result.nbytes for result in compute_statistics(m, *wanted))
    projected = 4 * 2 * 1025 * 36 * 3  # queries and keys, and what they come from
    few = 4 * 4 * chunk  # as scores, as probabilities, as what is made of them
    assert few < m[...].nbytes / 6
    assert peak_of(lambda: compute_statistics(m, *wanted)) <= results + projected + few


def test_a_chunk_more_costs_few_operators_and_nothing_that_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, where a chunk takes less time than to say what to do, and a copy from the CPU waits for all before it."""
    m = record_one(*tiny("vit", batch=1))
    rows = m.shape[1] * m.shape[3]

    def run(chunks: int) -> list[str]:
        read_in_chunks(monkeypatch, rows * -(-m.shape[2] // chunks))
        return operators_of(lambda: compute_statistics(m, *FOUR))

    run(1)
    one, many = run(2), run(6)
    assert len(many) - len(one) <= 4 * 53
    assert many.count("aten._to_copy.default") == one.count("aten._to_copy.default")
    assert many.count("aten.isnan.default") == one.count("aten.isnan.default")


LOOKS = ("new_zeros", "view", "slice", "unsqueeze", "expand", "transpose", "new_empty", "alias", "detach", "select", "device")


def test_a_chunk_is_gone_over_few_times() -> None:
    """Where there is little else to do, what goes over all of it is what a statistic costs."""
    m = record_one(*tiny("vit", batch=4))
    entries, seen = m[...].numel(), list[str]()

    def see(func: Any, out: Any, args: Any, kwargs: Any) -> None:
        name, given = str(func).split(".")[1], tree_leaves((args, kwargs, out))
        if name not in LOOKS and any(isinstance(t, Tensor) and t.numel() == entries for t in given):
            seen.append(name)

    with Operators(see):
        compute_statistics(m, *FOUR)
    made, of_entropy, of_distance = ["baddbmm", "_softmax"], ["amax", "sub", "amax", "mul_", "sum"], ["mul", "sum", "mv"]
    assert seen == [*made, *of_entropy, "sum", "mean", *of_distance]


def test_distances_are_measured_once_for_images_that_lie_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    m = record_one(*tiny("vit", batch=6))
    read_in_chunks(monkeypatch, m[0].numel())  # an image each
    found = operators_of(lambda: mean_attention_distance(m))
    assert found.count("aten.hypot.default") == 1
    assert found.count("aten._softmax.default") == 6


def test_queries_and_keys_are_computed_once_for_all_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    m = record_one(*tiny("vit", batch=1))

    def products() -> int:
        return sum("addmm" in name for name in operators_of(lambda: compute_statistics(m, *FOUR)))

    assert products() > 0
    at_once = products()
    read_in_chunks(monkeypatch, 1)
    assert products() == at_once


@pytest.mark.parametrize("keep", ["inputs", "maps"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, None], ids=str)
def test_figures_go_where_slices_go(dtype: Any, keep: Any) -> None:
    model, x = tiny("vit")
    m, exact = record_one(model, x, dtype=dtype, keep=keep), record_one(model, x)
    for found, right in zip(compute_statistics(m, *FOUR), compute_statistics(exact, *FOUR)):
        assert found.dtype == m.dtype == m[...].dtype
        tolerance = 2e-3 if dtype == torch.float16 else 1e-6
        torch.testing.assert_close(found.float(), right, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("mode", ["autocast", "inference", "half", "train"])
def test_figures_are_those_of_the_modes_of_the_call(mode: str) -> None:
    model, x = tiny("vit", attn_drop_rate=0.2, proj_drop_rate=0.2)
    if mode == "half":
        model, x = model.to(torch.bfloat16), x.to(torch.bfloat16)
    model.train(mode == "train")
    autocast = torch.autocast("cpu", enabled=mode == "autocast")
    with AttentionRecorder(model) as rec, autocast, torch.inference_mode(mode == "inference"), torch.no_grad():
        model(x)
    whole = rec.maps[1][...]
    with torch.autocast("cpu"):
        for found, expected in zip(compute_statistics(rec.maps[1], *PLAIN), PLAIN.values()):
            assert found.dtype == torch.float32
            torch.testing.assert_close(found, expected(whole).float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("keep", ["inputs", "maps"])
def test_autocast_does_not_touch_what_is_added_up(keep: Any) -> None:
    """A statistic of one's own: how alike the columns are."""

    def alike(m: AttentionMap) -> Sum:
        batch, heads, _, keys = m.shape

        def add(total: Tensor, items: slice, rows: slice, chunk: Chunk) -> None:
            total[items] += chunk.values.mT @ chunk.values

        return Sum((batch, heads, keys, keys), add)

    with torch.autocast("cpu"):
        m = record_one(*tiny("vit"), keep=keep)
        found = Statistic(alike)(m)
    torch.testing.assert_close(found, m[...].mT @ m[...], rtol=1e-5, atol=1e-6)


class BreakDownError(Exception):
    pass


@pytest.mark.parametrize("keep", ["inputs", "maps"])
def test_a_statistic_that_breaks_down_leaves_nothing_behind(keep: Any) -> None:
    model, x = tiny("vit")
    with torch.autocast("cpu"):
        m = record_one(model, x, keep=keep)
    model.train()

    def add(total: Tensor, items: slice, rows: slice, chunk: Chunk) -> None:
        assert keep == "maps" or (is_reading() and not torch.is_grad_enabled() and not model.blocks[0].attn.training)
        raise BreakDownError

    with pytest.raises(BreakDownError):
        compute_statistics(m, entropy, Statistic(lambda m: Sum((1,), add)))
    assert all(module.training for module in model.modules())
    assert torch.is_grad_enabled()
    assert not is_reading()
    assert not torch.is_autocast_enabled("cpu")


def naive_distance(attention: Tensor) -> Tensor:
    """Mean attention distance of a whole map of 5 prefix tokens and 4 x 4 patches of 14 x 14 pixels."""
    at = torch.tensor(reference.centres(4, 4, 14, 14), dtype=torch.float64)
    patches = attention[:, :, 5:, 5:]
    return (patches * torch.cdist(at, at)).sum(-1).div(patches.sum(-1)).mean(-1)


WHOLE: dict[Statistic, Callable[[Tensor], Tensor]] = {
    entropy: lambda a: -(a * a.log()).sum(-1),
    received: lambda a: a.mean(2),
    head_mean: lambda a: a.mean(1),
    mean_attention_distance: naive_distance,
}


@pytest.mark.parametrize("keep", ["inputs", "maps"])
@pytest.mark.parametrize("statistic", FOUR, ids=NAMES)
def test_gradients_are_those_through_the_whole_map(monkeypatch: pytest.MonkeyPatch, statistic: Statistic, keep: Any) -> None:
    model, x = tiny("vit_registers")
    model, x = model.double(), x.double().requires_grad_()
    with AttentionRecorder(model, detach=False, keep=keep) as rec:
        model(x)
    m = rec.maps[1]
    expected = WHOLE[statistic](m[...])
    weight = torch.randn_like(expected)
    wanted = [x, *model.blocks[1].attn.qkv.parameters()]
    right = torch.autograd.grad((expected * weight).sum(), wanted, retain_graph=True)
    read_in_chunks(monkeypatch, 3 * 21 * 4)
    found = statistic(m)
    torch.testing.assert_close(found, expected)
    got = torch.autograd.grad((found * weight).sum(), wanted)
    assert all(grad.abs().max() > 1e-9 for grad in got)
    torch.testing.assert_close(got, right, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("fused", [True, False], ids=["by SDPA", "by its own softmax"])
def test_the_gradient_of_entropy_is_zero_where_a_key_is_closed(fused: bool) -> None:
    mask = closed(11, 11)
    mask[1, 3] = True
    model, x = unknown(mask=mask, fused=fused)
    model, x = model.double(), x.double().requires_grad_()
    m = record_one(model, x, detach=False)
    assert (m[...] == 0).any()
    (got,) = torch.autograd.grad(entropy(m).sum(), x)
    attention = m[...]
    logarithms = attention.where(attention > 0, 1.0).log()  # 0 log 1 = 0 where a key is closed
    (right,) = torch.autograd.grad(-(attention * logarithms).sum(), x)
    torch.testing.assert_close(got, right)


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # a kernel that PyTorch has no batching rule for
def test_figures_can_be_had_under_vmap() -> None:
    model, x = tiny("vit", batch=3)

    def figures(x: Tensor) -> tuple[Tensor, ...]:
        with AttentionRecorder(model) as rec, sdpa_kernel(SDPBackend.MATH):
            model(x[None])
        return compute_statistics(rec.maps[1], *FOUR)

    for found, right in zip(torch.func.vmap(figures)(x), compute_statistics(record_one(model, x, 1), *FOUR)):
        torch.testing.assert_close(found[:, 0], right)


def test_figures_of_a_map_that_is_lost_or_stale_say_why() -> None:
    model, x = tiny("vit")
    m = record_one(model, x)
    gone = lost("the dog ate it", m)
    with torch.no_grad():
        model.blocks[0].attn.qkv.weight.add_(1)
    for statistic in FOUR:
        with pytest.raises(UnreadableError, match="the dog ate it"):
            statistic(gone)
        with pytest.raises(StaleMapError, match=r"qkv\.weight"):
            statistic(m)


def test_help_on_a_statistic_says_what_it_is() -> None:
    for statistic, shape in zip(
        FOUR, ("(batch, heads, queries)", "(batch, heads, keys)", "(batch, queries, keys)", "(images, heads)")
    ):
        assert shape in pydoc.plain(pydoc.render_doc(statistic))
        assert statistic.__name__ in repr(statistic)


@pytest.mark.parametrize("of_one", [*FOUR, divergence_from_mean, contributions])
def test_what_is_of_one_map_says_so_where_it_is_given_several(of_one: Callable[[Any], Any]) -> None:
    model, x = tiny("vit")
    with AttentionRecorder(model) as rec, torch.no_grad():
        model(x)
    for several in (rec, rec.maps, rec.maps[:], tuple(rec.maps[:])):
        with pytest.raises(
            TypeError, match=rf"of one map, and this {type(several).__name__} is of several: .* rec\.maps\[-1\]"
        ):
            of_one(several)
