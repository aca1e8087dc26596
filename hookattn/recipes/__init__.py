"""How a class of attention makes its queries and keys, and where its tokens lie: one file per kind of attention.

A recipe mirrors the `forward` of the class and stops where the scores would be formed. What has no recipe is replayed. A layout
tells where the queries and keys of a class lie on the image, a partition how a block cuts its input into windows. What has
neither sees all tokens of the image: prefix tokens, then the grid of patches.

From top to bottom, an import may only point down:

    vit_pytorch        vit-pytorch
    transformers       Hugging Face transformers
    torchvision        torchvision
    torch_multihead    PyTorch's own `nn.MultiheadAttention`
    mixed_heads        talking heads, two softmaxes a head, outlook attention
    channel_attention  channels attend to channels
    class_attention    one query, or a few, that gather from all tokens
    conv_attention     tokens that stay on their grid
    pooled_attention   fewer keys than tokens, or fewer queries
    window_attention   attention inside windows of the image
    global_attention   all tokens attend to all tokens
    values             what a map is multiplied onto, where several classes make it alike
    mechanisms         what several kinds have in common
    no_map             classes that form no map over pairs of a query and a key
    places             where the queries and keys of a map lie on the image
    registry           what is filed of classes under their qualified names
"""

from __future__ import annotations

from . import (
    channel_attention,
    class_attention,
    conv_attention,
    global_attention,
    mixed_heads,
    pooled_attention,
    torch_multihead,
    torchvision,
    transformers,
    vit_pytorch,
    window_attention,
)
from .registry import layout, partition, recipe

__all__ = [
    "channel_attention",
    "class_attention",
    "conv_attention",
    "global_attention",
    "layout",
    "mixed_heads",
    "partition",
    "pooled_attention",
    "recipe",
    "torch_multihead",
    "torchvision",
    "transformers",
    "vit_pytorch",
    "window_attention",
]
