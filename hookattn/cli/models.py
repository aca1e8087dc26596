"""Models by name: with weights from the hub, a folder or a file, or without."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Union, cast

import timm
import torch
from torch import Tensor, nn

from ..errors import HookattnError
from ..extraction.sources.hub import explain_refusal, find_fetched_commit, not_waiting_for_hub
from .checkpoints import Fit, load_fitting, watching_loads
from .elsewhere import FAMILIES, HUB, split_revision

Sizes = Union[int, tuple[int, int], None]


def load_model(name: str, checkpoint: Path | None, img_size: Sizes, *, whole: bool) -> nn.Module:
    """A model with weights, whose `pretrained_cfg` says how it wants photos.

    Args:
        name: of timm, with or without "hf-hub:" or "local-dir:", or of another library: "transformers:...", "open_clip:...".
        checkpoint: a file of weights; None for those that go with the name.
        img_size: pixels of its images; None for its own.
        whole: whether whole photos are to be shown: a model that can be made so takes images of any size.

    Raises:
        HookattnError: there is no such model, or its weights do not fit or cannot be had.
    """
    if checkpoint is not None and not checkpoint.is_file():
        raise HookattnError(f"--checkpoint {checkpoint} is no file.")
    with _answering_hub(name, "weights", is_asked=checkpoint is None or ":" in name):
        family, _, rest = name.partition(":")
        if family in FAMILIES:
            return FAMILIES[family].load(rest, checkpoint).eval()
        options: dict[str, Any] = {"num_classes": 0}
        if whole and _can_take_any_size(name):
            options["dynamic_img_size"] = True
        if checkpoint is not None:
            return _load_file(name, checkpoint, img_size, options)
        model, fit = _attempt(name, img_size, options)
    if not fit.is_right:
        raise HookattnError(f"the weights of {name} do not fit it: {fit}.")
    if family in HUB:
        repository, revision = split_revision(family, rest)
        cast(Any, model).hub_commit = find_fetched_commit(repository, "config.json", revision)
    return model


def without_revision(name: str) -> str:
    """The name of a model whatever the commit that it was asked for at: two of them are told apart by their weights."""
    source, colon, place = name.partition(":")
    return f"{source}{colon}{split_revision(source, place)[0]}"


def make_model(name: str, img_size: Sizes) -> nn.Module:
    """A model without weights, whose `pretrained_cfg` says how it wants photos.

    Raises:
        HookattnError: there is no such model, or what it is made of cannot be had.
    """
    with _answering_hub(name, "config", is_asked=":" in name):
        family, _, rest = name.partition(":")
        return FAMILIES[family].make(rest).eval() if family in FAMILIES else create_model(name, img_size, pretrained=False)


def _load_file(name: str, checkpoint: Path, img_size: Sizes, options: dict[str, Any]) -> nn.Module:
    # pretrained, with the file's in place of the hub's: timm then converts names and sizes as it does for those
    def attempt(tensors: dict[str, Tensor]) -> tuple[Union[nn.Module, None], Fit]:
        try:
            return _attempt(name, img_size, {**options, "pretrained_cfg_overlay": {"state_dict": tensors, "source": ""}})
        except HookattnError:
            raise
        except Exception as error:  # timm's functions for other names meet what they were not made for
            if explain_refusal(error):
                raise
            return None, Fit(failed=f"timm cannot convert its names ({type(error).__name__}: {error})")

    return load_fitting(checkpoint, attempt)


def _attempt(name: str, img_size: Sizes, options: dict[str, Any]) -> tuple[nn.Module, Fit]:
    with watching_loads() as fits:
        model = create_model(name, img_size, pretrained=True, **options)
    return model, fits[-1] if fits else Fit()  # none where timm reads a format of others


@contextmanager
def _answering_hub(name: str, what: str, *, is_asked: bool) -> Iterator[None]:
    """Say what to type where the hub does not give what is asked of it; where it does not answer, do not wait for it."""
    try:
        with not_waiting_for_hub() if is_asked and not _is_here(name) else nullcontext():
            yield
    except HookattnError:
        raise
    except Exception as error:  # whatever the hub's client, its network stack and readers of files raise
        if not is_asked:
            raise
        bare = name if ":" in name else name.split(".")[0]
        why = (
            explain_refusal(error)
            or _explain_library(name, error)
            or f"{' '.join(str(error).split()).rstrip('.')[:300]} ({type(error).__name__})"
        )
        file = f" With a file of weights: --model {bare} --checkpoint FILE." if what == "weights" else ""
        raise HookattnError(
            f"the {what} of {name} could not be fetched: {why}.{file} Without a network: hookattn demo."
        ) from error


def _explain_library(name: str, error: Exception) -> str | None:
    """Under which name a model of another library is loaded; None for an error of another kind."""
    source, _, repository = name.partition(":")
    if source in HUB and isinstance(error, KeyError):  # its config has other keys
        return f"it is no model of timm; one of transformers is --model transformers:{repository}"
    if source == "transformers" and "timm" in str(error):
        return f"it is a model of timm, --model hf-hub:{repository}"
    return None


def _is_here(name: str) -> bool:
    """Whether it is a folder, of which the hub is not asked."""
    source, _, path = name.rpartition(":")
    return source.endswith("local-dir") or (source == "transformers" and Path(path).is_dir())


def _can_take_any_size(name: str) -> bool:
    """Whether a model that is made for one size can be made for any, as the signature of its class tells."""
    try:
        with torch.device("meta"):  # without memory or weights
            model = timm.create_model(name)
    except Exception:  # there is none, or it looks at values while it is made
        return False
    return "dynamic_img_size" in inspect.signature(type(model).__init__).parameters


def create_model(name: str, img_size: Sizes, **options: Any) -> nn.Module:
    """A model of timm; one that takes any size is not made for one."""
    _check_name(name)
    try:
        model: nn.Module = timm.create_model(name, **size_options(img_size), **options)
    except TypeError as error:
        if "'img_size'" not in str(error):
            raise
        model = timm.create_model(name, **options)
    return model.eval()


def _check_name(name: str) -> None:
    source, _, path = name.rpartition(":")
    if source == "local-dir":
        if not (Path(path) / "config.json").is_file():
            raise HookattnError(
                f"{path} is no folder of a model of timm, which has a config.json; timm.models.save_for_hf makes one."
            )
        return
    if source in HUB:
        return
    if source:
        raise HookattnError(f"{source!r} names no source of models. There is: hf-hub, local-dir, {', '.join(FAMILIES)}.")
    base, _, tag = name.partition(".")
    if not timm.is_model(base):
        near = timm.list_models(f"*{base}*")[:6] if base else []
        near = near or difflib.get_close_matches(name, timm.list_models(), n=6, cutoff=0.4)
        raise HookattnError(f"timm has no model {name!r}." + (f" Did you mean {', '.join(near)}?" if near else ""))
    tags = [each.partition(".")[2] for each in timm.list_pretrained(f"{base}.*")]
    if tag and tag not in tags:
        raise HookattnError(f"timm has no weights {tag!r} of {base}. There is: {', '.join(tags) or 'none'}.")


def size_options(img_size: Sizes) -> dict[str, Any]:
    return {} if img_size is None else {"img_size": img_size}


def read_size(text: str | None) -> Sizes:
    """A number of pixels, or height and width with a comma between them."""
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if len(parts) > 2 or not all(part.isascii() and part.isdecimal() and 0 < int(part) <= 16384 for part in parts):
        raise HookattnError(
            f"--img-size {text!r} is no size: a number of pixels such as 224, or height and width as 224,320; up to 16384."
        )
    sides = [int(part) for part in parts]
    return sides[0] if len(sides) == 1 else (sides[0], sides[1])
