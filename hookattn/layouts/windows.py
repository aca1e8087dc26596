"""Blocks and attention classes that cut the image into windows.

Windows count as images to whoever reads the map: (images * windows, heads, queries, keys), the windows of an image one after
the other. Where a class pads the image to whole windows, keys that are only padding are attended to and lie nowhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from einops import rearrange

from ..errors import TokenError
from ..tokens import Tokens, cut, neighbourhoods, pooled, whole
from .registry import Shape, layout, partition, received
from .setting import Setting
from .sizes import pair, size_after


@partition(
    "timm.models.swin_transformer.SwinTransformerBlock",
    "timm.models.swin_transformer_v2.SwinTransformerV2Block",
    "timm.models.swin_transformer_v2_cr.SwinTransformerV2CrBlock",
)
def swin_block(self: Any, setting: Setting) -> Tokens:
    _, rows, columns, _ = setting.block_argument(self, "x")
    return cut((rows, columns), self.window_size, self.shift_size)


@partition("timm.models.maxxvit.PartitionAttentionCl")
def partition_attention_cl(self: Any, setting: Setting) -> Tokens:
    _, rows, columns, _ = setting.block_argument(self, "x")
    return cut((rows, columns), self.partition_size, strided=not self.partition_block)


@partition("timm.models.maxxvit.PartitionAttention2d")
def partition_attention_2d(self: Any, setting: Setting) -> Tokens:
    _, _, rows, columns = setting.block_argument(self, "x")
    return cut((rows, columns), self.partition_size, strided=not self.partition_block)


@partition("timm.models.maxxvit.ParallelPartitionAttention")
def parallel_partition_attention(self: Any, setting: Setting) -> Tokens:
    _, rows, columns, _ = setting.block_argument(self, "x")
    return cut((rows, columns), self.partition_size, strided=setting.module is self.attn_grid)


@partition("timm.models.davit.SpatialBlock")
def davit_spatial_block(self: Any, setting: Setting) -> Tokens:
    _, _, rows, columns = setting.block_argument(self, "x")
    return cut((rows, columns), self.window_size)


@partition("timm.models.gcvit.GlobalContextVitBlock")
def gcvit_block(self: Any, setting: Setting) -> Tokens:
    """A global query has the place of the token that its row makes, though it was pooled from the whole image."""
    _, rows, columns, _ = setting.block_argument(self, "x")
    return cut((rows, columns), self.window_size)


@partition("timm.models.tiny_vit.TinyVitBlock")
def tiny_vit_block(self: Any, setting: Setting) -> Tokens:
    """An image as large as the window is one window."""
    _, rows, columns, _ = setting.block_argument(self, "x")
    return cut((rows, columns), pair(self.window_size))


@partition("timm.models.efficientvit_msra.LocalWindowAttention")
def efficientvit_msra_local_window_attention(self: Any, setting: Setting) -> Tokens:
    """The window is that of the attention inside, which is made smaller where the image is."""
    _, _, rows, columns = setting.block_argument(self, "x")
    return cut((rows, columns), pair(self.attn.resolution))


@partition("timm.models.vision_transformer_sam.Block")
def sam_block(self: Any, setting: Setting) -> Tokens:
    _, rows, columns, _ = setting.block_argument(self, "x")
    return cut((rows, columns), pair(self.window_size)) if self.window_size > 0 else whole((rows, columns))


@partition("timm.models.hieradet_sam2.MultiScaleBlock")
def hieradet_block(self: Any, setting: Setting) -> Tokens:
    _, rows, columns, _ = setting.block_argument(self, "x")
    return cut((rows, columns), self.window_size) if any(self.window_size) else whole((rows, columns))


@layout("timm.models.hieradet_sam2.MultiScaleAttention")
def hieradet_attention(setting: Setting, shape: Shape) -> tuple[Tokens, Tokens]:
    """Queries are pooled inside their window, and stand for the cells of a coarser grid."""
    window = setting.argument("x")[1:3]
    keys = received(setting, lambda: whole(window))
    pool = setting.module.q_pool
    return keys if pool is None else pooled(keys, window, pair(pool.stride)), keys


@partition("timm.models.nest.NestLevel")
def nest_level(self: Any, setting: Setting) -> Tokens:
    grid_size = size_after(setting.block_argument(self, "x"), self.pool)
    return cut(grid_size, pair(self.block_size))


@partition("timm.models.mobilevit.MobileVitBlock")
def mobilevit_block(self: Any, setting: Setting) -> Tokens:
    """A window takes one pixel of each patch; the grid is resized to whole patches before, and it is that grid that is cut."""
    grid_size = size_after(setting.block_argument(self, "x"), self.conv_kxk)
    rows, columns = (-(-n // patch) for n, patch in zip(grid_size, self.patch_size))
    return cut((rows * self.patch_size[0], columns * self.patch_size[1]), (rows, columns), strided=True)


@partition("timm.models.tnt.Block")
def tnt_block(self: Any, setting: Setting) -> Tokens:
    """The inner attention sees the pixels of a patch, the outer one all patches."""
    if setting.module is not self.attn_in:
        return setting.tokens(setting.block_argument(self, "patch_embed")[1], prefix=True)
    pixels = setting.holder("pixel_embed").pixel_embed.new_patch_size
    _, tokens, _ = setting.block_argument(self, "patch_embed")
    rows, columns = setting.tokens(tokens, prefix=True).grid_size
    return cut((rows * pixels[0], columns * pixels[1]), pixels)


@layout("timm.models.twins.LocallyGroupedAttn")
def locally_grouped_attention(setting: Setting, shape: Shape) -> tuple[Tokens, Tokens]:
    tokens = cut(setting.argument("size"), pair(setting.module.ws))
    return tokens, tokens


@layout("timm.models.iformer.SHMA")
def single_head_modulation_attention(setting: Setting, shape: Shape) -> tuple[Tokens, Tokens]:
    _, _, rows, columns = setting.argument("x")
    window = setting.module.window_size
    tokens = cut((rows, columns), pair(window)) if window and window > 0 else whole((rows, columns))
    return tokens, tokens


@layout("timm.layers.halo_attn.HaloAttn")
def halo_attention(setting: Setting, shape: Shape) -> tuple[Tokens, Tokens]:
    """A block of queries looks at itself and a halo around it, which is zero where it is outside of the image.

    Where the query is strided, the queries have a coarser grid.
    """
    self = setting.module
    _, _, rows, columns = setting.argument("x")
    queries = cut((rows // self.block_stride, columns // self.block_stride), pair(self.block_size_ds))
    return queries, neighbourhoods((rows, columns), self.win_size, self.block_size, self.halo_size)


@layout("timm.models.volo.OutlookAttention")
def outlook_attention(setting: Setting, shape: Shape) -> tuple[Tokens, Tokens]:
    """A window is the neighbourhood of one token, and its places are queries and keys.

    A place is a query in every window it stands in: a picture is the mean of what it gets there.
    """
    self = setting.module
    _, rows, columns, _ = setting.argument("x")
    tokens = neighbourhoods((rows, columns), self.kernel_size, self.stride, self.padding)
    return tokens, tokens


@layout("timm.models.hiera.MaskUnitAttention")
def mask_unit_attention(setting: Setting, shape: Shape) -> tuple[Tokens, Tokens]:
    """Tokens come unrolled, and a mask unit is every `windows`-th of them; queries are pooled over the last unrolling."""
    self, model = setting.module, setting.holder("reroll")
    path = list(setting.path())
    block = next(i for i, block in enumerate(model.blocks) if block in path)
    queries = unrolled(*model.reroll.schedule[block])
    keys = unrolled(*model.reroll.schedule[block - 1]) if self.q_stride > 1 else queries
    windows = len(keys) // (self.q_stride * self.window_size) if self.use_mask_unit_attn else 1
    return in_mask_units(queries, windows), in_mask_units(keys, windows)


def unrolled(schedule: Sequence[Sequence[int]], size: Sequence[int]) -> Tokens:
    """Patches in the order of `Unroll`: stride by stride, what is pooled into one stands far apart."""
    if len(size) != 2:
        raise TokenError(f"its patches are a grid of {' x '.join(map(str, size))}, which is no image; slice m[...].")
    grid = whole(size)
    places = grid.patches[0].reshape(1, *size)
    for rows, columns in schedule:
        places = rearrange(places, "b (y row) (x column) -> (b row column) y x", row=rows, column=columns)
    return Tokens((), grid.grid_size, places.reshape(1, 1, -1))


def in_mask_units(tokens: Tokens, windows: int) -> Tokens:
    """Unrolled tokens in their mask units, which take turns."""
    return Tokens((), tokens.grid_size, rearrange(tokens.patches, "1 1 (n w) -> 1 w n", w=windows))
