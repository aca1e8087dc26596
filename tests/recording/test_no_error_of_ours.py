"""No error of ours ends the user's forward or backward: it is kept and told when the map is read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.inside import registry
from torch import Tensor, nn

from hookattn import QK, AttentionRecorder, HookattnError, UnreadableError, recipe

OPTIONS: list[dict[str, Any]] = [
    {},
    {"keep": "maps"},
    {"gradients": True},
    {"called_from": True},
    {"keep": "maps", "detach": False},
]


class Strange(Tensor):
    """A subclass that lets nobody ask it for anything but what it is asked for here."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in (Tensor.requires_grad.__get__, Tensor.is_nested.__get__):  # type: ignore[attr-defined]
            raise ArithmeticError(f"nobody asks a Strange for {func}")
        return super().__torch_function__(func, types, args, kwargs or {})


class Locked:
    """An object that has nothing to say."""

    def __getattribute__(self, name: str) -> Any:
        raise RuntimeError(f"nobody asks a Locked for {name}")


EXTRAS: dict[str, Callable[[], Any]] = {
    "nested": lambda: torch.nested.nested_tensor([torch.randn(3, 4), torch.randn(2, 4)], layout=torch.jagged),
    "sparse": lambda: torch.eye(4).to_sparse(),
    "sparse rows": lambda: torch.eye(4).to_sparse_csr(),
    "meta": lambda: torch.empty(3, device="meta"),
    "quantised": lambda: torch.quantize_per_tensor(torch.randn(4), 0.1, 0, torch.qint8),
    "complex": lambda: torch.randn(3, dtype=torch.complex64),
    "empty": lambda: torch.empty(0, 3),
    "number": lambda: torch.tensor(3),
    "strange": lambda: torch.randn(3).as_subclass(Strange),
    "in a list": lambda: [torch.eye(4).to_sparse(), {"a": torch.randn(2)}],
    "locked": Locked,
    "a generator": lambda: (i for i in range(3)),
    "itself": lambda: (ring := [], ring.append(ring), ring)[-1],
}


class Attention(nn.Module):
    """Takes something beside x and leaves it alone."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.qkv = 4, nn.Linear(32, 96)

    def forward(self, x: Tensor, extra: Any = None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn1, self.attn2 = Attention(), Attention()

    def forward(self, x: Tensor, extra: Any) -> Tensor:
        out: Tensor = self.attn2(self.attn1(x, extra))
        return out


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", EXTRAS)
def test_whatever_a_module_is_given_beside_x_the_model_runs_on(name: str, options: dict[str, Any]) -> None:
    model, x = Model(), torch.randn(2, 9, 32, requires_grad=True)
    expected = model(x, EXTRAS[name]())
    (want,) = torch.autograd.grad(expected.pow(2).sum(), x)
    with AttentionRecorder(model, **options) as rec:
        out = model(x, EXTRAS[name]())
        (got,) = torch.autograd.grad(out.pow(2).sum(), x)
    assert torch.equal(out, expected)
    assert torch.equal(got, want)
    assert {*rec.maps, *rec.skipped} == {"attn1", "attn2"}
    assert rec.maps["attn2"][...].shape == (2, 4, 9, 9)  # what cannot be read stops nothing else
    q, k, _ = model.attn1.qkv(x).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
    try:
        whole = rec.maps["attn1"][...]
    except HookattnError:
        return
    torch.testing.assert_close(whole, (q @ k.mT * 8**-0.5).softmax(-1))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_an_encoder_of_pytorch_with_a_padding_mask(options: dict[str, Any]) -> None:
    """In eval mode it makes nested tensors of what is not padding."""
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2).eval()
    x, padding = torch.randn(2, 7, 32), torch.zeros(2, 7, dtype=torch.bool)
    padding[0, 5:] = True
    with torch.no_grad():
        with AttentionRecorder(encoder, **options) as rec:
            out = encoder(x, src_key_padding_mask=padding)
        expected = encoder(x, src_key_padding_mask=padding)
    assert out.shape == expected.shape
    for m in rec.maps.values():
        with pytest.raises(UnreadableError, match=r"nested|could not be computed"):
            m[...]


@pytest.mark.parametrize("keep", ["inputs", "maps"])
def test_a_recipe_that_fails_spoils_its_own_maps_alone(keep: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry._RECIPES, "_facts", registry.list_recipes())

    class Mine(Attention):
        pass

    @recipe(Mine)
    def mine(self: Any, x: Tensor, extra: Any = None) -> QK:
        raise ZeroDivisionError("a recipe of mine")

    model, x = Model(), torch.randn(2, 9, 32)
    model.attn1 = Mine()
    with torch.no_grad(), AttentionRecorder(model, keep=keep) as rec:
        expected = model(x, None)
    with torch.no_grad():
        assert torch.equal(model(x, None), expected)
    with pytest.raises((UnreadableError, ZeroDivisionError), match="a recipe of mine"):
        rec.maps["attn1"][...]
    assert rec.maps["attn2"][...].shape == (2, 4, 9, 9)
