"""What a class, or a module, was first called under, or made with, does not matter: each call reads as in a fresh process."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from support.inside import forget_what_was_established
from support.models import randomise
from torch import Tensor, nn

from hookattn import AttentionMap, AttentionRecorder, HookattnError

B, H, N, D = 2, 3, 8, 5
Attend = Callable[..., Any]


class Own(nn.Module):
    """Hands tokens, and itself, to `run`; `option` is what it is made with."""

    def __init__(self, run: Attend, option: Any = None) -> None:
        super().__init__()
        self.run, self.option = run, [option]  # in a list, where none would look for it
        self.qkv, self.out, self.mix = nn.Linear(H * D, 3 * H * D), nn.Linear(H * D, H * D), nn.Linear(H, H)
        self.norm, self.conv = nn.LayerNorm(H * D), nn.Conv1d(H * D, H * D, 1)
        randomise(self, 0.4).eval()

    def split(self, x: Tensor) -> list[Tensor]:
        return [t.unflatten(-1, (H, D)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1)]

    def forward(self, *args: Any) -> Any:
        return self.run(self, self.option[0], *args)


class Call(NamedTuple):
    module: nn.Module
    args: tuple[Any, ...]
    under: Callable[[], AbstractContextManager[Any]] = nullcontext
    option: Any = None  # of the module, set before the call


def softmax(q: Tensor, k: Tensor) -> Tensor:
    return (q @ k.mT * D**-0.5).softmax(-1)


def merged(y: Tensor) -> Tensor:
    return y.transpose(1, 2).flatten(2)


def numbers(seed: int = 0) -> Tensor:
    return torch.randn(B, N, H * D, generator=torch.Generator().manual_seed(seed))


def read(call: Call) -> dict[str, Tensor | str]:
    """All that is read of a call; for what is refused, nothing but that it is."""

    def given(f: Callable[[], Tensor]) -> Tensor | str:
        try:
            return f()
        except HookattnError:
            return "refused"

    module, args, under, option = call
    if option is not None:
        module.option = [option]
    torch.manual_seed(0)
    with AttentionRecorder(nn.Sequential(module), layers="0") as rec, torch.no_grad(), under():
        module(*args)
    if "0" not in rec.maps:
        return dict.fromkeys(("map", "effective", "v", "q", "output"), "refused")
    m: AttentionMap = rec.maps["0"]
    kinds = {"map": m, "effective": m.effective, "v": m.v, "q": m.q}
    return {**{kind: given(lambda a=a: a[...]) for kind, a in kinds.items()}, "output": given(m.output)}


# --- Ways to attend ----------------------------------------------------------------------------------------------------


def parts(self: Own, order: list[int], x: Tensor) -> Tensor:
    q, k, v = self.split(x)
    each = [softmax(part, k) @ v for part in q.chunk(4, 2)]
    return self.out(merged(torch.cat([each[i] for i in order], 2)))


def images(self: Own, order: list[int], x: Tensor) -> Tensor:
    each = [softmax(q, k) @ v for q, k, v in zip(*self.split(x))]
    return self.out(merged(torch.stack([each[i] for i in order])))


def heads(self: Own, order: list[int], x: Tensor) -> Tensor:
    each = [softmax(q, k) @ v for q, k, v in zip(*(t.unbind(1) for t in self.split(x)))]
    return self.out(torch.cat([each[i] for i in order], -1))


def streams(self: Own, order: list[int], *both: Tensor) -> Any:
    y = merged(F.scaled_dot_product_attention(*self.split(torch.cat([both[i] for i in order], 1))))
    each = self.out(y).chunk(2, 1)
    return tuple(each[order.index(i)] for i in (0, 1))


def one_of_two_maps(self: Own, which: int, x: Tensor, other: Tensor) -> Tensor:
    (q, k, v), (p, j, _) = self.split(x), self.split(other)
    return self.out(merged((softmax(q, k), softmax(p, j))[which] @ v))


def one_of_two_outputs(self: Own, which: int, x: Tensor) -> Tensor:
    q, k, v = self.split(x)
    y = merged(softmax(q, k) @ v)
    return (self.out(y), self.norm(y))[which]


def mixed_if(ask: Callable[..., bool]) -> Attend:
    def run(self: Own, option: Any, x: Tensor, *more: Tensor) -> Tensor:
        q, k, v = self.split(x)
        a = softmax(q, k)
        a = self.mix(a.transpose(1, -1)).transpose(1, -1) if ask(option, x, *more) else a
        return self.out(merged(a @ v))

    return run


def masked_later(self: Own, _: Any, x: Tensor, mask: Tensor) -> Tensor:
    q, k, v = self.split(x)
    return self.out(merged((softmax(q, k) * mask) @ v))


def kept_alone(self: Own, _: Any, x: Tensor, kept: Tensor) -> Tensor:
    y = self.out(merged(F.scaled_dot_product_attention(*self.split(x[kept].view(B, -1, H * D)))))
    out = torch.zeros_like(x)
    out[kept] = y.flatten(0, 1)
    return out


def by_gather(x: Tensor, order: Tensor) -> Tensor:
    return x.gather(1, order[..., None].expand_as(x))


def by_index(x: Tensor, order: Tensor) -> Tensor:
    return x[torch.arange(len(x))[:, None], order]


def by_writing(x: Tensor, order: Tensor) -> Tensor:
    out = torch.empty_like(x)
    out[torch.arange(len(x))[:, None], order.argsort(-1)] = x
    return out


def in_order_of_values(put: Callable[[Tensor, Tensor], Tensor]) -> Attend:
    def run(self: Own, _: Any, x: Tensor) -> Tensor:
        order = x.norm(dim=-1).sort(-1).indices
        q, k, v = self.split(put(x, order))
        return self.out(put(merged(softmax(q, k) @ v), order.argsort(-1)))

    return run


def at_found_positions(self: Own, _: Any, x: Tensor) -> Tensor:
    positions = x.mean(-1).argmax(-1)[:, None] + torch.arange(N)
    q, k, v = self.split(x)
    return self.out(merged(softmax(q + self.out.weight[positions % D, :D][:, None], k) @ v))


def random_scores(self: Own, _: Any, x: Tensor) -> Tensor:
    q, k, v = self.split(x)
    return self.out(merged((q @ k.mT + torch.rand(N, N)).softmax(-1) @ v))


def convolved(self: Own, _: Any, x: Tensor) -> Tensor:
    return self.out(merged(F.scaled_dot_product_attention(*self.split(self.conv(x.mT).mT))))


def normed_and_gated(self: Own, _: Any, x: Tensor) -> Tensor:
    q, k, v = self.split(x)
    return x + self.out(self.norm(merged(softmax(q, k) @ v)) * x.sigmoid())


def maps_subtracted(self: Own, _: Any, x: Tensor) -> Tensor:
    (q, k, v), (p, j, _) = self.split(x), self.split(x + 1)
    one, two = (F.scaled_dot_product_attention(*each, v) for each in ((q, k), (p, j)))
    return self.out(merged(one - 0.3 * two))


def without_a_softmax(self: Own, _: Any, x: Tensor) -> Tensor:
    q, k, v = self.split(x)
    return self.out(merged((q @ k.mT).sigmoid() @ v))


def plain(self: Own, _: Any, x: Tensor) -> Tensor:
    q, k, v = self.split(x)
    return self.out(merged(softmax(q, k) @ v))


# --- One call after the other ------------------------------------------------------------------------------------------


def made_with(run: Attend, one: Any, other: Any, *args: Tensor) -> tuple[Call, Call]:
    """Of two modules of one class."""
    return Call(Own(run, one), args), Call(Own(run, other), args)


def of_one(run: Attend, one: tuple[Any, ...], other: tuple[Any, ...], **more: Any) -> tuple[Call, Call]:
    """Of one module."""
    module = Own(run)
    return Call(module, one), Call(module, other, **more)


def as_dtype(run: Attend, dtype: torch.dtype) -> tuple[Call, Call]:
    module, x = Own(run), numbers()
    return Call(copy.deepcopy(module).to(dtype), (x.to(dtype),)), Call(module, (x,))


def asked_in_place(ask: Callable[..., bool]) -> tuple[Call, Call]:
    module = Own(mixed_if(ask))
    return Call(module, (numbers(),), option=1), Call(module, (numbers(),), option=2)


def under(what: Callable[[], AbstractContextManager[Any]], ask: Callable[..., bool]) -> tuple[Call, Call]:
    module = Own(mixed_if(ask))
    return Call(module, (numbers(),), what), Call(module, (numbers(),))


def in_train_mode(run: Attend) -> tuple[Call, Call]:
    module = Own(run)
    return Call(copy.deepcopy(module).train(), (numbers(),)), Call(module, (numbers(),))


def in_inference_mode(run: Attend) -> tuple[Call, Call]:
    with torch.inference_mode():
        module = Own(run)
    return Call(module, (numbers(),)), Call(Own(run), (numbers(),))


def masks(diagonal: bool, dtype: torch.dtype) -> tuple[Call, Call]:
    odd = torch.eye(N) if diagonal else torch.zeros(N, N)
    return of_one(masked_later, (numbers(), odd.to(dtype)), (numbers(), torch.ones(N, N).tril().to(dtype)))


def choose(*places: int) -> Tensor:
    return torch.zeros(B * N, dtype=torch.bool).index_fill(0, torch.tensor(places), True).view(B, N)


def strided(x: Tensor) -> Tensor:
    return x.mT.contiguous().mT


NONE, LAST = torch.zeros(B, N, dtype=torch.bool), torch.arange(N).expand(B, N) == N - 1
X, Y = numbers(), numbers(1)
SORTED = F.normalize(X, dim=-1) * torch.arange(1, N + 1)[:, None]
PAIRS: dict[str, Callable[[], tuple[Call, Call]]] = {
    "parts in another order": lambda: made_with(parts, [0, 1, 2, 3], [2, 0, 3, 1], X),
    "images in another order": lambda: made_with(images, [0, 1], [1, 0], X),
    "heads in another order": lambda: made_with(heads, [0, 1, 2], [2, 0, 1], X),
    "streams in another order": lambda: made_with(streams, [0, 1], [1, 0], X, Y),
    "another map": lambda: made_with(one_of_two_maps, 0, 1, X, Y),
    "another output": lambda: made_with(one_of_two_outputs, 0, 1, X),
    "a list that is written into": lambda: asked_in_place(lambda option, _: option == 2),
    "a mask that is asked": lambda: of_one(mixed_if(lambda _, x, mask: bool(mask.any())), (X, NONE), (X, LAST)),
    "strides": lambda: of_one(mixed_if(lambda _, x: x.is_contiguous()), (X,), (strided(X),)),
    "values": lambda: of_one(mixed_if(lambda _, x: bool(x.sum() > 0)), (X.abs(),), (-X.abs(),)),
    "autocast": lambda: under(lambda: torch.autocast("cpu", torch.bfloat16), lambda *_: torch.is_autocast_enabled("cpu")),
    "a diagonal mask": lambda: masks(True, torch.bool),
    "a mask of zeros": lambda: masks(False, torch.float32),
    "other tokens chosen": lambda: of_one(kept_alone, (X, choose(0, 1, 8, 9)), (X, choose(3, 5, 8, 15))),
    "tokens chosen across images": lambda: of_one(kept_alone, (X, choose(0, 1, 8, 9)), (X, choose(0, 1, 2, 9))),
    "tokens in order, gathered": lambda: of_one(in_order_of_values(by_gather), (SORTED,), (X,)),
    "tokens in order, indexed": lambda: of_one(in_order_of_values(by_index), (SORTED,), (X,)),
    "tokens in order, written": lambda: of_one(in_order_of_values(by_writing), (SORTED,), (X,)),
    "positions of values": lambda: of_one(at_found_positions, (SORTED,), (X,)),
    "random numbers": lambda: in_train_mode(random_scores),
    "half precision": lambda: as_dtype(convolved, torch.bfloat16),
    "half precision, gated": lambda: as_dtype(normed_and_gated, torch.bfloat16),
    "half precision, maps that are subtracted": lambda: as_dtype(maps_subtracted, torch.bfloat16),
    "a map without a softmax": lambda: as_dtype(without_a_softmax, torch.float64),
    "double precision": lambda: as_dtype(normed_and_gated, torch.float64),
    "a model of inference mode": lambda: in_inference_mode(plain),
}


@pytest.mark.parametrize("back", [False, True], ids=["", "the other way round"])
@pytest.mark.parametrize("kind", PAIRS)
def test_what_came_first_does_not_matter(kind: str, back: bool) -> None:
    first, then = PAIRS[kind]()[:: -1 if back else 1]
    forget_what_was_established()
    expected = read(then._replace(module=copy.deepcopy(then.module)))
    forget_what_was_established()
    read(first)
    found = read(then)
    assert found.keys() == expected.keys()
    for what, value in expected.items():
        assert isinstance(found[what], str) == isinstance(value, str), f"{what} is refused"
        if isinstance(value, Tensor):
            torch.testing.assert_close(found[what], value, atol=1e-4, rtol=1e-4, msg=lambda m, what=what: f"{what}: {m}")


GIVEN = [
    "positions of values",
    "a map without a softmax",
    "half precision",
    "half precision, gated",
    "a model of inference mode",
]


@pytest.mark.parametrize("kind", GIVEN)
def test_conditions_under_which_nothing_is_refused(kind: str) -> None:
    forget_what_was_established()
    given = read(PAIRS[kind]()[0])
    assert isinstance(given["map"], Tensor)
    assert isinstance(given["output"], Tensor)


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    yield
    forget_what_was_established()


def _read_within(module: nn.Module) -> Callable[[Tensor], Tensor]:
    def run(x: Tensor) -> Tensor:
        model = nn.Sequential(module)
        with AttentionRecorder(model, layers="0") as rec:
            y = model(x)
        with pytest.raises(HookattnError, match="evidence of its axes ends"):
            rec.maps[0][...]
        return y.sum()

    return run


@pytest.mark.parametrize("transform", [torch.vmap, torch.func.grad])
def test_what_a_transform_refuses_is_not_refused_elsewhere(transform: Callable[..., Any]) -> None:
    forget_what_was_established()
    module = Own(plain)
    transform(_read_within(module))(X.expand(3, -1, -1, -1) if transform is torch.vmap else X)
    assert isinstance(read(Call(module, (X,)))["map"], Tensor)


class Asking(nn.Module):
    """Attends to itself where queries and keys are one tensor, else returns what it was given."""

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        return (x @ memory.mT).softmax(-1) @ memory if x is memory else x


@pytest.mark.parametrize("keep", ["inputs", "maps"])
def test_a_tensor_that_is_given_twice_is_one_when_it_is_cut_off(keep: Any) -> None:
    forget_what_was_established()
    module, x = Asking(), numbers().requires_grad_()
    with AttentionRecorder(nn.Sequential(module), layers="0", keep=keep) as rec:
        module(x, x)
    torch.testing.assert_close(rec.maps["0"][...][:, 0], (x @ x.mT).softmax(-1).detach())
