"""What is done to queries and keys token by token waits as they do, and is that of the tokens that are read."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from support.inside import EachToken, Projected
from support.models import SCORES, B, C, D, H, N, plain, randomise
from support.modes import operations_of
from support.oracle import unfused
from timm.layers import AttentionRope, RmsNorm
from timm.models.eva import EvaAttention
from torch import Tensor, nn

from hookattn import AttentionRecorder

PREFIX = 3
TOKENS = (slice(None), slice(1), slice(2, 4), slice(5, None), slice(None, None, 2), slice(1, 9, 3), torch.tensor([7, 0, 2, 4]))
HEADS = (slice(None), slice(1, 2), torch.tensor([3, 0]))
IMAGES = (slice(None), slice(1, None))


class Turned(nn.Module):
    """Attention whose queries and keys are turned by their place, behind prefix tokens; by angles of each image and head."""

    def __init__(self, attention: nn.Module, *sizes: int) -> None:
        super().__init__()
        self.attn, self.rope = attention, nn.Parameter(torch.randn(*sizes, N - PREFIX, 2 * D))

    def forward(self, x: Tensor) -> Tensor:
        return self.attn(x, rope=self.rope)  # type: ignore[no-any-return]


def turned(kind: Any, *sizes: int, **options: Any) -> nn.Module:
    made = kind(C, num_heads=H, num_prefix_tokens=PREFIX, qkv_bias=True, **options)
    return randomise(Turned(made, *sizes).eval()).double()


KINDS = {
    "layer norm": lambda: plain(qk_norm=True, norm_layer=nn.LayerNorm),
    "rms norm": lambda: plain(qk_norm=True, norm_layer=nn.RMSNorm),
    "rms norm of timm": lambda: plain(qk_norm=True, norm_layer=RmsNorm),
    "turned": lambda: turned(AttentionRope),
    "turned by halves, normed": lambda: turned(AttentionRope, rotate_half=True, qk_norm=True, norm_layer=nn.LayerNorm),
    "turned, of EVA": lambda: turned(EvaAttention, qkv_fused=False, norm_layer=nn.LayerNorm),
    "turned by image": lambda: turned(EvaAttention, B, 1, qk_norm=False, scale_norm=False),
    "turned by head": lambda: turned(AttentionRope, H),
}


@torch.no_grad()
def recorded(kind: str) -> tuple[Any, Tensor]:
    """A map, and what the module's own softmax makes."""
    model, x = KINDS[kind](), torch.randn(B, N, C).double()
    with AttentionRecorder(model) as rec:
        model(x)
    with unfused(model) as maps:
        model(x)
    return rec.maps[0], maps[0]


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_rows_heads_and_images_are_those_of_the_whole(kind: str) -> None:
    m, expected = recorded(kind)
    for batch, heads, tokens in product(IMAGES, HEADS, TOKENS):
        index = tuple(each.tolist() if isinstance(each, Tensor) else each for each in (batch, heads, tokens))
        got, part = m[index[0], index[1]][:, :, index[2]], expected[batch][:, heads][:, :, tokens]
        torch.testing.assert_close(got, part, rtol=0, atol=1e-12)
        torch.testing.assert_close(m[:, :, index[2]], expected[:, :, tokens], rtol=0, atol=1e-12)
        if not (isinstance(heads, Tensor) and isinstance(tokens, Tensor)):
            torch.testing.assert_close(m[index], part, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_no_other_queries_and_heads_are_projected(kind: str) -> None:
    m, _ = recorded(kind)
    row = B * (2 * C * C + 2 * N * C * C + SCORES // N * H)
    assert operations_of(lambda: m[:, :, 0]) == operations_of(lambda: m[:, :, N - 1]) == row
    assert operations_of(lambda: m[:, 1]) == B * (2 * 2 * N * C * D + SCORES)
    assert operations_of(lambda: m[...]) == B * (2 * 2 * N * C * C + H * SCORES)


@pytest.mark.parametrize("prefix", [0, 1, PREFIX])
@pytest.mark.parametrize("sizes", [(1, 1), (B, 1), (1, H), (B, H)], ids=str)
def test_what_is_done_to_each_token_is_cut_as_the_tokens_are(prefix: int, sizes: tuple[int, int]) -> None:
    vectors, turn = torch.randn(B, H, 9, D), torch.randn(*sizes, 9 - prefix, D)
    each = EachToken(lambda y, t: y.sin() * t + t, (turn,), prefix=prefix)
    whole = torch.cat((vectors[:, :, :prefix], vectors[:, :, prefix:].sin() * turn + turn), dim=2)
    torch.testing.assert_close(each(vectors), whole, rtol=0, atol=0)
    for batch, heads, tokens in product(IMAGES, HEADS, TOKENS):
        part = vectors[batch][:, heads][:, :, tokens]
        torch.testing.assert_close(
            each.narrow(batch, heads, tokens)(part), whole[batch][:, heads][:, :, tokens], rtol=0, atol=0
        )
        twice = each.narrow(batch).narrow(heads=heads).narrow(tokens=tokens)
        torch.testing.assert_close(twice(part), whole[batch][:, heads][:, :, tokens], rtol=0, atol=0)


def test_what_is_not_done_token_by_token_is_done_at_once() -> None:
    weight = torch.randn(H, D, C)
    x = torch.randn(B, N, C)
    expected = torch.einsum("b n c, h d c -> b h n d", x, weight)
    for norm, is_later in {
        lambda t: nn.functional.layer_norm(t, (D,)): True,
        lambda t: nn.functional.layer_norm(t, normalized_shape=[D], eps=0.1): True,
        lambda t: nn.functional.layer_norm(t, (D,), weight[0, :, 0]): True,
        lambda t: nn.functional.layer_norm(t, (N, D)): False,
        lambda t: nn.functional.layer_norm(t * 1, (D,), t[0, 0, 0]): False,
        lambda t: nn.functional.layer_norm(input=t, normalized_shape=(D,)): True,
        lambda t: torch.rms_norm(input=t, normalized_shape=(D,)): False,
        lambda t: nn.functional.rms_norm(t, (D,), weight[0, :, 0].double()): False,
        lambda t: t.to(torch.float64): True,
        lambda t: t.to("cpu", torch.float64): False,
        lambda t: t.to(expected.double()): False,
    }.items():
        got, right = norm(Projected(x, weight)), norm(expected)
        assert isinstance(got, Projected) == is_later
        assert (got.dtype, got.shape) == (right.dtype, right.shape)
        torch.testing.assert_close(got * 1, right, rtol=1e-4, atol=1e-4)
    made = Projected(x, weight)
    assert made.to(torch.float32) is made
    assert made.to(torch.float64).narrowed(heads=slice(1)).dtype == torch.float64  # type: ignore[union-attr]
    with pytest.raises(RuntimeError, match="normalized_shape"):
        nn.functional.layer_norm(made, (D + 1,))
    outside = Projected(x, weight).then(EachToken(lambda t: t @ torch.eye(D)))  # a product, which autocast on a CPU casts
    with torch.autocast("cpu", torch.bfloat16):
        assert outside.dtype == outside.compute().dtype == torch.float32  # type: ignore[attr-defined]
        assert not isinstance(nn.functional.layer_norm(Projected(x, weight), (D,)), Projected)
