"""How classes that are read by replay alone lay out the map they form, and why they have no recipe.

* `timm.models.efficientvit_msra.CascadedGroupAttention`: queries and keys of a head are made of what the head before it
  gave out, values and all, so a recipe would have to run the attention itself. Its windows are small.
* `timm.models.gcvit.WindowAttentionGlobal` (no form, its map has the usual axes): which window takes the global query of which
  image is not the same in all versions of timm, and nothing but the version tells. Its windows are small.
* `timm.layers.attention_pool2d.AttentionPool2d` (likewise): versions resample its position embedding differently where the
  features are not square. It is called once a model, on the last features.
"""

from __future__ import annotations

from .registry import file_form

file_form("b q k", "timm.models.efficientvit_msra.CascadedGroupAttention")
