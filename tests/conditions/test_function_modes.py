"""What modes of the user's make of a forward is in its maps, whatever is on when they are read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.models import randomise
from timm.layers import Attention
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hookattn import AttentionRecorder, StaleMapError, UnreadableError

SDPA = F.scaled_dot_product_attention
KEEPS = ("inputs", "maps")


class Sharpened(TorchFunctionMode):
    """Attention at another temperature."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        return func(*args, **{**kwargs, "scale": self.scale}) if func is SDPA else func(*args, **kwargs)


class Own(nn.Module):
    """An attention without a recipe."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.qkv = 4, nn.Linear(32, 96)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def made(kind: str) -> tuple[Any, Tensor]:
    module: Any = Attention(32, 4, qkv_bias=True) if kind == "recipe" else Own()
    return randomise(module).eval(), torch.randn(2, 9, 32)


def true(module: Any, x: Tensor, scale: float) -> Tensor:
    q, k, _ = module.qkv(x).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
    return (q @ k.mT * scale).softmax(-1)


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("kind", ["recipe", "replay"])
def test_a_mode_around_the_model_is_in_the_map(kind: str, keep: Any) -> None:
    module, x = made(kind)
    with torch.no_grad(), AttentionRecorder(nn.Sequential(module), layers="0", keep=keep) as rec:
        with Sharpened(0.7):
            rec.model(x)
        torch.testing.assert_close(rec.maps[0][...], true(module, x, 0.7))
        with Sharpened(0.1):  # whoever reads it
            torch.testing.assert_close(rec.maps[0][...], true(module, x, 0.7))


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("kind", ["recipe", "replay"])
def test_a_mode_around_the_reading_alone_is_not(kind: str, keep: Any) -> None:
    module, x = made(kind)
    with torch.no_grad(), AttentionRecorder(nn.Sequential(module), layers="0", keep=keep) as rec:
        rec.model(x)
        with Sharpened(0.7):
            torch.testing.assert_close(rec.maps[0][...], true(module, x, 8**-0.5))


def test_modes_are_on_after_the_reading_as_before() -> None:
    module, x = made("recipe")
    mode = Sharpened(0.7)
    with torch.no_grad(), AttentionRecorder(module) as rec, mode:
        before = module(x)
        rec.maps[0][...]
        assert torch.equal(module(x), before)
    assert not torch._C._len_torch_function_stack()


@pytest.mark.parametrize("kind", ["recipe", "replay"])
def test_a_replaced_function_is_in_the_map_and_its_going_is_told(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = made(kind)

    def own(q: Tensor, k: Tensor, v: Tensor, *args: Any, **options: Any) -> Tensor:
        return SDPA(q, k, v, scale=0.7)

    with torch.no_grad(), AttentionRecorder(nn.Sequential(module), layers="0") as rec:
        with monkeypatch.context() as patch:
            patch.setattr(F, "scaled_dot_product_attention", own)
            rec.model(x)
            torch.testing.assert_close(rec.maps[0][...], true(module, x, 0.7))
        with pytest.raises(StaleMapError, match="scaled_dot_product_attention was replaced"):
            rec.maps[0][...]


def test_a_default_device_changes_nothing() -> None:
    module, x = made("recipe")
    with torch.no_grad(), torch.device("cpu"), AttentionRecorder(module) as rec:
        module(x)
        torch.testing.assert_close(rec.maps[0][...], true(module, x, 8**-0.5))
    torch.testing.assert_close(rec.maps[0][...], true(module, x, 8**-0.5))


def test_a_mode_that_raises_spoils_the_reading_alone() -> None:
    class Raises(TorchFunctionMode):
        on = False

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if self.on and func is F.linear:
                raise ArithmeticError("mine")
            return func(*args, **(kwargs or {}))

    module, x = made("replay")
    mode = Raises()
    with torch.no_grad(), AttentionRecorder(nn.Sequential(module), layers="0") as rec, mode:
        expected = rec.model(x)
        mode.on = True
        with pytest.raises((ArithmeticError, UnreadableError)):
            rec.maps[0][...]
        mode.on = False
        assert torch.equal(rec.model(x), expected)
