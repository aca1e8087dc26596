"""What the first axis of a map counts is named as far as it is known: images, windows of them, or just sequences of tokens."""

from __future__ import annotations

import pytest
import torch
from support.other_packages import CASES, made
from timm.layers import Attention
from torch import Tensor, nn

from hookattn import AttentionRecorder
from hookattn.analysis import rollout

pytestmark = pytest.mark.filterwarnings("ignore")

# for each shape of a map, in the order they are formed in
EXPECTED = {
    "transformers SamModel, eager": ["batch * windows", "batch", "sequence", "sequence", "sequence"],
    "transformers SegGptModel, eager": ["sequence", "batch"],
    "transformers Qwen2VisionTransformerPretrainedModel, equal, sdpa": ["sequence"],
    "transformers Qwen2_5_VisionTransformerPretrainedModel, unequal, sdpa": ["sequence", "sequence"],
    "transformers Florence2VisionBackbone, eager": ["sequence", "sequence"],
    "transformers TimesformerModel, joint_space_time, eager": ["batch"],
    "transformers TimesformerModel, divided_space_time, eager": ["sequence", "batch"],
    "transformers MllamaVisionModel, sdpa": ["batch"],
    "transformers PixtralVisionModel, sdpa": ["batch"],
    "transformers SwinModel, odd, eager": ["batch * windows", "batch * windows"],
    "transformers GPT2Model, eager": ["batch"],
    "transformers LongformerModel, eager": ["sequence"],
    "torchvision swin3d": ["sequence", "sequence"],
    "torchvision maxvit": ["batch * windows", "batch * windows"],
}


@pytest.mark.parametrize("name", [name for name in EXPECTED if name in CASES])
def test_the_first_axis_is_named_as_far_as_it_is_known(name: str) -> None:
    model, case = made(name)
    with AttentionRecorder(model) as rec, torch.no_grad():
        case.call(model)
    shapes = {m.shape: m.axes for m in rec.maps.values()}
    assert [axes[0] for axes in shapes.values()] == EXPECTED[name]
    assert {axes[1:] for axes in shapes.values()} == {("head", "query", "key")}
    with AttentionRecorder(model, keep="maps") as kept, torch.no_grad():
        case.call(model)
    assert [m.axes for m in kept.maps.values()] == [m.axes for m in rec.maps.values()]


def test_space_and_time_at_once_are_rolled_out_clip_by_clip() -> None:
    model, case = made("transformers TimesformerModel, joint_space_time, eager")
    with AttentionRecorder(model) as rec, torch.no_grad():
        case.call(model)
    assert rollout(rec.maps).shape == rec.maps[0].shape[:1] + rec.maps[0].shape[2:]


class CutAttention(nn.Module):
    """Attention inside of pieces of what it is called with."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = Attention(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.attn(x.unflatten(1, (2, -1)).flatten(0, 1))
        return y.unflatten(0, (-1, 2)).flatten(1, 2)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_without_images_a_batch_is_what_the_module_was_called_with(count: int) -> None:
    x = torch.randn(count, 8, 24)
    for layer, expected in (("0", "sequence"), ("0.attn", "batch")):
        with AttentionRecorder(nn.Sequential(CutAttention()).eval(), layers=layer) as rec, torch.no_grad():
            rec.model(x)
        assert rec.maps[0].axes[0] == expected


@pytest.mark.parametrize("batch_first", [True, False])
def test_a_batch_that_does_not_come_first_is_one(batch_first: bool) -> None:
    module, x = nn.MultiheadAttention(24, 3, batch_first=batch_first).eval(), torch.randn(2, 5, 24)
    with AttentionRecorder(module) as rec, torch.no_grad():
        module(x, x, x)
        assert rec.maps[0].axes[0] == "batch"
        module(x[0], x[0], x[0])
    assert rec.maps[0].axes[0] == "batch"
