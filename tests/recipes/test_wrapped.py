"""Layers inside an attention module are called, whatever somebody has made of them; caches and buffers are left alone."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from support.inside import find_recipe
from support.models import randomise
from support.oracle import agree, exists, own_softmax
from torch import Tensor, nn

from hookattn import AttentionRecorder


class Nonlinear(nn.Module):
    """Somebody's wrapper, which is random in train mode."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.drop = layer, nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(self.drop(x))
        return y + 0.5 * y.sin()


def wrapped() -> dict[str, tuple[nn.Module, tuple[Any, ...], tuple[str, ...]]]:
    """Modules, what they take, and which of their layers are wrapped."""
    from timm.layers import RelPosMlp
    from timm.layers.attention_pool import AttentionPoolLatent
    from timm.models import cait, convit, davit, efficientformer_v2, levit, maxxvit, swin_transformer_v2_cr, visformer, volo

    tokens, image = torch.randn(2, 16, 32), torch.randn(2, 32, 4, 4)
    rel_pos = partial(RelPosMlp, window_size=(4, 4))
    found: dict[str, tuple[nn.Module, tuple[Any, ...], tuple[str, ...]]] = {
        "heads_first": (maxxvit.AttentionCl(32, dim_head=8, rel_pos_cls=rel_pos), (tokens,), ("qkv", "rel_pos.mlp")),
        "heads_first_2d": (maxxvit.Attention2d(32, dim_head=8, rel_pos_cls=rel_pos), (image,), ("qkv",)),
        "parts_first_2d": (visformer.Attention(32, 4), (image,), ("qkv",)),
        "swin_v2_cr": (swin_transformer_v2_cr.WindowMultiHeadAttention(32, 4, (4, 4)), (tokens,), ("qkv",)),
        "latent": (AttentionPoolLatent(32, num_heads=4), (tokens,), ("q", "kv")),
        "talking_heads": (cait.TalkingHeadAttn(32, 4), (tokens,), ("qkv", "proj_l")),
        "talking_heads_2d": (efficientformer_v2.Attention2d(32, 8, 4, resolution=4), (image,), ("v", "talking_head1")),
        "channels": (davit.ChannelAttention(32, 4), (tokens,), ("qkv",)),
        "outlook": (volo.OutlookAttention(32, 4), (image.permute(0, 2, 3, 1),), ("v", "attn")),
        "gated": (convit.GPSA(32, 4), (tokens,), ("qk", "v")),
        "batch_norm": (levit.Attention(32, 8, 4, resolution=4), (tokens,), ()),
        "batch_norm_stride": (efficientformer_v2.Attention2d(32, 8, 4, resolution=4, stride=2), (image,), ()),
    }
    if exists("timm.models.iformer.SHMA"):
        from timm.models.iformer import SHMA

        found["single_head"] = SHMA(32), (image,), ("q", "v_gate")
    return found


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", wrapped())
def test_wrapped_layers_are_called_and_training_is_the_training_of_the_call(name: str, training: bool) -> None:
    module, args, layers = wrapped()[name]
    for layer in layers:
        *parents, last = layer.split(".")
        holder = module.get_submodule(".".join(parents))
        setattr(holder, last, Nonlinear(getattr(holder, last)))
    randomise(module).double()
    if name == "gated":  # its forward reads the dtype of this weight
        module.qk.weight = module.qk.layer.weight  # type: ignore[union-attr]
    module.train(training)
    args = torch.utils._pytree.tree_map_only(Tensor, Tensor.double, args)
    twin = copy.deepcopy(module)
    torch.manual_seed(3)
    with AttentionRecorder(module) as rec, torch.no_grad():
        module(*args)
    (m,) = rec.maps.values()
    after = [buffer.clone() for buffer in module.buffers()]
    torch.manual_seed(3)
    expected = own_softmax(twin, *args)
    assert find_recipe(module) is not None
    assert m.shape == expected.shape
    agree(m[...], expected)
    agree(m[:, -1], expected[:, -1])
    assert all(torch.equal(a, b) for a, b in zip(module.buffers(), after))


def test_reading_leaves_caches_and_buffers_alone() -> None:
    from timm.models import convit, levit

    positional, cached = randomise(convit.GPSA(16, 4)), randomise(levit.Attention(16, 4, 4, resolution=3))
    for module, x in ((positional, torch.randn(2, 9, 16)), (cached, torch.randn(2, 9, 16))):
        module.eval()
        before = [id(buffer) for buffer in module.buffers()]
        with AttentionRecorder(module, keep="maps") as rec, torch.no_grad():
            module.register_forward_pre_hook(lambda *_: 1 / 0)  # what was read was read before any forward
            with pytest.raises(ZeroDivisionError):
                module(x)
        assert rec.maps[0].shape[2:] == (9, 9)
        assert [id(buffer) for buffer in module.buffers()] == before
    assert cached.attention_bias_cache == {}
