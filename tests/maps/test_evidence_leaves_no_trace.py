"""Axes by evidence: what is asked of the module is not noticed by it, and what cannot hold is refused."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.inside import establish_axes, forget_what_was_established, no_more_evidence, replay
from support.styles import ODD, STYLES, Own, first, merged, rows, scores_of
from torch import Tensor, nn

from hookattn.errors import UnreadableError


def attention(run: Callable[..., Any]) -> tuple[Own, Tensor, Tensor]:
    """A module, what it is called with, its true map."""
    module, x = Own(ODD, run), torch.randn(ODD.batch, ODD.tokens, ODD.heads * ODD.dim)
    q, k, _ = module.split(x)
    return module, x, rows(q, k)


def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = first(q, k, v)
    return merged(scores_of(q, k).softmax(-1) @ v)


def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return merged(F.scaled_dot_product_attention(*first(q, k, v)))


class Moody(Own):
    """Has everything that a forward may leave a trace in."""

    def __init__(self) -> None:
        super().__init__(ODD, eager)
        width = ODD.heads * ODD.dim
        self.norm = nn.BatchNorm1d(width)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("mean", torch.zeros(width))
        self.seen: list[Any] = []
        self.cache: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.mean.mul_(0.9).add_(x.mean((0, 1)))
        x += 0.0
        x = self.norm(x.mT).mT
        self.seen.append(x)
        self.cache["x"] = x
        self.last = x
        return super().forward(x)


def contents(value: Any) -> Any:
    """What something holds, by identity."""
    if isinstance(value, (list, dict)):
        return list(map(id, value.values() if isinstance(value, dict) else value))
    return id(value)


def state(module: nn.Module, x: Tensor) -> dict[str, Any]:
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers()), "x": x}
    return {
        "held": [{name: contents(value) for name, value in vars(m).items()} for m in module.modules()],
        "values": {name: t.detach().clone() for name, t in tensors.items()},
        "versions": {name: t._version for name, t in tensors.items()},
        "gradients": {name: t.grad for name, t in tensors.items()},
        "modes": [m.training for m in module.modules()],
        "random": torch.get_rng_state(),
        "grad": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")),
    }


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("fails", [True, False])
def test_the_module_does_not_notice(training: bool, fails: bool) -> None:
    module, x = Moody().train(training), torch.randn(ODD.batch, ODD.tokens, ODD.heads * ODD.dim)
    if fails:
        module.run = lambda q, k, v: [][1]
    before = state(module, x)
    for _ in range(2):
        try:
            replay(module, x)
        except IndexError:
            assert fails
    after = state(module, x)
    torch.testing.assert_close(after.pop("values"), before.pop("values"), rtol=0, atol=0)
    assert torch.equal(after.pop("random"), before.pop("random"))
    assert after == before


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_any_grad_mode(mode: Callable[[], Any]) -> None:
    with mode():
        module, x, true = attention(eager)
        got = replay(module, x)
        assert not got.requires_grad
    torch.testing.assert_close(got.double(), true.double(), atol=1e-5, rtol=1e-4)


def test_the_graph_of_the_user_is_left_alone() -> None:
    module, x, _ = attention(eager)
    x.requires_grad_()
    y = module(x)
    replay(module, x)
    y.sum().backward()
    assert x.grad is not None
    gradient = x.grad.clone()
    x.grad = None
    module(x).sum().backward()
    assert torch.equal(x.grad, gradient)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("run", [eager, fused])
def test_a_map_is_as_exact_as_its_inputs(dtype: torch.dtype, run: Any) -> None:
    module, x, _ = attention(run)
    module, x = module.to(dtype), x.to(dtype)
    got = replay(module, x)
    q, k, _ = copy.deepcopy(module).double().split(x.double())
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    # in half precision the scores are those that the module has formed
    torch.testing.assert_close(got.double(), rows(q, k), atol=1e-6 if dtype == torch.float64 else 0.02, rtol=1e-5)


def test_under_autocast_nothing_of_ours_stays_in_its_cache() -> None:
    module, x, true = attention(eager)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        want = module(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = replay(module, x)
        assert torch.equal(module(x), want)
    torch.testing.assert_close(got.double(), true, atol=0.02, rtol=0.0)


def test_a_forward_that_casts_itself_is_read_exactly() -> None:
    class Casting(Own):
        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return super().forward(x).float()

    module, x = Casting(ODD, eager), torch.randn(ODD.batch, ODD.tokens, ODD.heads * ODD.dim)
    want = module(x)
    q, k, _ = module.split(x)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=False):
        got = replay(module, x)
        assert torch.equal(module(x), want)
    torch.testing.assert_close(got.double(), rows(q, k), atol=0.02, rtol=0.0)


DROPOUT = {
    "module": lambda q, k, v: merged(F.dropout(scores_of(*first(q, k)).softmax(-1), 0.5) @ v.transpose(1, 2)),
    "fused": lambda q, k, v: merged(F.scaled_dot_product_attention(*first(q, k, v), dropout_p=0.5)),
    "fused, by position": lambda q, k, v: merged(F.scaled_dot_product_attention(*first(q, k, v), None, 0.5)),
}


@pytest.mark.parametrize("name", DROPOUT)
def test_dropout_is_left_out(name: str) -> None:
    module, x, true = attention(DROPOUT[name])
    module.train()
    torch.testing.assert_close(replay(module, x).double(), true, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("options", [{}, {"need_weights": False}])
def test_dropout_of_pytorchs_own_is_left_out(options: dict[str, bool]) -> None:
    module, x = nn.MultiheadAttention(15, 3, dropout=0.5, batch_first=True).train(), torch.randn(2, 7, 15)
    q, k, _ = F.linear(x, module.in_proj_weight, module.in_proj_bias).unflatten(-1, (3, 3, 5)).unbind(2)
    got = replay(module, x, x, x, **options)
    torch.testing.assert_close(got.double(), rows(q, k), atol=1e-5, rtol=1e-4)


def test_a_map_that_is_made_of_random_draws_is_refused() -> None:
    for draw in (torch.rand_like, torch.randn_like, torch.bernoulli, lambda a: torch.empty_like(a).bernoulli_(0.5)):
        module, x, true = attention(lambda q, k, v, draw=draw: eager(q, k, v) + draw(k.flatten(2).sigmoid()))
        torch.testing.assert_close(replay(module, x).double(), true, atol=1e-5, rtol=1e-4)
        module, x, _ = attention(lambda q, k, v, draw=draw: eager(q + draw(q.sigmoid()), k, v))
        with pytest.raises(UnreadableError, match="made of random numbers"):
            replay(module, x)


def test_names_of_attributes_mean_nothing() -> None:
    module, x, true = attention(eager)
    module.heads_told = module.num_heads = module.num_attention_heads = 7
    torch.testing.assert_close(replay(module, x).double(), true, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("weight", "value"), [(0.0, 0.0), (0.1, 1.0)])
@pytest.mark.parametrize("name", ["heads_third", "chunks_of_queries", "windows", "video_over_time"])
def test_values_that_coincide_do_not_mislead(name: str, weight: float, value: float) -> None:
    """Weights that begin at zero, images that are black: axes are those of any other call."""
    module, (x,), true = STYLES[name].make(ODD)
    blank = copy.deepcopy(module)
    for p in blank.parameters():
        p.data.fill_(weight)
    forget_what_was_established()
    replay(blank, torch.full_like(x, value))
    with no_more_evidence():
        torch.testing.assert_close(replay(module, x).double(), true, atol=1e-5, rtol=1e-4)


def test_what_was_established_holds_for_the_same_sizes_and_the_same_way() -> None:
    forget_what_was_established()
    module, x, _ = attention(lambda q, k, v: eager(q, k, v) if q.sum() > 0 else eager(v.exp(), k, q))
    module.q.bias.data.fill_(9.0)
    replay(module, x)
    with no_more_evidence():
        replay(module, x + 0.1)
        replay(copy.deepcopy(module), x)
        for other in (x[:, 1:], x[:1]):
            with pytest.raises(AssertionError, match="evidence"):
                replay(module, other)
        module.q.bias.data.fill_(-9.0)
        with pytest.raises(AssertionError, match="evidence"):
            replay(module, x)


def test_counts_in_the_arguments_are_part_of_what_was_established() -> None:
    forget_what_was_established()
    module, (x, lengths), true = STYLES["packed_sequences_as_qwen_has_them"].make(ODD)
    torch.testing.assert_close(replay(module, x, lengths).double(), true, atol=1e-5, rtol=1e-4)
    with no_more_evidence(), pytest.raises(AssertionError, match="evidence"):
        replay(module, x, lengths + torch.tensor([1, -1, 0, 0]))


def test_indices_that_a_forward_goes_by_are_part_of_what_was_established() -> None:
    class Shuffled(Own):
        order = torch.arange(ODD.tokens)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x[:, self.order])

    forget_what_was_established()
    module, x = Shuffled(ODD, eager), torch.randn(ODD.batch, ODD.tokens, ODD.heads * ODD.dim)
    replay(module, x)
    Shuffled.order = Shuffled.order.flip(0)
    with no_more_evidence(), pytest.raises(AssertionError, match="evidence"):
        replay(module, x)


class Cache:
    __slots__ = ()

    def update(self) -> None: ...


def test_arguments_that_cannot_be_copied_are_refused() -> None:
    module, x, _ = attention(eager)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nested tensors are a prototype
        odd = [torch.nested.nested_tensor([x[0], x[1, 1:]]), x.to_sparse(), Cache()]
    for value in odd:
        with pytest.raises(UnreadableError, match="it was called with a"):
            establish_axes(module, (value,), {}, [])


def test_a_refusal_says_what_was_found_and_what_to_type() -> None:
    module, args, _ = STYLES["attention_over_channels"].make(ODD)
    with pytest.raises(
        UnreadableError, match=r"^'module': Own: .*\(6, 5, 5\) feeds many places.*; describe its map with @hookattn\.recipe\.$"
    ):
        replay(module, *args)
