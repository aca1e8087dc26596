"""Models of other libraries, each with the preprocessing that goes with it, as timm's data config tells it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, cast

from torch import Tensor, nn

from ..errors import HookattnError, MissingExtraError
from ..extraction.sources.hub import find_fetched_commit
from ..image.preprocessing import RESAMPLED
from .checkpoints import Fit, compare, load_fitting, watching_loads

HUB = ("hf-hub", "hf_hub")
"""How timm is told that what follows is a repository, and after an @ its revision."""
_RESIZED = {"shortest": "center", "longest": "border", "squash": "squash"}


class Family(NamedTuple):
    """Models of one library.

    Attributes:
        load: makes a model of a name with weights, those of a file where one is given.
        make: makes one without.
    """

    load: Callable[[str, Path | None], nn.Module]
    make: Callable[[str], nn.Module]


def _load_transformers(name: str, checkpoint: Path | None) -> nn.Module:
    transformers = _import("transformers")
    if checkpoint is not None:
        return _with_file(_make_transformers(name), checkpoint)
    place, revision = split_revision("transformers", name)
    whole, told = transformers.AutoModel.from_pretrained(place, output_loading_info=True, revision=revision)
    fit = compare(whole, {}, sorted(told["missing_keys"]), ())
    if not fit.is_right:
        raise HookattnError(f"the weights of transformers:{name} do not fit it: {fit}.")
    found = _with_config(_tower(whole), _config_of_processor(_processor(name)))
    cast(Any, found).hub_commit = None if Path(place).is_dir() else find_fetched_commit(place, "config.json", revision=revision)
    return found


def _make_transformers(name: str) -> nn.Module:
    transformers = _import("transformers")
    place, revision = split_revision("transformers", name)
    model = transformers.AutoModel.from_config(transformers.AutoConfig.from_pretrained(place, revision=revision))
    return _with_config(_tower(model), _config_of_processor(_processor(name)))


def split_revision(source: str, place: str) -> tuple[str, str | None]:
    """A repository and the revision that follows an @; folders, and what lies elsewhere than on the hub, have none."""
    has_one = source in HUB or (source == "transformers" and not Path(place).is_dir())
    repository, _, revision = place.partition("@") if has_one else (place, "", "")
    return repository, revision or None


def _with_config(model: Any, config: dict[str, Any]) -> nn.Module:
    """The model with what `Photo.open` looks for."""
    model.pretrained_cfg = config
    found: nn.Module = model
    return found


def _tower(model: Any) -> Any:
    """What looks at images in a model of images and text."""
    return getattr(model, "vision_model", model)


def _processor(name: str) -> Any:
    place, revision = split_revision("transformers", name)
    return _import("transformers").AutoImageProcessor.from_pretrained(place, revision=revision)


def _config_of_processor(processor: Any) -> dict[str, Any]:
    """What an image processor of transformers does, as a data config of timm."""
    size, crop = processor.size, getattr(processor, "crop_size", None) if getattr(processor, "do_center_crop", False) else None
    if "height" in size:
        resized, mode = (size["height"], size["width"]), "squash"
    elif "shortest_edge" in size:
        resized, mode = (size["shortest_edge"],) * 2, "center"
    else:
        raise HookattnError(f"{type(processor).__name__} resizes photos to {dict(size)}, which has no counterpart here.")
    shown = (crop["height"], crop["width"]) if crop else resized
    normal = getattr(processor, "do_normalize", True)
    return {
        "input_size": (3, *shown),
        "interpolation": RESAMPLED[int(getattr(processor, "resample", None) or 2)],
        "mean": tuple(processor.image_mean) if normal else (0.0,) * 3,
        "std": tuple(processor.image_std) if normal else (1.0,) * 3,
        "crop_pct": shown[0] / resized[0],
        "crop_mode": mode,
        "fixed_input_size": True,
    }


def _load_open_clip(name: str, checkpoint: Path | None) -> nn.Module:
    open_clip = _import("open_clip")
    name, tag = _split_tag(name)
    if checkpoint is not None:
        return _with_file(_make_open_clip(name), checkpoint)
    if ":" not in name:
        tags = open_clip.list_pretrained_tags_by_model(name)
        if tag not in tags:
            said = f"has no weights {tag!r}" if tag else "needs weights to be named"
            raise HookattnError(
                f"open_clip:{name} {said}. There is: {', '.join(f'open_clip:{name}/{t}' for t in tags) or 'none'}."
            )
    # without being asked to, it makes a model of random weights where it finds none
    found = _of_clip(open_clip.create_model(name, pretrained=tag or None, require_pretrained=True))
    if name.startswith("hf-hub:"):
        repository = name.removeprefix("hf-hub:")
        cast(Any, found).hub_commit = find_fetched_commit(repository, "open_clip_config.json")
    return found


def _make_open_clip(name: str) -> nn.Module:
    return _of_clip(_import("open_clip").create_model(_split_tag(name)[0], load_weights=False))


def _split_tag(name: str) -> tuple[str, str]:
    """A name of open_clip and that of its weights; a source and its path are one name."""
    found, _, tag = name.partition("/")
    if ":" in name:
        return name, ""
    known = _import("open_clip").list_models()
    if found not in known:
        near = [each for each in known if found.lower() in each.lower()][:6] or known[:6]
        raise HookattnError(f"open_clip has no model {found!r}. There is: {', '.join(near)}, ...")
    return found, tag


def _of_clip(clip: Any) -> nn.Module:
    told, visual = _import("open_clip").get_model_preprocess_cfg(clip), clip.visual
    size = told["size"]
    config = {
        "input_size": (3, *((size, size) if isinstance(size, int) else size)),
        "interpolation": told.get("interpolation", "bicubic"),
        "mean": tuple(told["mean"]),
        "std": tuple(told["std"]),
        "crop_pct": 1.0,
        "crop_mode": _RESIZED[told.get("resize_mode", "shortest")],
        "fixed_input_size": True,
    }
    return _with_config(visual, config)


def _with_file(model: nn.Module, checkpoint: Path) -> nn.Module:
    """The model with the weights of a file."""

    def attempt(tensors: dict[str, Tensor]) -> tuple[nn.Module, Fit]:
        with watching_loads() as fits:
            model.load_state_dict(tensors)
        return model, fits[-1]

    return load_fitting(checkpoint, attempt)


def _import(library: str) -> Any:
    from importlib import import_module

    try:
        return import_module(library)
    except ImportError as error:
        package = {"open_clip": "open_clip_torch"}.get(library, library)
        raise MissingExtraError(f"models of {library} need it: pip install {package}.") from error


FAMILIES = {
    "transformers": Family(_load_transformers, _make_transformers),
    "open_clip": Family(_load_open_clip, _make_open_clip),
}
