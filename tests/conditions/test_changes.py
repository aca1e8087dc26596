"""A map is stale when its input, a parameter or the module has changed since, and the message names what."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from support.models import levit, tiny
from support.oracle import own_map
from support.reading import read, same
from timm.layers import Attention
from torch import Tensor, nn

from hookattn import AttentionMap, AttentionRecorder, StaleMapError


def test_a_map_of_an_eval_forward_is_not_read_with_statistics_that_have_moved_since() -> None:
    model, x = levit()
    with AttentionRecorder(model) as rec, torch.no_grad():
        model(x)
    expected = read(rec)
    with torch.no_grad():
        model.train()(3 * x + 1)
    model.eval()
    for name, m in rec.maps.items():
        try:
            got = m[...]
        except StaleMapError as error:
            assert ".bn." in str(error)  # noqa: PT017
        else:
            assert torch.equal(got, expected[name])


def test_a_map_of_a_train_forward_stays_readable_when_statistics_move() -> None:
    model, x = levit()
    with AttentionRecorder(model.train(), passes="all") as rec, torch.no_grad():
        model(x)
        expected = read(rec)
        model(3 * x + 1)
    assert same({name: m[...] for name, m in rec.passes[0].items()}, expected)


def optimise(model: Any) -> None:
    model.blocks[0].attn.qkv.weight.grad = torch.ones_like(model.blocks[0].attn.qkv.weight)
    torch.optim.Adam([model.blocks[0].attn.qkv.weight]).step()


def load(model: Any) -> None:
    model.load_state_dict(model.state_dict())


def assign(model: Any) -> None:
    model.load_state_dict({key: value.clone() for key, value in model.state_dict().items()}, assign=True)


def double(model: Any) -> None:
    model.double()


def fill(model: Any) -> None:
    with torch.no_grad():
        model.blocks[0].attn.qkv.bias.fill_(0.5)


def replace_parameter(model: Any) -> None:
    model.blocks[0].attn.qkv.bias = nn.Parameter(torch.zeros(144))


def replace_module(model: Any) -> None:
    model.blocks[0].attn.qkv = nn.Linear(48, 144)


def drop_parameter(model: Any) -> None:
    model.blocks[0].attn.qkv.bias = None


EDITS: dict[str, tuple[Callable[[Any], None], str]] = {
    "optimizer.step": (optimise, r"'qkv\.weight' changed"),
    "load_state_dict": (load, r"'qkv\.weight', 'qkv\.bias'.* changed"),
    "double": (double, r"'qkv\.weight', 'qkv\.bias'.* changed"),
    "bias.fill_": (fill, r"'qkv\.bias' changed"),
    "another module": (replace_module, r"a layer, a forward or a number inside the module was replaced"),
}


REPLACEMENTS = {"load_state_dict(assign=True)": assign, "another parameter": replace_parameter, "no parameter": drop_parameter}


ADVICE = r"(?s)'blocks\.0\.attn' \(Attention\) is stale.*{}.*keep=\"maps\""


@pytest.mark.parametrize("name", REPLACEMENTS)
def test_a_parameter_that_was_replaced_is_still_there_for_the_map_of_its_forward(name: str) -> None:
    model, x = tiny("vit")
    with AttentionRecorder(model) as rec, torch.no_grad():
        model(x)
    before = rec.maps[0][...]
    with torch.no_grad():
        REPLACEMENTS[name](model)
    now = dict(model.named_parameters())
    assert torch.equal(rec.maps[0][...], before)
    assert rec.maps[0].verify() < 1e-6
    assert {name: id(p) for name, p in model.named_parameters()} == {name: id(p) for name, p in now.items()}


def refuses_to_be_read(m: AttentionMap, message: str) -> None:
    """By slice, by row, as a picture and by verifying, and each time again."""
    readings: list[Callable[[], object]] = [lambda: m[...], lambda: m[0, 0, 0], m.image, m.verify, lambda: m[...]]
    for reading in readings:
        with pytest.raises(StaleMapError, match=message):
            reading()


@pytest.mark.parametrize("forward", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("edit", EDITS)
def test_a_map_is_stale_when_a_parameter_has_changed_and_the_message_names_it(edit: str, forward: Any) -> None:
    model, x = tiny("vit")
    with AttentionRecorder(model) as late, AttentionRecorder(model, keep="maps") as kept, forward():
        model(x)
    expected = read(late)
    change, what = EDITS[edit]
    change(model)
    refuses_to_be_read(late.maps[0], ADVICE.format(what))
    assert same(read(kept), expected)
    assert kept.maps[0].image().shape == (2, 4, 4)


@pytest.mark.parametrize("seen", [True, False])
@pytest.mark.parametrize("forward", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("through", ["x", "a view of x", "one value of x"])
def test_a_map_is_stale_when_x_has_changed(through: str, forward: Any, seen: bool) -> None:
    model, x = tiny("vit")
    with AttentionRecorder(model) as late, AttentionRecorder(model, keep="maps") as kept, forward():
        model(x)
        expected = read(late) if seen else read(kept)
        m = late.maps[0]
        with torch.no_grad() if forward is not torch.inference_mode else nullcontext():
            {"x": m.x, "a view of x": m.x[:, 1:].transpose(1, 2), "one value of x": m.x[1, 5, 7]}[through].add_(1.0)
    refuses_to_be_read(m, ADVICE.format("x changed"))
    assert same({late.maps[1].name: late.maps[1][...]}, {late.maps[1].name: expected["blocks.1.attn"]})
    assert same(read(kept), expected)


def test_a_map_is_stale_when_the_module_itself_writes_into_x() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = Attention(48, num_heads=3)

        def forward(self, x: Tensor) -> Tensor:
            return x.add_(self.attn(x))

    model, x = InPlace(), torch.randn(2, 5, 48)
    with AttentionRecorder(model) as late, AttentionRecorder(model, keep="maps") as kept, torch.no_grad():
        expected = own_map(model.attn, x)
        model(x)
    with pytest.raises(StaleMapError, match="x changed in place"):
        late.maps[0][...]
    torch.testing.assert_close(kept.maps[0][...], expected)


def test_a_map_is_stale_when_another_argument_has_changed() -> None:
    model, _ = tiny("vit")
    attn: Any = model.blocks[0].attn
    x, mask = torch.randn(2, 5, 48), torch.zeros(5, 5)
    with AttentionRecorder(model) as rec, torch.no_grad():
        attn(x, attn_mask=mask)
    rec.maps[0][...]
    mask.fill_(-1)
    with pytest.raises(StaleMapError, match="argument 1 changed in place"):
        rec.maps[0][...]


def test_a_map_stays_readable_when_only_other_modules_change() -> None:
    model, x = tiny("vit")
    with AttentionRecorder(model) as rec, torch.no_grad():
        model(x)
    expected = read(rec)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".attn." not in name:
                parameter.add_(1)
    assert same(read(rec), expected)
    with torch.no_grad():
        model.blocks[0].attn.proj.bias.add_(1)
    assert torch.equal(rec.maps[1][...], expected["blocks.1.attn"])


def test_moving_a_model_to_where_it_is_makes_nothing_stale() -> None:
    model, x = tiny("vit")
    with AttentionRecorder(model) as rec, torch.no_grad():
        model(x)
    expected = read(rec)
    model.to("cpu").float().requires_grad_(False)
    model.zero_grad()
    assert same(read(rec), expected)


def hook_removed(attn: Any) -> Any:
    return attn.qkv.register_forward_hook(lambda _module, _args, y: y * 2).remove


def hook_added(attn: Any) -> Any:
    return lambda: attn.qkv.register_forward_hook(lambda _module, _args, y: y * 2)


def layer_wrapped(attn: Any) -> Any:
    return lambda: setattr(attn, "qkv", nn.Sequential(attn.qkv, nn.Tanh()))


def number_set(attn: Any) -> Any:
    return lambda: setattr(attn, "scale", 1.0)


def data_written(attn: Any) -> Any:
    return lambda: attn.qkv.weight.data.mul_(2)


@pytest.mark.parametrize("change", [hook_removed, hook_added, layer_wrapped, number_set, data_written])
def test_a_module_that_is_another_one_now_makes_its_maps_stale(change: Any) -> None:
    model, x = tiny("vit")
    with AttentionRecorder(model) as rec, torch.no_grad():
        apply = change(model.blocks[0].attn)  # type: ignore[index,union-attr]
        model(x)
    rec.maps[0][0]
    apply()
    with pytest.raises(StaleMapError):
        rec.maps[0][0]
    rec.maps[1][0]  # the other block is as it was


class Cached(Attention):  # type: ignore[misc]
    """Adds what it has in a cache to its input."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        return super().forward(x + self.cache["offset"])  # type: ignore[no-any-return]


def test_a_cache_that_is_written_into_after_the_call_makes_its_map_stale() -> None:
    attn, x = Cached(16, 4), torch.randn(2, 5, 16)
    attn.cache = {"offset": torch.randn(5, 16)}
    with AttentionRecorder(attn) as rec, torch.no_grad():
        attn(x)
    attn.cache = {**attn.cache, "another": torch.zeros(1)}  # what was in it is held
    torch.testing.assert_close(rec.maps[0][...], own_map(attn, x + attn.cache["offset"]), rtol=0, atol=1e-6)
    attn.cache["offset"].add_(1)
    with pytest.raises(StaleMapError, match="a cache inside the module changed"):
        rec.maps[0][0]


@pytest.mark.parametrize("where", [slice(None), (1, 3, 5), (0, 0, 0)], ids=str)
def test_a_map_is_stale_when_an_array_of_numpy_that_x_shares_is_used_again(where: Any) -> None:
    attn, array = Attention(16, 4).eval(), torch.randn(2, 5, 16).numpy().copy()
    x = torch.from_numpy(array)
    for given in (x, x.mT.contiguous().mT, x[:1], x.expand(2, -1, -1)):
        with AttentionRecorder(attn) as rec, torch.no_grad():
            attn(given)
        before = rec.maps[0][...]
        array[where] += 1
        if given.untyped_storage().data_ptr() == x.untyped_storage().data_ptr() and (where != (1, 3, 5) or len(given) > 1):
            with pytest.raises(StaleMapError, match="x changed in place"):
                rec.maps[0][...]
        else:
            assert torch.equal(rec.maps[0][...], before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("of", [lambda x: x, lambda x: x.mT.contiguous().mT, lambda x: x[1:]], ids=["plain", "strided", "part"])
def test_a_map_is_stale_when_x_was_filled_again_through_its_data(of: Any, dtype: torch.dtype) -> None:
    """No version is counted then: PyTorch itself would not notice in backward."""
    attn, buffer = Attention(16, 4).eval().to(dtype), torch.randn(3, 9, 16, dtype=dtype)
    x = of(buffer)
    with AttentionRecorder(attn) as rec, AttentionRecorder(attn, keep="maps") as kept, torch.no_grad():
        attn(x)
    before = rec.maps[0][...]
    x.data.copy_(torch.randn_like(x))
    with pytest.raises(StaleMapError, match="x changed in place"):
        rec.maps[0][...]
    torch.testing.assert_close(kept.maps[0][...], before)


def test_a_tensor_without_memory_is_asked_for_none() -> None:
    attn = Attention(16, 4).eval()
    for x in (torch.randn(0, 9, 16), torch.randn(1, 1, 16), torch.randn(1, 1, 16).expand(2, 3, -1)):
        with AttentionRecorder(attn) as rec, torch.no_grad():
            attn(x)
        assert rec.maps[0][...].shape == (len(x), 4, x.shape[1], x.shape[1])
    x = torch.randn(2, 9, 16)
    with AttentionRecorder(attn) as rec, torch.no_grad():
        attn(x)
    x.untyped_storage().resize_(0)
    with pytest.raises(StaleMapError):
        rec.maps[0][...]


class Scaled(Attention):  # type: ignore[misc]
    """Its scores depend on things that are no parameters and no numbers."""

    def __init__(self) -> None:
        super().__init__(16, 4)
        self.shift, self.factors = torch.tanh, (1.0, 2.0)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        shift = self.shift if isinstance(self.shift, float) else 0.0
        return super().forward(x * self.factors[1] + shift)  # type: ignore[no-any-return]


def test_what_becomes_a_number_is_told_and_a_tuple_is_put_back() -> None:
    attn, x = Scaled().eval(), torch.randn(2, 5, 16)
    with AttentionRecorder(attn) as rec, torch.no_grad():
        attn(x)
    before = rec.maps[0][...]
    attn.factors = (1.0, 3.0)
    assert torch.equal(rec.maps[0][...], before)
    assert attn.factors == (1.0, 3.0)
    attn.shift = 0.5
    with pytest.raises(StaleMapError, match="a number inside the module was replaced"):
        rec.maps[0][...]


def test_a_map_that_was_read_is_stale_when_anything_changes_afterwards() -> None:
    """Each change is found alone, in a module that was plainly fresh a moment before."""
    changes: list[Callable[[Any], object]] = [
        lambda attn: attn.qkv.weight.data.add_(1),
        lambda attn: attn.register_buffer("extra", torch.zeros(1)),
        lambda attn: setattr(attn.qkv, "forward", attn.qkv.forward),
        lambda attn: setattr(attn.q_norm, "eps", 1.0),
        lambda attn: attn.add_module("another", nn.Identity()),
        lambda attn: attn.proj_drop.register_forward_pre_hook(lambda *_: None),
        lambda attn: delattr(attn.proj_drop, "inplace"),
    ]
    for change in changes:
        attn, x = Attention(16, 4).eval(), torch.randn(2, 5, 16)
        with AttentionRecorder(attn) as rec, torch.no_grad():
            attn(x)
        m = rec.maps[0]
        m[:, :, 0]
        change(attn)
        with pytest.raises(StaleMapError):
            m[:, :, 0]
