"""Attention written in many styles, each with its map written naively: what `evidence` must read, or refuse by name.

Every style is a small module, the arguments of a call, and its true map (images * windows, heads, queries, keys), or the reason
for which there is none. Nothing here is imported from the package.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from torch.utils.checkpoint import checkpoint


class Sizes(NamedTuple):
    batch: int
    heads: int
    tokens: int
    dim: int


ODD, SQUARE, ONE = Sizes(2, 3, 7, 5), Sizes(4, 4, 4, 4), Sizes(1, 3, 8, 5)
SIZES = {"odd": ODD, "square": SQUARE, "one": ONE}


class Style(NamedTuple):
    """A way to write attention: `make(sizes)` gives a module, its arguments, and its true map or None where there is none."""

    name: str
    make: Callable[[Sizes], tuple[nn.Module, tuple[Any, ...], Tensor | None]]


STYLES: dict[str, Style] = {}


def style(make: Callable[[Sizes], Any]) -> Callable[[Sizes], Any]:
    STYLES[make.__name__] = Style(make.__name__, make)
    return make


def randomised(module: nn.Module) -> nn.Module:
    for p in module.parameters():
        nn.init.normal_(p, std=0.4)
    return module.eval()


class Own(nn.Module):
    """Projects tokens, hands queries, keys and values (batch, tokens, heads, dim) to `run`, and projects what comes back."""

    def __init__(self, s: Sizes, run: Callable[..., Any], *, project: bool = True) -> None:
        super().__init__()
        self.heads, self.run, width = s.heads, run, s.heads * s.dim
        self.q, self.k, self.v = nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, width)
        self.out = nn.Linear(width, width) if project else nn.Identity()
        randomised(self)

    def split(self, x: Tensor, memory: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        memory = x if memory is None else memory
        q, k, v = (t.unflatten(-1, (self.heads, -1)) for t in (self.q(x), self.k(memory), self.v(memory)))
        return q, k, v

    def forward(self, x: Tensor, *more: Any) -> Any:
        memory = more[:1] if more and more[0].dim() == 3 else ()
        return self.out(self.run(*self.split(x, *memory)))


def rows(q: Tensor, k: Tensor, f: Callable[[Tensor, int], Tensor] | None = None, scale: float | None = None) -> Tensor:
    """The map, one row at a time, in float64: f(scores of a row over all keys, which query) or their softmax."""
    q, k = q.detach().double(), k.detach().double()
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    f = f or (lambda s, i: s.exp() / s.exp().sum())
    one = lambda b, h, i: f(k[b, :, h] @ q[b, i, h] * scale, i)  # noqa: E731
    return torch.stack(
        [
            torch.stack([torch.stack([one(b, h, i) for i in range(q.shape[1])]) for h in range(q.shape[2])])
            for b in range(len(q))
        ]
    )


def only(open_: Tensor) -> Callable[[Tensor, int], Tensor]:
    """The softmax of a row over the keys that are open to its query."""

    def f(scores: Tensor, i: int) -> Tensor:
        weights = scores.exp() * open_[i]
        return weights / weights.sum()

    return f


def own(run: Callable[..., Any], f: Callable[[Tensor, int], Tensor] | None = None) -> Callable[[Sizes], Any]:
    """Register self-attention that does `run`, of which the rows of the map are `f` of the scores."""

    def make(s: Sizes) -> Any:
        module, x = Own(s, run), torch.randn(s.batch, s.tokens, s.heads * s.dim)
        q, k, _ = module.split(x)
        return module, (x,), rows(q, k, f)

    make.__name__ = run.__name__
    return style(make)


def bare(run: Callable[..., Any]) -> Callable[[Sizes], Any]:
    """Register self-attention that does `run` and puts out what comes of it, without a projection."""
    made = own(run)

    def make(s: Sizes) -> Any:
        module, args, true = made(s)
        module.out = nn.Identity()
        return module, args, true

    make.__name__ = run.__name__
    STYLES.pop(run.__name__)
    return style(make)


def no_map(run: Callable[..., Any]) -> Callable[[Sizes], Any]:
    """Register self-attention that has no map over pairs of tokens."""

    def make(s: Sizes) -> Any:
        return Own(s, run), (torch.randn(s.batch, s.tokens, s.heads * s.dim),), None

    make.__name__ = run.__name__
    return style(make)


def first(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.transpose(1, 2) for t in tensors)


def merged(y: Tensor) -> Tensor:
    return y.transpose(1, 2).flatten(2)


def scores_of(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.mT * q.shape[-1] ** -0.5


# --- Where heads stand -----------------------------------------------------------------------------------------------


@own
def fused(q, k, v):
    return merged(F.scaled_dot_product_attention(*first(q, k, v)))


@own
def eager(q, k, v):
    q, k, v = first(q, k, v)
    return merged(scores_of(q, k).softmax(-1) @ v)


@own
def heads_before_images(q, k, v):
    a = (torch.einsum("bqhd,bkhd->hbqk", q, k) * q.shape[-1] ** -0.5).softmax(-1)
    return torch.einsum("hbqk,bkhd->bqhd", a, v).flatten(2)


@own
def heads_third(q, k, v):
    a = (torch.einsum("bqhd,bkhd->bqhk", q, k) * q.shape[-1] ** -0.5).softmax(-1)
    return torch.einsum("bqhk,bkhd->bqhd", a, v).flatten(2)


@own
def heads_last(q, k, v):
    a = (torch.einsum("bqhd,bkhd->bqkh", q, k) * q.shape[-1] ** -0.5).softmax(2)
    return torch.einsum("bqkh,bkhd->bqhd", a, v).flatten(2)


@own
def images_and_heads_in_one_axis(q, k, v):
    images = len(q)
    q, k, v = (t.flatten(0, 1) for t in first(q, k, v))
    a = scores_of(q, k).softmax(-1)
    return merged((a @ v).unflatten(0, (images, -1)))


@own
def heads_and_images_in_one_axis(q, k, v):
    images = len(q)
    q, k, v = (t.permute(2, 0, 1, 3).flatten(0, 1) for t in (q, k, v))
    return (scores_of(q, k).softmax(-1) @ v).unflatten(0, (-1, images)).permute(1, 2, 0, 3).flatten(2)


@own
def fused_with_images_and_heads_in_one_axis(q, k, v):
    images = len(q)
    y = F.scaled_dot_product_attention(*(t.flatten(0, 1) for t in first(q, k, v)))
    return merged(y.unflatten(0, (images, -1)))


@own
def keys_before_queries(q, k, v):
    q, k, v = first(q, k, v)
    a = (k @ q.mT * q.shape[-1] ** -0.5).softmax(-2)
    return merged((v.mT @ a).mT)


@own
def sum_of_a_broadcast_product(q, k, v):
    a = (torch.einsum("bqhd,bkhd->bqkh", q, k) * q.shape[-1] ** -0.5).softmax(2)
    return (a.unsqueeze(-1) * v.unsqueeze(1)).sum(2).flatten(2)


@own
def baddbmm_as_bloom_does(q, k, v):
    images = len(q)
    q, k, v = (t.flatten(0, 1) for t in first(q, k, v))
    scores = torch.baddbmm(torch.zeros(1, 1, 1), q, k.mT, beta=0.0, alpha=q.shape[-1] ** -0.5)
    return merged(torch.bmm(scores.softmax(-1), v).unflatten(0, (images, -1)))


@own
def tokens_before_images(q, k, v):
    q, k, v = (t.transpose(0, 1) for t in (q, k, v))
    a = (torch.einsum("qbhd,kbhd->bhqk", q, k) * q.shape[-1] ** -0.5).softmax(-1)
    return torch.einsum("bhqk,kbhd->qbhd", a, v).flatten(2).transpose(0, 1)


# --- Loops and chunks ------------------------------------------------------------------------------------------------


@own
def one_image_after_the_other(q, k, v):
    q, k, v = first(q, k, v)
    return merged(torch.cat([F.scaled_dot_product_attention(*(t[i : i + 1] for t in (q, k, v))) for i in range(len(q))]))


@own
def one_head_after_the_other(q, k, v):
    heads = zip(*(t.unbind(2) for t in (q, k, v)))
    return torch.cat([scores_of(a, b).softmax(-1) @ c for a, b, c in heads], -1)


@own
def one_image_and_head_after_the_other(q, k, v):
    out = torch.zeros_like(q)
    for b in range(len(q)):
        for h in range(q.shape[2]):
            out[b, :, h] = scores_of(q[b, :, h], k[b, :, h]).softmax(-1).mm(v[b, :, h])
    return out.flatten(2)


@own
def chunks_of_queries(q, k, v):
    q, k, v = first(q, k, v)
    return merged(torch.cat([F.scaled_dot_product_attention(part, k, v) for part in q.split(2, 2)], 2))


@own
def chunks_of_queries_into_a_buffer(q, k, v):
    q, k, v = first(q, k, v)
    out = torch.empty_like(q)
    for i in range(0, q.shape[2], 3):
        out[:, :, i : i + 3] = scores_of(q[:, :, i : i + 3], k).softmax(-1) @ v
    return merged(out)


@own
def every_other_query_first(q, k, v):
    q, k, v = first(q, k, v)
    out = torch.empty_like(q)
    for i in (0, 1):
        out[:, :, i::2] = scores_of(q[:, :, i::2], k).softmax(-1) @ v
    return merged(out)


@own
def one_query_after_the_other(q, k, v):
    q, k, v = first(q, k, v)
    return merged(torch.cat([scores_of(q[:, :, i : i + 1], k).softmax(-1) @ v for i in range(q.shape[2])], 2))


@own
def one_image_without_its_axis(q, k, v):
    each = zip(*(t.transpose(1, 2) for t in (q, k, v)))
    return torch.stack([(scores_of(a, b).softmax(-1) @ c).transpose(0, 1).flatten(1) for a, b, c in each])


# --- Where the softmax is --------------------------------------------------------------------------------------------


@own
def a_second_softmax_for_logging(q, k, v):
    q, k, v = first(q, k, v)
    scores = scores_of(q, k)
    (scores / 0.1).softmax(-1).amax(-1).mean()
    return merged(scores.softmax(-1) @ v)


@own
def a_second_product_for_logging(q, k, v):
    q, k, v = first(q, k, v)
    a = scores_of(q, k).softmax(-1)
    (a @ a @ v).mean()
    return merged(a @ v)


@own
def softmax_into_its_scores(q, k, v):
    q, k, v = first(q, k, v)
    scores = scores_of(q, k)
    torch.softmax(scores, -1, out=scores)
    return merged(scores @ v)


@own
def softmax_copied_into_its_scores(q, k, v):
    q, k, v = first(q, k, v)
    scores = scores_of(q, k)
    scores.copy_(scores.softmax(-1))
    return merged(scores @ v)


@own
def queries_written_to_afterwards(q, k, v):
    q, k, v = (t.clone() for t in first(q, k, v))
    a = scores_of(q, k).softmax(-1)
    q.zero_()
    y = a @ v
    a.fill_(0.5)
    v.zero_()
    return merged(y)


@own
def exp_of_log_softmax(q, k, v):
    q, k, v = first(q, k, v)
    return merged(scores_of(q, k).log_softmax(-1).exp() @ v)


@own
def exp_by_sum(q, k, v):
    q, k, v = first(q, k, v)
    scores = scores_of(q, k)
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    return merged((weights / weights.sum(-1, keepdim=True)) @ v)


@own
def exp_in_place(q, k, v):
    q, k, v = first(q, k, v)
    scores = scores_of(q, k)
    scores.sub_(scores.amax(-1, keepdim=True)).exp_().div_(scores.sum(-1, keepdim=True))
    return merged(scores @ v)


@own
def softmax_of_aten(q, k, v):
    q, k, v = first(q, k, v)
    return merged(torch.ops.aten._softmax(scores_of(q, k), -1, False) @ v)


@own
def softmax_of_another_type(q, k, v):
    q, k, v = first(q, k, v)
    return merged(F.softmax(scores_of(q, k), -1, dtype=torch.float64).to(q.dtype) @ v)


def sigmoid(scores, i):
    return scores.sigmoid()


def sigmoid_attention(q, k, v):
    q, k, v = first(q, k, v)
    return merged(scores_of(q, k).sigmoid() @ v)


own(sigmoid_attention, sigmoid)


def squared_relu_attention(q, k, v):
    q, k, v = first(q, k, v)
    return merged(scores_of(q, k).relu().square() @ v)


own(squared_relu_attention, lambda scores, i: scores.relu() ** 2)


@own
def detached_map(q, k, v):
    q, k, v = first(q, k, v)
    with torch.no_grad():
        a = scores_of(q, k).softmax(-1)
    return merged(a.detach() @ v)


# --- Masks -----------------------------------------------------------------------------------------------------------


def only_earlier(scores, i):
    return only(torch.ones(len(scores), len(scores)).tril())(scores, i)


def causal(q, k, v):
    return merged(F.scaled_dot_product_attention(*first(q, k, v), is_causal=True))


def causal_by_hand(q, k, v):
    q, k, v = first(q, k, v)
    ahead = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).triu(1)
    return merged(scores_of(q, k).masked_fill_(ahead, float("-inf")).softmax(-1) @ v)


def causal_by_a_large_number(q, k, v):
    q, k, v = first(q, k, v)
    ahead = torch.full((q.shape[2], k.shape[2]), torch.finfo(q.dtype).min).triu(1)
    return merged(F.scaled_dot_product_attention(q, k, v, attn_mask=ahead))


for run in (causal, causal_by_hand, causal_by_a_large_number):
    own(run, only_earlier)


def top_three(scores, i):
    return only((scores >= scores.topk(3).values[-1]).expand(len(scores), -1))(scores, i)


def top_keys(q, k, v):
    q, k, v = first(q, k, v)
    scores = scores_of(q, k)
    least = scores.topk(3, -1).values[..., -1:]
    return merged(scores.masked_fill(scores < least, float("-inf")).softmax(-1) @ v)


def top_keys_scattered(q, k, v):
    q, k, v = first(q, k, v)
    values, index = scores_of(q, k).topk(3, -1)
    a = torch.zeros(*q.shape[:3], k.shape[2]).scatter_(-1, index, values.softmax(-1))
    return merged(a @ v)


own(top_keys, top_three)
own(top_keys_scattered, top_three)


def with_sink(scores, i):
    return scores.exp() / (scores.exp().sum() + torch.tensor(0.7).double().exp())


def a_sink(q, k, v):
    q, k, v = first(q, k, v)
    scores = torch.cat([scores_of(q, k), torch.full((*q.shape[:3], 1), 0.7)], -1)
    return merged(scores.softmax(-1)[..., :-1] @ v)


own(a_sink, with_sink)


@style
def lower_right_causal(s):
    def run(q, k, v):
        q, k, v = first(q, k, v)
        return merged(F.scaled_dot_product_attention(q, k, v, attn_mask=causal_lower_right(q.shape[2], k.shape[2])))

    module, x, memory = Own(s, run), torch.randn(s.batch, s.tokens, s.heads * s.dim), None
    memory = torch.randn(s.batch, s.tokens + 2, s.heads * s.dim)
    q, k, _ = module.split(x, memory)
    return module, (x, memory), rows(q, k, only(torch.ones(s.tokens, s.tokens + 2).tril(2)))


@style
def a_padding_mask(s):
    class Masked(Own):
        def forward(self, x, mask):
            q, k, v = first(*self.split(x))
            return self.out(merged(F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None])))

    module, x, mask = Masked(s, len), torch.randn(s.batch, s.tokens, s.heads * s.dim), torch.ones(s.batch, s.tokens)
    mask[0, -2:] = 0
    q, k, _ = module.split(x)
    true = [rows(q[b : b + 1], k[b : b + 1], only(mask[b].expand(s.tokens, -1))) for b in range(s.batch)]
    return module, (x, mask.bool()), torch.cat(true)


class Added(Own):
    """Adds a mask to its scores."""

    def forward(self, x, mask):
        q, k, v = first(*self.split(x))
        return self.out(merged((scores_of(q, k) + mask).softmax(-1) @ v))


@style
def a_mask_of_blocks_before_nothing_else(s):
    """Each column of the map depends on other entries of the mask than most, and each channel is put out as it is."""

    module, x = Added(s, len, project=False), torch.randn(s.batch, s.tokens, s.heads * s.dim)
    q, k, _ = module.split(x)
    block = torch.arange(s.tokens) * 3 // s.tokens
    same = block[:, None] == block
    return module, (x, torch.zeros(s.tokens, s.tokens).masked_fill(~same, float("-inf"))), rows(q, k, only(same))


@style
def a_float_mask_that_is_zero(s):
    module, x = Added(s, len), torch.randn(s.batch, s.tokens, s.heads * s.dim)
    q, k, _ = module.split(x)
    mask = torch.zeros(s.tokens, s.tokens).masked_fill(torch.ones(s.tokens, s.tokens).triu(1) > 0, float("-inf"))
    return module, (x, mask), rows(q, k, only_earlier)


@style
def a_bias_for_each_pair(s):
    class Biased(Own):
        def __init__(self, s):
            super().__init__(s, len)
            self.table = nn.Parameter(torch.randn(s.heads, s.tokens, s.tokens))

        def forward(self, x):
            q, k, v = first(*self.split(x))
            return self.out(merged((scores_of(q, k) + self.table).softmax(-1) @ v))

    module, x = Biased(s), torch.randn(s.batch, s.tokens, s.heads * s.dim)
    q, k = first(*(t.detach().double() for t in module.split(x)[:2]))
    return module, (x,), (scores_of(q, k) + module.table.detach().double()).softmax(-1)


# --- Queries and keys of other tokens, of fewer heads ----------------------------------------------------------------


@style
def cross_attention(s):
    def run(q, k, v):
        return merged(F.scaled_dot_product_attention(*first(q, k, v)))

    module, x, memory = Own(s, run), torch.randn(s.batch, s.tokens, s.heads * s.dim), None
    memory = torch.randn(s.batch, s.tokens + 2, s.heads * s.dim)
    q, k, _ = module.split(x, memory)
    return module, (x, memory), rows(q, k)


@style
def queries_of_one_image(s):
    class Latents(Own):
        def __init__(self, s):
            super().__init__(s, len)
            self.latents = nn.Parameter(torch.randn(1, 5, s.heads * s.dim))

        def forward(self, x):
            return self.out(merged(F.scaled_dot_product_attention(*first(*self.split(self.latents, x)))))

    module, x = Latents(s), torch.randn(s.batch, s.tokens, s.heads * s.dim)
    q, k, _ = module.split(module.latents, x)
    return module, (x,), rows(q.expand(s.batch, -1, -1, -1), k)


@style
def latents_and_tokens_as_keys(s):
    class Resampler(Own):
        def forward(self, x, latents):
            q, k, v = self.split(latents, torch.cat([x, latents], 1))
            return self.out(merged(F.scaled_dot_product_attention(*first(q, k, v))))

    module = Resampler(s, len)
    x, latents = torch.randn(s.batch, s.tokens, s.heads * s.dim), torch.randn(s.batch, 3, s.heads * s.dim)
    q, k, _ = module.split(latents, torch.cat([x, latents], 1))
    return module, (x, latents), rows(q, k)


def grouped(attend):
    class Grouped(nn.Module):
        def __init__(self, s):
            super().__init__()
            self.groups, self.share, width = s.heads, 2, 2 * s.heads * s.dim
            self.q, self.k, self.v = (nn.Linear(width, n) for n in (width, width // 2, width // 2))
            self.out = nn.Linear(width, width)
            randomised(self)

        def split(self, x):
            return [f(x).unflatten(-1, (n * self.groups, -1)) for f, n in ((self.q, 2), (self.k, 1), (self.v, 1))]

        def forward(self, x):
            return self.out(attend(*self.split(x)))

    def make(s):
        module, x = Grouped(s), torch.randn(s.batch, s.tokens, 2 * s.heads * s.dim)
        q, k, _ = module.split(x)
        return module, (x,), rows(q, k.repeat_interleave(2, 2))

    make.__name__ = attend.__name__
    return style(make)


@grouped
def groups_repeated(q, k, v):
    k, v = (t.repeat_interleave(2, 2) for t in (k, v))
    return merged(F.scaled_dot_product_attention(*first(q, k, v)))


@grouped
def groups_in_the_fused_kernel(q, k, v):
    return merged(F.scaled_dot_product_attention(*first(q, k, v), enable_gqa=True))


@grouped
def groups_beside_queries(q, k, v):
    (q, k, v), heads, queries = first(q, k, v), q.shape[2], q.shape[1]
    q = q.unflatten(1, (-1, 2)).flatten(2, 3)
    return merged((scores_of(q, k).softmax(-1) @ v).unflatten(2, (2, queries)).reshape(len(q), heads, queries, -1))


@grouped
def groups_in_einsum(q, k, v):
    q = q.unflatten(2, (-1, 2))
    a = (torch.einsum("bqghd,bkgd->bghqk", q, k) * q.shape[-1] ** -0.5).softmax(-1)
    return torch.einsum("bghqk,bkgd->bqghd", a, v).flatten(2)


@style
def a_step_of_decoding(s):
    class Step(Own):
        def forward(self, x, keys, values):
            q, k, v = self.split(x)
            k, v = torch.cat([keys, k], 1), torch.cat([values, v], 1)
            return self.out(merged(F.scaled_dot_product_attention(*first(q, k, v))))

    module, x = Step(s, len), torch.randn(s.batch, 1, s.heads * s.dim)
    keys, values = torch.randn(2, s.batch, s.tokens, s.heads, s.dim)
    q, k, _ = module.split(x)
    return module, (x, keys, values), rows(q, torch.cat([keys, k], 1))


@style
def a_grouped_step_of_decoding(s):
    class Step(Own):
        def forward(self, x, keys, values):
            q = self.split(x)[0][:, 0].unflatten(1, (len(keys[0, 0]), -1))  # (batch, groups, heads of a group, dim)
            a = (torch.einsum("bghd,bkgd->bghk", q, keys) * q.shape[-1] ** -0.5).softmax(-1)
            return self.out(torch.einsum("bghk,bkgd->bghd", a, values).flatten(1)[:, None])

    s = s._replace(heads=6)
    module, x = Step(s, len), torch.randn(s.batch, 1, s.heads * s.dim)
    keys, values = torch.randn(2, s.batch, s.tokens, 2, s.dim)
    return module, (x, keys, values), rows(module.split(x)[0], keys.repeat_interleave(3, 2))


@style
def class_token_alone_asks(s):
    class ClassAttention(Own):
        def forward(self, x):
            q, k, v = self.split(x[:, :1], x)
            return self.out(merged(F.scaled_dot_product_attention(*first(q, k, v))))

    module, x = ClassAttention(s, len), torch.randn(s.batch, s.tokens, s.heads * s.dim)
    q, k, _ = module.split(x[:, :1], x)
    return module, (x,), rows(q, k)


@style
def fewer_keys_by_a_strided_convolution(s):
    class Reduced(Own):
        def __init__(self, s):
            super().__init__(s, len)
            self.reduce = nn.Conv2d(s.heads * s.dim, s.heads * s.dim, 2, 2)

        def memory(self, x):
            return self.reduce(x.mT.unflatten(-1, (4, -1))).flatten(2).mT

        def forward(self, x):
            return self.out(merged(F.scaled_dot_product_attention(*first(*self.split(x, self.memory(x))))))

    module, x = randomised(Reduced(s)), torch.randn(s.batch, 24, s.heads * s.dim)
    q, k, _ = module.split(x, module.memory(x))
    return module, (x,), rows(q, k)


@style
def keys_by_a_convolution_that_overlaps(s):
    class Convolved(Own):
        def __init__(self, s):
            super().__init__(s, len)
            self.conv = nn.Conv2d(s.heads * s.dim, s.heads * s.dim, 3, padding=1, groups=s.heads * s.dim)

        def memory(self, x):
            return self.conv(x.mT.unflatten(-1, (6, -1))).flatten(2).mT

        def forward(self, x):
            return self.out(merged(F.scaled_dot_product_attention(*first(*self.split(x, self.memory(x))))))

    module, x = randomised(Convolved(s)), torch.randn(s.batch, 48, s.heads * s.dim)
    q, k, _ = module.split(x, module.memory(x))
    return module, (x,), rows(q, k)


@style
def normalised_over_all_tokens_before(s):
    class Normed(Own):
        def __init__(self, s):
            super().__init__(s, len)
            self.norm = nn.GroupNorm(1, s.heads * s.dim)

        def forward(self, x):  # channels first, as in diffusion models
            h = self.norm(x).flatten(2).mT
            y = self.out(merged(F.scaled_dot_product_attention(*first(*self.split(h)))))
            return x + y.mT.unflatten(-1, x.shape[2:])

    module, x = randomised(Normed(s)), torch.randn(s.batch, s.heads * s.dim, 2, 5)
    q, k, _ = module.split(module.norm(x).flatten(2).mT)
    return module, (x,), rows(q, k)


@style
def images_as_convolutions_have_them(s):
    class Convolutional(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.out = nn.Conv2d(6, 3 * s.heads * s.dim, 1), nn.Conv2d(s.heads * s.dim, 6, 1)

        def split(self, x):
            return self.qkv(x).flatten(2).mT.unflatten(-1, (3, s.heads, s.dim)).unbind(2)

        def forward(self, x):
            y = merged(F.scaled_dot_product_attention(*first(*self.split(x))))
            return x + self.out(y.mT.unflatten(-1, x.shape[2:]))

    module, x = randomised(Convolutional()), torch.randn(s.batch, 6, 2, 5)
    return module, (x,), rows(*module.split(x)[:2])


@style
def one_head(s):
    class OneHead(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v = nn.Linear(6, 5), nn.Linear(6, 5), nn.Linear(6, 6)

        def forward(self, x):
            return scores_of(self.q(x), self.k(x)).softmax(-1) @ self.v(x)

    module, x = randomised(OneHead()), torch.randn(s.batch, s.tokens, 6)
    return module, (x,), rows(module.q(x)[:, :, None], module.k(x)[:, :, None])


@style
def heads_of_one_channel(s):
    s = s._replace(dim=1)

    def run(q, k, v):
        return merged(F.scaled_dot_product_attention(*first(q, k, v), scale=1.0))

    module, x = Own(s, run, project=False), torch.randn(s.batch, s.tokens, s.heads)
    q, k, _ = module.split(x)
    return module, (x,), rows(q, k)


@style
def values_that_are_the_input(s):
    class Unprojected(Own):
        def forward(self, x):
            a = scores_of(*first(*self.split(x)[:2])).softmax(-1)
            return merged(a @ x.unflatten(-1, (self.heads, -1)).transpose(1, 2))

    module, x = Unprojected(s, len), torch.randn(s.batch, s.tokens, s.heads * s.dim)
    q, k, _ = module.split(x)
    return module, (x,), rows(q, k)


# --- Mixed heads, gates, more than one map ---------------------------------------------------------------------------


@style
def talking_heads(s):
    class Talking(Own):
        def __init__(self, s):
            super().__init__(s, len)
            self.before, self.after = nn.Linear(s.heads, s.heads), nn.Linear(s.heads, s.heads)
            randomised(self)

        def forward(self, x):
            q, k, v = first(*self.split(x))
            a = self.before(scores_of(q, k).permute(0, 2, 3, 1)).softmax(2)
            return self.out(merged(self.after(a).permute(0, 3, 1, 2) @ v))

    module, x = Talking(s), torch.randn(s.batch, s.tokens, s.heads * s.dim)
    q, k = first(*(t.detach().double() for t in module.split(x)[:2]))
    mixed = torch.einsum("gh,bhqk->bgqk", module.before.weight.detach().double(), scores_of(q, k))
    return module, (x,), (mixed + module.before.bias.detach().double()[:, None, None]).softmax(-1)


@style
def scores_of_heads_mixed(s):
    class Talking(Own):
        def __init__(self, s):
            super().__init__(s, len)
            self.before = nn.Conv2d(s.heads, s.heads, 1, bias=False)
            randomised(self)

        def forward(self, x):
            q, k, v = first(*self.split(x))
            return self.out(merged(self.before(scores_of(q, k)).softmax(-1) @ v))

    module, x = Talking(s), torch.randn(s.batch, s.tokens, s.heads * s.dim)
    q, k = first(*(t.detach().double() for t in module.split(x)[:2]))
    return (
        module,
        (x,),
        torch.einsum("gh,bhqk->bgqk", module.before.weight.detach().double()[:, :, 0, 0], scores_of(q, k)).softmax(-1),
    )


@style
def a_gate_on_what_comes_out(s):
    class Gated(Own):
        def forward(self, x):
            q, k, v = first(*self.split(x))
            y = merged(scores_of(q, k).softmax(-1) @ v) * self.k(x).sigmoid()
            return self.out(y)

    module, x = Gated(s, len), torch.randn(s.batch, s.tokens, s.heads * s.dim)
    q, k, _ = module.split(x)
    return module, (x,), rows(q, k)


@style
def a_softmax_gate_beside_the_map(s):
    class Gated(Own):
        def __init__(self, s):
            super().__init__(s, len)
            self.gate = nn.Linear(s.heads * s.dim, s.heads)
            randomised(self)

        def forward(self, x):
            q, k, v = first(*self.split(x))
            y = scores_of(q, k).softmax(-1) @ v
            return self.out(merged(y * self.gate(x).softmax(-1).mT[..., None]))

    module, x = Gated(s), torch.randn(s.batch, s.tokens, s.heads * s.dim)
    q, k, _ = module.split(x)
    return module, (x,), rows(q, k)


@style
def squeeze_and_excite_beside_the_map(s):
    class Excited(Own):
        def forward(self, x):
            q, k, v = first(*self.split(x))
            y = merged(scores_of(q, k).softmax(-1) @ v)
            return self.out(y * self.k(y.mean(1, keepdim=True)).sigmoid())

    return Excited(s, len), (torch.randn(s.batch, s.tokens, s.heads * s.dim),), None


@style
def a_bias_on_the_values_side(s):
    class Convolved(Own):  # a depthwise convolution of the values beside the map, as LePE
        def __init__(self, s):
            super().__init__(s, len)
            self.conv = nn.Conv1d(s.heads * s.dim, s.heads * s.dim, 3, padding=1, groups=s.heads * s.dim)
            randomised(self)

        def forward(self, x):
            q, k, v = self.split(x)
            y = merged(F.scaled_dot_product_attention(*first(q, k, v)))
            return self.out(y + self.conv(v.flatten(2).mT).mT)

    module, x = Convolved(s), torch.randn(s.batch, s.tokens, s.heads * s.dim)
    q, k, _ = module.split(x)
    return module, (x,), rows(q, k)


@style
def difference_of_two_maps(s):
    class Differential(Own):
        def forward(self, x):
            q, k, v = self.split(x)
            (q1, q2), (k1, k2) = (t.unflatten(2, (-1, 2)).unbind(3) for t in (q, k))
            v = v.unflatten(2, (-1, 2)).flatten(3)
            one, two = (F.scaled_dot_product_attention(*first(a, b, v)) for a, b in ((q1, k1), (q2, k2)))
            return self.out(merged(one - 0.3 * two))

    s = s._replace(heads=6)
    module, x = Differential(s, len), torch.randn(s.batch, s.tokens, s.heads * s.dim)
    q, k, _ = module.split(x)
    return module, (x,), rows(q, k)  # heads in turn: one, two, one, two


@style
def only_the_class_token_is_read(s):
    class Pooled(Own):
        def forward(self, x):
            return self.out(merged(F.scaled_dot_product_attention(*first(*self.split(x)))))[:, 0]

    module, x = Pooled(s, len), torch.randn(s.batch, s.tokens, s.heads * s.dim)
    q, k, _ = module.split(x)
    return module, (x,), rows(q, k)


@style
def two_streams_attend_together(s):
    class Joint(Own):  # as in diffusion transformers: text and image, each with an output of its own
        def forward(self, x, text):
            y = merged(F.scaled_dot_product_attention(*first(*self.split(torch.cat([x, text], 1)))))
            return self.out(y[:, : x.shape[1]]), self.out(y[:, x.shape[1] :])

    module = Joint(s, len)
    x, text = torch.randn(s.batch, s.tokens, s.heads * s.dim), torch.randn(s.batch, 3, s.heads * s.dim)
    q, k, _ = module.split(torch.cat([x, text], 1))
    return module, (x, text), rows(q, k)


@style
def two_streams_put_out_in_another_order(s):
    class Joint(Own):
        def forward(self, x, text):
            y = merged(F.scaled_dot_product_attention(*first(*self.split(torch.cat([text, x], 1)))))
            return self.out(y[:, text.shape[1] :]), self.out(y[:, : text.shape[1]])

    x, text = torch.randn(s.batch, s.tokens, s.heads * s.dim), torch.randn(s.batch, 3, s.heads * s.dim)
    return Joint(s, len), (x, text), None


@style
def it_returns_its_map(s):
    class Telling(Own):
        def forward(self, x):
            q, k, v = first(*self.split(x))
            a = scores_of(q, k).softmax(-1)
            return self.out(merged(a @ v)), a

    module, x = Telling(s, len), torch.randn(s.batch, s.tokens, s.heads * s.dim)
    q, k, _ = module.split(x)
    return module, (x,), rows(q, k)


@style
def it_keeps_its_map(s):
    class Keeping(Own):
        def forward(self, x):
            q, k, v = first(*self.split(x))
            self.kept = scores_of(q, k).softmax(-1)
            return {"y": self.out(merged(self.kept @ v))}

    module, x = Keeping(s, len), torch.randn(s.batch, s.tokens, s.heads * s.dim)
    module(x)  # its attribute is a tensor of a graph
    q, k, _ = module.split(x)
    return module, (x,), rows(q, k)


def pytorchs_own(**options):
    def make(s):
        class Multihead(nn.Module):
            def __init__(self):
                super().__init__()
                self.attn = nn.MultiheadAttention(s.heads * s.dim, s.heads, batch_first=options.get("batch_first", False))

            def forward(self, x):
                return self.attn(x, x, x, need_weights=options.get("need_weights", True))

        module, x = randomised(Multihead()), torch.randn(s.batch, s.tokens, s.heads * s.dim)
        attn = module.attn
        q, k, _ = F.linear(x, attn.in_proj_weight, attn.in_proj_bias).unflatten(-1, (3, s.heads, s.dim)).unbind(2)
        return module, (x if options.get("batch_first") else x.transpose(0, 1),), rows(q, k)

    make.__name__ = "_".join(["pytorchs_own", *options])
    return style(make)


pytorchs_own()
pytorchs_own(batch_first=True)
pytorchs_own(batch_first=True, need_weights=False)


@style
def dropout_that_is_off(s):
    def run(q, k, v):
        q, k, v = first(q, k, v)
        return merged(F.dropout(scores_of(q, k).softmax(-1), 0.0, training=True) @ v)

    module, x = Own(s, run).train(), torch.randn(s.batch, s.tokens, s.heads * s.dim)
    q, k, _ = module.split(x)
    return module, (x,), rows(q, k)


# --- Windows, time -----------------------------------------------------------------------------------------------------


def cut(x: Tensor, size: int) -> Tensor:
    """(batch, height, width, ...) into (batch * windows, size * size, ...)."""
    x = x.unflatten(2, (-1, size)).unflatten(1, (-1, size)).transpose(2, 3)
    return x.flatten(0, 2).flatten(1, 2)


def joined(x: Tensor, size: int, batch: int, height: int, width: int) -> Tensor:
    return x.reshape(batch, height // size, width // size, size, size, -1).transpose(2, 3).reshape(batch, height, width, -1)


class Windowed(Own):
    """Windows of 2 by 2, rolled by `shift` first."""

    def __init__(self, s: Sizes, shift: int = 0, loop: bool = False) -> None:
        super().__init__(s, len)
        self.shift, self.loop = shift, loop

    def windows(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        return cut(x.roll((-self.shift, -self.shift), (1, 2)), 2)

    def attend(self, w: Tensor) -> Tensor:
        return merged(F.scaled_dot_product_attention(*first(*self.split(w))))

    def forward(self, x: Tensor) -> Tensor:
        b, h, w, _ = x.shape
        parts = self.windows(x)
        y = torch.cat([self.attend(p[None]) for p in parts]) if self.loop else self.attend(parts)
        y = joined(y, 2, b, h + h % 2, w + w % 2).roll((self.shift, self.shift), (1, 2))
        return self.out(y[:, :h, :w])


def windowed(name: str, height: int, width: int, **options: Any) -> None:
    def make(s):
        module, x = Windowed(s, **options), torch.randn(s.batch, height, width, s.heads * s.dim)
        q, k, _ = module.split(module.windows(x))
        return module, (x,), rows(q, k)

    make.__name__ = name
    style(make)


windowed("windows", 4, 6)
windowed("windows_one_after_the_other", 2, 6, loop=True)
windowed("windows_that_are_padded", 3, 5)


@style
def shifted_windows(s):
    module, x = Windowed(s, shift=1), torch.randn(s.batch, 4, 6, s.heads * s.dim)
    q, k, _ = module.split(module.windows(x))
    return module, (x,), rows(q, k)


@style
def windows_that_are_all_alike(s):
    module, x = Windowed(s), torch.randn(s.batch, 2, 2, s.heads * s.dim).repeat(1, 2, 3, 1)
    q, k, _ = module.split(module.windows(x))
    return module, (x,), rows(q, k)


def parts_of(tokens: int) -> list[int]:
    return [2, 3, max(tokens, 8) - 5]


@style
def windows_of_different_sizes(s):
    def run(q, k, v):
        parts = [t.split(parts_of(q.shape[1]), 1) for t in (q, k, v)]
        return merged(torch.cat([F.scaled_dot_product_attention(*first(*p)) for p in zip(*parts)], 2))

    module, x = Own(s, run), torch.randn(s.batch, max(s.tokens, 8), s.heads * s.dim)
    q, k, _ = (t.split(parts_of(s.tokens), 1) for t in module.split(x))
    most = max(parts_of(s.tokens))
    windows = [F.pad(rows(a, b), (0, most - a.shape[1], 0, most - a.shape[1])) for a, b in zip(q, k)]
    return module, (x,), torch.stack(windows, 1).flatten(0, 1)  # filled up with zeros


@style
def packed_sequences_as_qwen_has_them(s):
    class Packed(Own):
        def forward(self, x, lengths):
            q, k, v = (t[None].transpose(1, 2) for t in self.split(x))
            parts = zip(*(t.split(lengths.tolist(), 2) for t in (q, k, v)))
            return self.out(torch.cat([F.scaled_dot_product_attention(*p).transpose(1, 2) for p in parts], 1).flatten(2)[0])

    module, x = Packed(s, len), torch.randn(s.batch * 2 * s.tokens, s.heads * s.dim)
    q, k, _ = module.split(x.view(2 * s.batch, s.tokens, -1))
    return module, (x, torch.tensor([s.tokens] * (2 * s.batch))), rows(q, k)


class Video(Own):
    """(batch, time, space, channels): attention over space, over time, or over both."""

    def __init__(self, s: Sizes, over: str) -> None:
        super().__init__(s, len)
        self.over = over

    def tokens(self, x: Tensor) -> Tensor:
        return {"space": x.flatten(0, 1), "time": x.transpose(1, 2).flatten(0, 1), "both": x.flatten(1, 2)}[self.over]

    def forward(self, x: Tensor) -> Tensor:
        b, t, n, _ = x.shape
        y = merged(F.scaled_dot_product_attention(*first(*self.split(self.tokens(x)))))
        return self.out(y.view(b, n, t, -1).transpose(1, 2) if self.over == "time" else y.view(b, t, n, -1))


def video(over: str) -> None:
    def make(s):
        module, x = Video(s, over), torch.randn(s.batch, 3, s.tokens, s.heads * s.dim)
        q, k, _ = module.split(module.tokens(x))
        return module, (x,), rows(q, k)

    make.__name__ = f"video_over_{over}"
    style(make)


for over in ("space", "time", "both"):
    video(over)


@style
def neighbours_of_each_query(s):
    class Local(Own):
        def forward(self, x):
            q, k, v = self.split(x)
            k, v = (F.pad(t, (0, 0, 0, 0, 1, 1)).unfold(1, 3, 1) for t in (k, v))  # (batch, queries, heads, dim, 3)
            a = (torch.einsum("bqhd,bqhdk->bhqk", q, k) * q.shape[-1] ** -0.5).softmax(-1)
            return self.out(torch.einsum("bhqk,bqhdk->bqhd", a, v).flatten(2))

    module, x = Local(s, len), torch.randn(s.batch, s.tokens, s.heads * s.dim)
    q, k = (t.detach().double() for t in module.split(x)[:2])
    k = F.pad(k, (0, 0, 0, 0, 1, 1))
    near = torch.stack([k[:, i : i + s.tokens] for i in range(3)], -1)
    return module, (x,), ((q[..., None] * near).sum(3) * s.dim**-0.5).softmax(-1).transpose(1, 2)


# --- Keys in another order: by the tokens they carry, or refused -----------------------------------------------------


@style
def tokens_reversed_and_back(s):
    def run(q, k, v):
        q, k, v = (t.flip(1) for t in (q, k, v))
        return merged(F.scaled_dot_product_attention(*first(q, k, v))).flip(1)

    module, x = Own(s, run), torch.randn(s.batch, s.tokens, s.heads * s.dim)
    q, k, _ = module.split(x)
    return module, (x,), rows(q, k)


@style
def keys_rolled(s):
    def run(q, k, v):
        k, v = (t.roll(2, 1) for t in (k, v))
        return merged(F.scaled_dot_product_attention(*first(q, k, v)))

    module, x = Own(s, run), torch.randn(s.batch, s.tokens, s.heads * s.dim)
    q, k, _ = module.split(x)
    return module, (x,), rows(q, k)


# --- No map over pairs of tokens -------------------------------------------------------------------------------------


@no_map
def linear_attention_with_one_softmax(q, k, v):
    q, k, v = first(q, k, v)
    return merged(q @ (k.mT.softmax(-1) @ v))


@no_map
def linear_attention_with_two(q, k, v):
    q, k, v = first(q, k, v)
    return merged(q.softmax(-1) @ (k.softmax(-2).mT @ v))


@no_map
def linear_attention_of_elu(q, k, v):
    q, k, v = first(q, k, v)
    q, k = F.elu(q) + 1, F.elu(k) + 1
    return merged(q @ (k.mT @ v) / (q @ k.sum(2)[..., None]))


@no_map
def attention_over_channels(q, k, v):
    q, k, v = (t.mT for t in first(F.normalize(q, dim=1), F.normalize(k, dim=1), v))
    return merged(((q @ k.mT).softmax(-1) @ v).mT)


@no_map
def two_steps(q, k, v):
    q, k, v = first(q, k, v)
    agents = F.adaptive_avg_pool1d(q.flatten(0, 1).mT, 2).mT.unflatten(0, q.shape[:2])
    return merged(scores_of(q, agents).softmax(-1) @ (scores_of(agents, k).softmax(-1) @ v))


@no_map
def one_head_feeds_the_next(q, k, v):
    out, y = [], 0
    for a, b, c in zip(*(t.unbind(2) for t in (q, k, v))):
        y = scores_of(a, b).softmax(-1) @ (c + y)
        out.append(y)
    return torch.cat(out, -1)


@no_map
def slots(q, k, v):
    q, k, v = first(q, k, v)
    a = scores_of(q, k).softmax(2) + 1e-6
    return merged(a @ v / a.sum(-1, keepdim=True))


@no_map
def rows_normalised_later(q, k, v):
    q, k, v = first(q, k, v)
    weights = scores_of(q, k).exp()
    return merged((weights @ v) / weights.sum(-1, keepdim=True))


@no_map
def blocks_of_keys(q, k, v):
    q, k, v = first(q, k, v)
    weights, parts = scores_of(q, k).softmax(-1), 0
    for i in range(0, k.shape[2] // 2 * 2, k.shape[2] // 2):
        j = slice(i, i + k.shape[2] // 2)
        parts = parts + weights[..., j] @ v[:, :, j]
    return merged(parts)


@no_map
def chunks_with_more_and_more_keys(q, k, v):
    q, k, v = first(q, k, v)
    ends = range(2, q.shape[2] + 2, 2)
    return merged(torch.cat([scores_of(q[:, :, e - 2 : e], k[:, :, :e]).softmax(-1) @ v[:, :, :e] for e in ends], 2))


@no_map
def context_for_all_places(q, k, v):
    weights = q.mean(-1, keepdim=True).softmax(1)
    return (k.sigmoid() * (weights * v).sum(1, keepdim=True)).flatten(2)


@no_map
def random_features(q, k, v):
    features = torch.randn(q.shape[-1], 8)
    q, k = ((t @ features).relu() for t in first(q, k))
    return merged(q @ (k.mT @ v.transpose(1, 2)))


@no_map
def random_scores(q, k, v):
    q, k, v = first(q, k, v)
    return merged((scores_of(q, k) + torch.rand(q.shape[2], k.shape[2])).softmax(-1) @ v)


@no_map
def numpy_in_between(q, k, v):
    q, k, v = (t.detach().numpy() for t in first(q, k, v))
    weights = np.exp(q @ k.swapaxes(-1, -2) * q.shape[-1] ** -0.5)
    return merged(torch.from_numpy((weights / weights.sum(-1, keepdims=True)) @ v))


@no_map
def no_products_at_all(q, k, v):
    return (q.sigmoid() * k.tanh() + v).flatten(2)


@style
def all_images_are_one_sequence(s):
    def run(q, k, v):
        y = F.scaled_dot_product_attention(*(t.flatten(0, 1).transpose(0, 1) for t in (q, k, v)))
        return y.transpose(0, 1).unflatten(0, q.shape[:2]).flatten(2)

    return Own(s, run), (torch.randn(max(2, s.batch), s.tokens, s.heads * s.dim),), None


@style
def deformable(s):
    class Deformable(Own):
        def __init__(self):
            super().__init__(s, len)
            self.where, self.weights = nn.Linear(s.heads * s.dim, s.heads * 8), nn.Linear(s.heads * s.dim, s.heads * 4)
            randomised(self)

        def forward(self, x, image):  # image: (batch, channels, height, width)
            b, n, _ = x.shape
            points = self.where(x).view(b, n, self.heads, 4, 2).tanh().transpose(1, 2).flatten(0, 1)
            weights = self.weights(x).view(b, n, self.heads, 4).softmax(-1)
            value = self.v(image.flatten(2).mT).mT.unflatten(1, (self.heads, -1)).flatten(0, 1).unflatten(-1, image.shape[2:])
            sampled = F.grid_sample(value, points, align_corners=False)  # (batch * heads, dim, queries, points)
            weights = weights.transpose(1, 2).reshape(b * self.heads, 1, n, 4)
            return self.out((sampled * weights).sum(-1).view(b, -1, n).mT)

    args = torch.randn(s.batch, s.tokens, s.heads * s.dim), torch.randn(s.batch, s.heads * s.dim, 5, 6)
    return Deformable(), args, None


def criss_cross(height: int, width: int) -> None:
    class CrissCross(Own):
        def forward(self, x):  # (batch, height, width, channels): each place asks its row and its column
            q, k, v = self.split(x)
            row = torch.einsum("bhwnd,bhvnd->bnhwv", q, k).softmax(-1)
            column = torch.einsum("bhwnd,bgwnd->bnhwg", q, k).softmax(-1)
            y = torch.einsum("bnhwv,bhvnd->bhwnd", row, v) + torch.einsum("bnhwg,bgwnd->bhwnd", column, v)
            return self.out(y.flatten(3))

    def make(s):
        return CrissCross(s, len), (torch.randn(s.batch, height, width, s.heads * s.dim),), None

    make.__name__ = f"criss_cross_{height}_by_{width}"
    style(make)


criss_cross(3, 5)
criss_cross(4, 4)


@no_map
def steps_in_one_module(q, k, v):
    q, k, v = first(q, k, v)
    y = scores_of(q, k).softmax(-1) @ v
    return merged(scores_of(y, k).softmax(-1) @ y)


@no_map
def a_mean_over_tokens_afterwards(q, k, v):
    return merged(F.scaled_dot_product_attention(*first(q, k, v))).mean(1)


@no_map
def a_softmax_that_is_carried_along(q, k, v):
    q, k, v = first(q, k, v)
    top, total, out = torch.full((*q.shape[:3], 1), -1e9), 0, 0
    for i in range(0, k.shape[2], 2):
        scores = scores_of(q, k[:, :, i : i + 2])
        now = torch.maximum(top, scores.amax(-1, keepdim=True))
        weights, less, top = (scores - now).exp(), (top - now).exp(), now
        total, out = total * less + weights.sum(-1, keepdim=True), out * less + weights @ v[:, :, i : i + 2]
    return merged(out / total)


# --- Whatever else people do -----------------------------------------------------------------------------------------


@own
def values_in_two_parts(q, k, v):
    q, k, v = first(q, k, v)
    a = scores_of(q, k).softmax(-1)
    return merged(torch.cat([a @ v[..., :2], a @ v[..., 2:]], -1))


@own
def a_gate_for_all_images_together(q, k, v):
    return merged(F.scaled_dot_product_attention(*first(q, k, v))) * q.mean().sigmoid()


@own
def product_into_a_given_tensor(q, k, v):
    images, (q, k, v) = len(q), (t.flatten(0, 1) for t in first(q, k, v))
    out = torch.empty_like(q)
    torch.bmm(scores_of(q, k).softmax(-1), v, out=out)
    return merged(out.unflatten(0, (images, -1)))


@own
def under_vmap(q, k, v):
    return merged(torch.vmap(torch.vmap(lambda a, b, c: scores_of(a, b).softmax(-1) @ c))(*first(q, k, v)))


@own
def in_a_checkpoint(q, k, v):
    attend = lambda q, k, v: scores_of(q, k).softmax(-1) @ v  # noqa: E731
    return merged(checkpoint(attend, *first(q, k, v), use_reentrant=False))


class Function(torch.autograd.Function):
    @staticmethod
    def forward(_, q, k, v):
        return scores_of(q, k).softmax(-1) @ v

    @staticmethod
    def backward(_, g):
        return g, g, g


@own
def a_function_with_a_derivative_of_its_own(q, k, v):
    return merged(Function.apply(*first(q, k, v)))


@own
def cut_off_from_the_graph(q, k, v):
    return merged(F.scaled_dot_product_attention(*first(q, k, v.detach()))).detach()


@own
def heads_mixed_afterwards_as_the_token_wants(q, k, v):
    y = F.scaled_dot_product_attention(*first(q, k, v))
    mixing = q[:, :, :, None, 0].sigmoid() * k[:, :, None, :, 0].tanh()  # (batch, tokens, heads, heads)
    return torch.einsum("bngh,bhnd->bngd", mixing, y).flatten(2)


@own
def sum_of_an_expanded_product(q, k, v):
    a = (torch.einsum("bqhd,bkhd->bqkh", q, k) * q.shape[-1] ** -0.5).softmax(2)
    shape = (*a.shape, v.shape[-1])
    return (a[..., None].expand(shape) * v[:, None].expand(shape)).sum(2).flatten(2)


# --- Outputs and keys of odd shapes ------------------------------------------------------------------------------------


@bare
def heads_queries_and_channels_in_one_axis(q, k, v):
    return F.scaled_dot_product_attention(*first(q, k, v)).flatten(1)


@bare
def queries_and_channels_in_one_axis(q, k, v):
    return merged(F.scaled_dot_product_attention(*first(q, k, v))).flatten(1)


@bare
def outputs_of_half_the_channels_each(q, k, v):
    y = F.scaled_dot_product_attention(*first(q, k, v))
    return y[..., :2], y[..., 2:].sin()


@style
def one_key(s):
    def run(q, k, v):
        q, k, v = first(q, k, v)
        a = torch.einsum("bhid,bhjd->bhij", q, k[:, :, :1]).softmax(-1)
        return merged(torch.einsum("bhij,bhjd->bhid", a, v[:, :, :1]))

    module, x = Own(s, run), torch.randn(s.batch, s.tokens, s.heads * s.dim)
    return module, (x,), torch.ones(s.batch, s.heads, s.tokens, 1, dtype=torch.float64)


@own
def softmax_by_a_sum_of_exponentials_times_mask(q, k, v):
    q, k, v = first(q, k, v)
    e = scores_of(q, k).exp() * torch.ones(q.shape[-2], k.shape[-2])
    return merged((e / e.sum(-1, keepdim=True)) @ v)


@style
def a_mask_after_the_softmax(s):
    class Masked(Own):
        def forward(self, x, hidden):
            q, k, v = first(*self.split(x))
            return self.out(merged(scores_of(q, k).softmax(-1).masked_fill(hidden[:, None, None], 0.0) @ v))

    module, x = Masked(s, None), torch.randn(s.batch, s.tokens, s.heads * s.dim)
    q, k, _ = module.split(x)
    hidden = torch.zeros(s.batch, s.tokens, dtype=torch.bool)
    hidden[:, -1] = True
    return module, (x, hidden), rows(q, k) * ~hidden[:, None, None]


@own
def rows_of_the_softmax_beside_the_map(q, k, v):
    q, k, v = first(q, k, v)
    a = scores_of(torch.cat([q, q.mean(2, keepdim=True)], 2), k).softmax(-1)
    return merged(a[:, :, :-1] @ v) * (1 + a[:, :, -1].square().sum())
