"""How a model cuts its image into patches: the part of it that does, its first layer, its prefix tokens and its grid."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any, NamedTuple, TypeVar

from torch import Tensor, nn

from .sizes import STRIDING, pair, size_after
from .snapshot import ModuleSnapshot, read_settings
from .tokens import Size

T = TypeVar("T")
_MOST = 256  # answers that are remembered of a cut: by layer, by sizes of images
# Models of timm, transformers, torchvision, open_clip and vit-pytorch name what cuts their image with one of these words. A
# name decides what is looked at; what a grid is follows from sizes.
_EMBEDDINGS = ("patch_embed", "embeds", "pixel_embed")
_STEMS = (*_EMBEDDINGS, "patch_embeddings", "embeddings", "conv_proj", "to_patch_embedding", "conv1", "stem")
_CLASS = ("cls_token", "class_token", "class_embedding")
_DISTILLED = ("dist_token", "distillation_token")
_REGISTERS = ("reg_token", "register_tokens")
_SIDES = re.compile(r"\(\w+ (\w+)\)(?=.*->)")  # of a patch, in a pattern of einops
# where words come in, no image does
_VOCABULARY = ("token_embedding", "word_embeddings", "text_embeddings", "embed_tokens", "wte")


def path_to(model: nn.Module, name: str) -> list[nn.Module]:
    """The model, and module after module down to the one of that name."""
    path, module = [model], model
    for part in name.split("."):
        if (below := module._modules.get(part)) is None:
            break
        module = below
        path += [module]
    return path


def trunk_of(model: nn.Module, name: str = "") -> nn.Module:
    """The part of a model that cuts the image into patches for the module of that name: the outermost with a stem."""
    return find_trunks(model, [name])[name]


def find_trunks(model: nn.Module, names: Iterable[str]) -> dict[str, nn.Module]:
    """`trunk_of` for several modules by name; what is around many is looked at once."""
    has_stem: dict[nn.Module, bool] = {}
    found: dict[str, nn.Module] = {}
    for name in names:
        found[name] = model
        for module in path_to(model, name):
            if module not in has_stem:
                has_stem[module] = _stem_attribute(module) is not None
            if has_stem[module]:
                found[name] = module
                break
    return found


def stem_of(trunk: nn.Module) -> nn.Module | None:
    """The module the image goes into first: `patch_embed`, else the first 2-d convolution, or what pads for it."""
    name = _stem_attribute(trunk)
    stem: nn.Module = trunk if name is None else getattr(trunk, name)
    if name in _EMBEDDINGS:
        return stem
    inside = list(stem.modules())
    # what pads images for its convolution is given them as they are
    padding = (m for m in inside if name is not None and hasattr(m, "maybe_pad"))
    return next(padding, next((m for m in inside if isinstance(m, nn.Conv2d)), None))


def stems_of(trunks: Iterable[nn.Module]) -> dict[nn.Module, list[nn.Module]]:
    """The modules that images go into first, each with the parts of the model it cuts them for."""
    stems: dict[nn.Module, list[nn.Module]] = {}
    for trunk in dict.fromkeys(trunks):
        if (stem := stem_of(trunk)) is not None:
            stems.setdefault(stem, []).append(trunk)
    return stems


class Cut(NamedTuple):
    """How a part of a model cuts an image into patches, as it is at one time.

    Attributes:
        trunk: the part of the model.
        prefix: names of the tokens it puts before its patches.
        patch_size: (height, width) in pixels from one patch to the next; None where it is not known.
        stem: the layer that makes these steps, where one layer does.
        holders: the modules that tell.
        embed: what embeds patches, with its numbers of that time; None where nothing is named so.
        settings: names and values of what all this follows from.
        known: what has been worked out of it, for the layers and the forwards to come; by what was asked.
    """

    trunk: nn.Module
    prefix: tuple[str, ...]
    patch_size: Size | None
    stem: nn.Module | None
    holders: list[nn.Module]
    embed: Any
    settings: list[Any]
    known: dict[Any, Any]

    def remember(self, asked: Hashable, find: Callable[[], T]) -> T:
        """What was found before when the same was asked; else what is found now."""
        known = self.known
        if asked not in known:
            while len(known) >= _MOST:
                known.pop(next(iter(known)), None)
            known[asked] = find()
        found: T = known[asked]
        return found


def cut_of(trunk: nn.Module, before: Cut | None = None) -> Cut:
    """Look at how a part of a model cuts an image now; the cut from before, if it still does it like that."""
    holders = _find_holders(trunk) if before is None else before.holders
    settings = [each for holder in holders for item in read_settings(holder).items() for each in item]
    # by identity, since what a tuple holds may not be comparable
    if before is not None and len(before.settings) == len(settings) and all(map(operator.is_, before.settings, settings)):
        return before
    embed = next(iter(_children(trunk, _EMBEDDINGS).values()), None)
    snapshot = None if embed is None else ModuleSnapshot(embed, read_settings(embed))
    stem = _find_stride(trunk)
    # windows of an overlapping stem are larger than the steps they go in, which are what a patch has to itself
    patch_size = _patch_size(holders) if stem is None else pair(stem.stride)
    return Cut(trunk, _prefix_names(holders), patch_size, stem, holders, snapshot, settings, {})


def _find_holders(trunk: nn.Module) -> list[nn.Module]:
    stem = _find_stride(trunk)
    return [trunk, *_children(trunk, _STEMS).values(), *([] if stem is None else [stem])]


def _find_stride(trunk: nn.Module) -> Any:
    """The one convolution of a stem that skips pixels; None where there are several, one after or beside the other, or none."""
    stem = stem_of(trunk)
    convolutions = [] if stem is None else [m for m in stem.modules() if isinstance(m, STRIDING) and set(pair(m.stride)) != {1}]
    return convolutions[0] if len(convolutions) == 1 else None


def _prefix_names(holders: list[nn.Module]) -> tuple[str, ...]:
    """Names of the tokens a model puts before its patches."""

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


def _patch_size(holders: list[nn.Module]) -> Size | None:
    """(height, width) in pixels of the patches a model cuts its image into; None where it does not say."""
    sizes = (pair(size) for m in holders if isinstance(size := getattr(m, "patch_size", None), (int, tuple, list)))
    return next(((int(size[0]), int(size[1])) for size in sizes if len(size) == 2), None)


def stem_grid(cut: Cut, image_size: Size) -> Size | None:
    """(rows, columns) of patches that the first layer makes of an image; None where it is not one layer that does."""
    if cut.stem is None:
        step = _rearranged(cut.trunk)
        return None if step is None else (image_size[0] // step[0], image_size[1] // step[1])
    if hasattr(stem_of(cut.trunk), "maybe_pad"):  # of transformers: up to whole patches
        height, width = pair(cut.stem.stride)
        return -(-image_size[0] // height), -(-image_size[1] // width)
    told = getattr(cut.embed, "dynamic_feat_size", None)
    rows, columns = size_after(image_size, cut.stem) if told is None else told(image_size)
    return int(rows), int(columns)


def _rearranged(trunk: nn.Module) -> Size | None:
    """(height, width) in pixels of patches that a layer of einops cuts, "b c (h p1) (w p2) -> ..."; None where none does."""
    for layer in (m for stem in _children(trunk, _STEMS).values() for m in stem.modules()):
        pattern, lengths = getattr(layer, "pattern", None), getattr(layer, "axes_lengths", None)
        if not isinstance(pattern, str) or not isinstance(lengths, Mapping):
            continue
        sides = _SIDES.findall(pattern)
        if len(sides) == 2 and lengths.keys() >= {*sides}:
            return int(lengths[sides[0]]), int(lengths[sides[1]])
    return None


def reductions_of(model: Any) -> list[int]:
    """By how much a model of timm says that its stages shrink images; nothing of others."""
    info = getattr(model, "feature_info", None) or []
    layers = getattr(info, "info", info)
    return [int(layer["reduction"]) for layer in layers if isinstance(layer, dict) and layer.get("reduction")]


def grid_size(
    cut: Cut, image_size: Size | None, patches: int, exactly: bool = False, called: tuple[int, ...] = ()
) -> Size | None:
    """(rows, columns) of so many patches; None if they are no grid over the image.

    Args:
        exactly: take the word of a patch embedding that tells its grid, where else a coarser one would do.
        called: the shape of what the attention was called with, without the batch.
    """
    told = hasattr(cut.embed, "dynamic_feat_size")
    if image_size is None:
        grid = getattr(cut.embed, "grid_size", None)
    else:  # what the first layer makes, where it leaves out what fills no patch
        grid = cut.embed.dynamic_feat_size(image_size) if told else stem_grid(cut, image_size)
    if grid is not None and grid[0] * grid[1] == patches:
        return int(grid[0]), int(grid[1])
    if image_size is None or (grid is not None and ((told and exactly) or not _may_coarsen(cut, called))):
        return None
    return _factors(patches, image_size) or _halved(patches, image_size)


def _may_coarsen(cut: Cut, called: tuple[int, ...]) -> bool:
    """Whether a grid may be coarser than the stem made it; where it may not, fewer tokens are merged or chosen ones."""
    # a pyramid shrinks its grid by layers that skip places, or makes tokens wider where it joins them
    width = getattr(cut.stem, "out_channels", None)
    if width is not None and called and width not in (called[-1], *called[:-2]):  # channels come last, or before a grid
        return True
    stem = stem_of(cut.trunk)
    before = set() if stem is None else {*stem.modules()}
    later = (m for m in cut.trunk.modules() if isinstance(m, STRIDING) and m not in before)
    return any(set(pair(m.stride)) != {1} for m in later)


def sees_patches(model: nn.Module, name: str) -> bool:
    """Whether a module may see patches: it is in the part of the model that cuts the image, and no words come into that part.

    A model in which no part is known to cut the image is such a part itself.
    """
    for module in reversed(path_to(model, name)):
        if _has_vocabulary(module):
            return False
        if _stem_attribute(module) is not None:
            return True
    return all(_stem_attribute(module) is None for module in model.modules())


def _children(module: nn.Module, names: Iterable[str]) -> dict[str, nn.Module]:
    """Modules in a module that have one of these names, in the order of the names."""
    below, cls = module._modules, type(module)
    # a property of the class may give one, too
    found = {n: below[n] if n in below else getattr(module, n, None) for n in names if n in below or hasattr(cls, n)}
    return {name: child for name, child in found.items() if isinstance(child, nn.Module)}


def _stem_attribute(module: nn.Module) -> str | None:
    stems = _children(module, _STEMS)
    return next((name for name, child in stems.items() if not _has_vocabulary(child)), None) if stems else None


def _has_vocabulary(module: nn.Module) -> bool:
    """Whether words come in here, directly or through what embeds them."""
    holders = [module, *_children(module, _STEMS).values()]
    return any(_children(holder, _VOCABULARY) for holder in holders)


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
