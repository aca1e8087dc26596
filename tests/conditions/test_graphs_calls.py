"""What graphs that call hooks take for a call: of that very module, with its arguments as they are, in one forward."""

from __future__ import annotations

from collections import namedtuple
from enum import Enum, IntEnum
from typing import Any

import pytest
import torch
from packaging.version import Version
from support.models import tiny
from support.reading import NAMES, read
from torch import Tensor, nn

from hookattn import AttentionRecorder, UnreadableError

pytestmark = [
    pytest.mark.usefixtures("nothing_compiled_yet", "quickly"),
    pytest.mark.skipif(Version(torch.__version__).release < (2, 11), reason="graphs of this torch do not outlive a hook"),
]


def test_a_copy_that_shares_the_hooks_is_not_recorded_as_the_module() -> None:
    model: Any
    model, x = tiny("vit")
    compiled, tokens = torch.compile(model), torch.randn(1, 5, model.embed_dim)
    with torch.no_grad(), AttentionRecorder(compiled) as rec:
        compiled(x)
        before = read(rec)
        torch.compile(_shallow(model.blocks[0].attn))(tokens)
    torch.testing.assert_close(read(rec), before, rtol=0, atol=0)


def _shallow(module: nn.Module) -> nn.Module:
    """As copy.copy makes it."""
    other = module.__new__(type(module))
    other.__dict__.update(module.__dict__)
    return other


@pytest.mark.parametrize("order", ["ab", "ba", "baab"])
def test_graphs_of_a_model_of_the_same_class_that_is_not_recorded_are_not_taken_for_its_own(order: str) -> None:
    (model, x), (other, _) = tiny("vit"), tiny("vit")
    calls: dict[str, Any] = {"a": torch.compile(model), "b": torch.compile(other)}
    with torch.no_grad(), AttentionRecorder(model) as expected, torch.compiler.set_stance("force_eager"):
        model(x)
    with torch.no_grad(), AttentionRecorder(calls["a"], passes="all") as rec:
        for each in order:
            calls[each](x)
    assert len(rec.passes) == order.count("a")
    for maps in rec.passes:
        assert list(maps) == NAMES
    torch.testing.assert_close(read(rec), read(expected), rtol=0, atol=1e-6)


@pytest.mark.parametrize("layers", [[0, 2], [1], [2]])
def test_blocks_that_are_not_chosen_share_no_graph_with_those_that_are(layers: list[int]) -> None:
    model: Any
    model, x = tiny("vit", depth=3)
    for block in model.blocks:
        block.compile()
    with torch.no_grad(), AttentionRecorder(model, layers) as rec:
        model(x)
    assert list(rec.maps) == rec.layers == [f"blocks.{i}.attn" for i in layers]


def test_other_layers_again_and_again_leave_room_for_graphs_of_the_model() -> None:
    model, x = tiny("vit", depth=9)
    compiled = torch.compile(model, fullgraph=True, dynamic=False)
    with torch.no_grad():
        compiled(x)
        for i in range(3):
            with AttentionRecorder(compiled, [i]) as rec:
                compiled(x)
            assert list(rec.maps) == [f"blocks.{i}.attn"]
        for i in range(3, 9):
            with pytest.warns(UserWarning, match="layers="), AttentionRecorder(compiled, [i]) as rec:
                compiled(x)
            assert list(rec.maps) == [f"blocks.{i}.attn"]
        compiled(x.repeat(2, 1, 1, 1))


def test_train_mode_inside_the_block_is_told() -> None:
    model, x = tiny("vit")
    compiled = torch.compile(model)
    with torch.no_grad(), AttentionRecorder(compiled) as rec:
        model.train()
        compiled(x)
        model.eval()
    with pytest.raises(UnreadableError, match="train mode"):
        rec.maps[0][...]


class Mode(Enum):
    A = 1


class Number(IntEnum):
    ONE = 1


Pair = namedtuple("Pair", "a b")


class Attention(nn.Module):
    def forward(self, x: Tensor, how: Any = None) -> Tensor:
        return torch.softmax(x @ x.transpose(-2, -1), -1) @ x


class Twice(nn.Module):
    """Calls its attention twice, and is called with something."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = Attention()

    def forward(self, x: Tensor, how: Any = None) -> Tensor:
        out: Tensor = self.attn(self.attn(x))
        return out


@pytest.mark.parametrize("how", [None, Mode.A, Number.ONE, Pair(1, 2), {Mode.A: 1}], ids=repr)
def test_whatever_a_model_is_called_with_its_calls_are_of_one_forward(how: Any) -> None:
    model, x = Twice().eval(), torch.randn(2, 5, 8)
    compiled = torch.compile(model)
    with torch.no_grad(), AttentionRecorder(model) as expected:
        model(x, how)
    with torch.no_grad(), AttentionRecorder(compiled, passes="all") as rec:
        compiled(x, how)
        compiled(x, how)
    assert [list(maps) for maps in rec.passes] == 2 * [["attn", "attn#1"]]
    torch.testing.assert_close(read(rec), read(expected), rtol=0, atol=1e-6)


class Called(nn.Module):
    def __init__(self, how: Any) -> None:
        super().__init__()
        self.attn, self.how = Attention(), how

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.attn(x, how=self.how)
        return out


@pytest.mark.parametrize("how", [Mode.A, Number.ONE, Pair(1, 2), {Mode.A: 1}, slice(2)], ids=repr)
def test_what_attention_is_called_with_and_is_not_handed_on_is_told_by_its_type(how: Any) -> None:
    model, x = Called(how).eval(), torch.randn(2, 5, 8)
    compiled = torch.compile(model)
    with torch.no_grad(), AttentionRecorder(compiled) as rec:
        compiled(x)
    kind = "Mode" if isinstance(how, dict) else type(how).__name__
    with pytest.raises(UnreadableError, match=rf"an argument of type {kind}, .*set_stance\("):
        rec.maps[0][...]


def test_one_tensor_that_is_given_three_times_stays_one() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.attn(x, x, x, need_weights=False)[0]
            return out

    compiled = torch.compile(Model().eval())
    with torch.no_grad(), AttentionRecorder(compiled) as rec:
        compiled(torch.randn(2, 5, 8))
    query, key, value = rec.maps[0].call.args
    assert query is key is value
