"""How a model cuts its image into patches: the part of it that does, its first layer, its prefix tokens and its grid."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from .sizes import pair, size_after
from .tokens import Size

# Models of timm, transformers, torchvision, open_clip and vit-pytorch name what cuts their image with one of these words. A
# name decides what is looked at; what a grid is follows from sizes.
_EMBEDDINGS = ("patch_embed", "embeds", "pixel_embed")
_STEMS = (*_EMBEDDINGS, "patch_embeddings", "embeddings", "conv_proj", "to_patch_embedding", "conv1", "stem")
_CLASS = ("cls_token", "class_token", "class_embedding")
_DISTILLED = ("dist_token", "distillation_token")
_REGISTERS = ("reg_token", "register_tokens")
# where words come in, no image does
_VOCABULARY = ("token_embedding", "word_embeddings", "text_embeddings", "embed_tokens", "wte")


def path_to(model: nn.Module, name: str) -> Iterator[nn.Module]:
    """The model, and module after module down to the one of that name."""
    yield model
    module: nn.Module | None = model
    for part in name.split("."):
        module = None if module is None else module._modules.get(part)
        if module is not None:
            yield module


def trunk_of(model: nn.Module, name: str = "") -> nn.Module:
    """The part of a model that cuts the image into patches for the module of that name: the outermost with a stem."""
    return next((m for m in path_to(model, name) if _stem_attribute(m) is not None), model)


def stem_of(trunk: nn.Module) -> nn.Module | None:
    """The module the image goes into first: `patch_embed`, else the first 2-d convolution of the stem."""
    name = _stem_attribute(trunk)
    stem: nn.Module = trunk if name is None else getattr(trunk, name)
    return stem if name in _EMBEDDINGS else next((m for m in stem.modules() if isinstance(m, nn.Conv2d)), None)


def stems_of(trunks: Iterable[nn.Module]) -> dict[nn.Module, list[nn.Module]]:
    """The modules that images go into first, each with the parts of the model it cuts them for."""
    stems: dict[nn.Module, list[nn.Module]] = {}
    for trunk in dict.fromkeys(trunks):
        if (stem := stem_of(trunk)) is not None:
            stems.setdefault(stem, []).append(trunk)
    return stems


def prefix_names(trunk: nn.Module) -> tuple[str, ...]:
    """Names of the tokens a model puts before its patches."""
    holders = [trunk, *(m for name in _STEMS if isinstance(m := getattr(trunk, name, None), nn.Module))]

    def first(names: tuple[str, ...]) -> Any:
        return next((t for m in holders for n in names if isinstance(t := getattr(m, n, None), Tensor)), None)

    def numbered(name: str, token: Any) -> list[str]:
        count = 0 if token is None else token.shape[-2] if token.dim() > 1 else 1
        return [f"{name}{i}" for i in range(count)]

    # the order in which models concatenate them: class, distillation, registers
    classes = numbered("cls", first(_CLASS))
    names = ["cls"] if len(classes) == 1 else classes
    names += ["dist"] * (first(_DISTILLED) is not None) + numbered("reg", first(_REGISTERS))
    count = next((n for m in holders if isinstance(n := getattr(m, "num_prefix_tokens", None), int)), len(names))
    # the model's own count is right where its tokens have other names
    return tuple((names + [f"prefix{i}" for i in range(len(names), count)])[:count])


def patch_size(trunk: nn.Module) -> Size | None:
    """(height, width) in pixels of the patches a model cuts its image into; None where it does not say."""
    holders = [trunk, *(m for name in _STEMS if isinstance(m := getattr(trunk, name, None), nn.Module))]
    sizes = (pair(size) for m in holders if isinstance(size := getattr(m, "patch_size", None), (int, tuple, list)))
    return next(((int(size[0]), int(size[1])) for size in sizes if len(size) == 2), None)


def grid_size(trunk: Any, image_size: Size | None, patches: int, *, exactly: bool = False) -> Size | None:
    """(rows, columns) of so many patches; None if they are no grid over the image.

    Args:
        exactly: take the word of a patch embedding that tells its grid, where else a coarser one would do.
    """
    embed: Any = next((m for name in _EMBEDDINGS if isinstance(m := getattr(trunk, name, None), nn.Module)), None)
    grid = None
    if image_size is None:
        grid = getattr(embed, "grid_size", None)
    elif hasattr(embed, "dynamic_feat_size"):
        grid = embed.dynamic_feat_size(image_size)
    # a square of what was left after dropping must not be taken for a grid
    if grid is None and image_size is not None and any("PatchDrop" in type(m).__name__ for m in trunk.modules()):
        stem = stem_of(trunk)
        grid, exactly = (size_after(image_size, stem), True) if isinstance(stem, nn.Conv2d) else (None, exactly)
    if grid is not None and grid[0] * grid[1] == patches:
        return int(grid[0]), int(grid[1])
    if image_size is None or (grid is not None and exactly):
        return None
    return _factors(patches, image_size) or _halved(patches, image_size)


def sees_patches(model: nn.Module, name: str) -> bool:
    """Whether a module may see patches: it is in the part of the model that cuts the image, and no words come into that part.

    A model in which no part is known to cut the image is such a part itself.
    """
    for module in reversed(list(path_to(model, name))):
        if _has_vocabulary(module):
            return False
        if _stem_attribute(module) is not None:
            return True
    return all(_stem_attribute(module) is None for module in model.modules())


def _stem_attribute(module: nn.Module) -> str | None:
    return next((n for n in _STEMS if isinstance(m := getattr(module, n, None), nn.Module) and not _has_vocabulary(m)), None)


def _has_vocabulary(module: nn.Module) -> bool:
    """Whether words come in here, directly or through what embeds them."""
    holders = [module, *(m for name in _STEMS if isinstance(m := getattr(module, name, None), nn.Module))]
    return any(isinstance(getattr(m, name, None), nn.Module) for m in holders for name in _VOCABULARY)


def _factors(patches: int, image_size: Size) -> Size | None:
    """Rows and columns of patches that cover the image without a rest and are square to within a tenth."""
    height, width = image_size
    # patches are about as high as wide, and a grid of them is stretched as the image is
    pairs = [(rows, patches // rows) for rows in range(1, patches + 1) if patches % rows == 0]
    grids = [(rows, columns) for rows, columns in pairs if height % rows == 0 and width % columns == 0]
    stretched = {grid: abs(math.log(height / grid[0] * grid[1] / width)) for grid in grids}
    best = min(grids, key=stretched.__getitem__, default=None)
    return best if best is not None and stretched[best] < math.log(1.1) else None


def _halved(patches: int, image_size: Size) -> Size | None:
    """Rows and columns that are left of the pixels when they are halved again and again, odd numbers rounded up."""
    rows, columns = image_size
    while rows * columns > max(1, patches):
        rows, columns = -(-rows // 2), -(-columns // 2)
    return (rows, columns) if rows * columns == patches else None
