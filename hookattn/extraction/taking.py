"""What is done with a batch: the model runs, and what was asked for is taken of its attention, layer by layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import HookattnError, NoMapError, TokenError, UnreadableError
from ..image.tokens import Tokens
from ..maps.attention_map import AttentionMap
from ..recording.maps import Maps
from ..recording.recorder import AttentionRecorder
from ..recording.reduce import Keep
from ..recording.selection import Layers
from .geometry import Facts, describe_layers
from .layout import Array
from .quantities import Quantity, take_of_map

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Shapes:
    """What a model gives for one image, found by running it once.

    Attributes:
        layers: heads, queries and keys of each map and where they lie, by name, in the order the modules run.
        shapes: of each quantity without the image: (layers, *dims), as long as that of the longest layer.
        tokens: what the keys of all layers stand for; None where they differ, or it is not known.
        missing: quantities that some layers do not have, by quantity and layer, with the reason.
    """

    layers: Mapping[str, Facts]
    shapes: Mapping[str, Shape]
    tokens: Tokens | None
    missing: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    def with_room_for(self, patches: int, quantities: Sequence[Quantity]) -> Shapes:
        """The same for images of up to so many patches, each on a grid of its own.

        Raises:
            TokenError: layers have other keys than each other, or it is not known what they stand for.
        """
        if self.tokens is None:
            raise TokenError(
                "images of different shapes are stored beside each other where all layers look at one grid of patches, and "
                'those of this model do not: show all images at one size, crop="center".'
            )
        more, axes = patches - self.tokens.grid_size[0] * self.tokens.grid_size[1], {"query", "key"}
        dims = {each.name: (*("layer",) * each.per_layer, *each.dims) for each in quantities}
        grown = {
            name: tuple(size + more * (dim in axes) for dim, size in zip(dims[name], shape))
            for name, shape in self.shapes.items()
        }
        return replace(self, shapes=grown, tokens=None)


class Taken(NamedTuple):
    """What was taken of a batch.

    Attributes:
        values: by quantity, (images, layers, *dims), or (images, *dims) of all layers together.
        grid: rows and columns of patches of all images of the batch; zeros where they are not known.
    """

    values: dict[str, Array]
    grid: tuple[int, int]


class _OfLayer(NamedTuple):
    """What was taken of one layer: by quantity, and what its keys stand for."""

    values: dict[str, Tensor]
    tokens: Tokens | None


class Taker:
    """Takes quantities of batches of images.

    What is taken of one layer is taken while the model runs, and its map and input are let go before the next layer runs; for
    what is made of all layers together, inputs are held until the forward has ended. On the model's device there is never
    more than a chunk of one layer's map at a time, or one layer's map where maps are asked for.

    Args:
        model: in eval mode.
        layers: as for a recorder.
        quantities: what is taken.
    """

    def __init__(self, model: nn.Module, layers: Layers, quantities: Sequence[Quantity]) -> None:
        self.model, self._layers = model, layers
        self._of_layers = [each for each in quantities if each.per_layer]
        self._of_all = [each for each in quantities if not each.per_layer]
        self._like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0, device="cpu"))

    def probe(self, images: Tensor) -> Shapes:
        """Run the model once to see what it gives.

        Raises:
            NoMapError: it has no attention that can be read.
            HookattnError: a quantity cannot be had of any layer; the reason is told.
        """
        maps = self._record(images).maps
        if not maps:
            raise NoMapError(f"no attention of {maps.model} can be read. {'; '.join(list(maps.skipped.values())[:3])}")
        shapes, missing = dict[str, Shape](), dict[str, dict[str, str]]()
        for quantity in self._of_layers:
            found, missing[quantity.name] = _try_layers(maps, len(images), quantity)
            if not found:
                raise _cannot_be_had(quantity, next(iter(missing[quantity.name].values())))
            shapes[quantity.name] = (len(maps), *(max(lengths) for lengths in zip(*found)))
        shapes |= {quantity.name: _try_all(maps, quantity) for quantity in self._of_all}
        return Shapes(
            describe_layers(maps),
            shapes,
            _common_tokens([_tokens_of(m) for m in maps.values()]),
            {name: why for name, why in missing.items() if why},
        )

    def take(self, images: Tensor, known: Shapes) -> Taken:
        """Run the model on a batch; NaN is where an image or a layer has less than others.

        Raises:
            HookattnError: something that could be had in the probe cannot be had, or is larger.
        """
        out = {name: np.full((len(images), *shape), np.nan, np.float32) for name, shape in known.shapes.items()}
        if self._of_all:
            maps = self._record(images).maps
            layers = {name: self._take(m, len(images), known) for name, m in maps.items()}
        else:
            layers = dict(self._record(images, partial(self._take, images=len(images), known=known)).reduced)
        if absent := [name for name in known.layers if name not in layers]:
            raise UnreadableError(f"{absent[0]!r} ran for the first image and not for a later one; leave it out: layers=.")
        for place, name in enumerate(known.layers):
            for quantity, values in layers[name].values.items():
                _put(out[quantity][:, place], values, quantity)
        for each in self._of_all:
            _put(out[each.name], each.of(maps), each.name)
        tokens = _common_tokens([layer.tokens for layer in layers.values()])
        return Taken(out, (0, 0) if tokens is None else tokens.grid_size)

    def _record(self, images: Tensor, keep: Keep = "inputs") -> AttentionRecorder:
        with (
            AttentionRecorder(self.model, self._layers, keep=keep) as rec,
            torch.no_grad(),
            _answering_model(self.model, images),
        ):
            self.model(images.to(self._like.device, self._like.dtype, non_blocking=True))
        return rec

    def _take(self, m: AttentionMap, images: int, known: Shapes) -> _OfLayer:
        """What is taken of one map, while its module runs."""
        wanted = [each for each in self._of_layers if m.name not in known.missing.get(each.name, ())]
        return _OfLayer(take_of_map(m, images, wanted), _tokens_of(m))


@contextmanager
def _answering_model(model: nn.Module, images: Tensor) -> Iterator[None]:
    """Turn what a model's own code raises about images into an error that says what to do."""
    try:
        yield
    except HookattnError:
        raise
    except torch.OutOfMemoryError as error:
        raise HookattnError(
            f"there is not enough memory for {len(images)} images at once; the same again with smaller batches goes on."
        ) from error
    except (AssertionError, RuntimeError, ValueError, TypeError) as error:
        kind, shape = type(model).__name__, " x ".join(map(str, images.shape))
        raise HookattnError(
            f"this {kind} takes no images {shape} ({type(error).__name__}: {error}). Show all at its own size: crop='center' "
            'without another size, the "input_size" of preprocessing, or what the transform of a data set makes.'
        ) from error


def _try_all(maps: Maps, quantity: Quantity) -> Shape:
    """The shape of a quantity of all layers together, without the image."""
    try:
        return tuple(quantity.of(maps).shape[1:])
    except (HookattnError, ValueError) as error:  # ValueError: of layers that do not follow one another
        raise _cannot_be_had(quantity, str(error)) from error


def _cannot_be_had(quantity: Quantity, reason: str) -> UnreadableError:
    return UnreadableError(
        f"{quantity.name!r} cannot be had of this model: {reason.rstrip('.')}. Leave it out, or choose layers that have it."
    )


def _try_layers(maps: Maps, images: int, quantity: Quantity) -> tuple[list[Shape], dict[str, str]]:
    """Shapes of a quantity in the layers that have it, without the image, and why others do not."""
    found, missing = list[Shape](), dict[str, str]()
    for name, m in maps.items():
        try:
            found.append(tuple(take_of_map(m, images, [quantity])[quantity.name].shape[1:]))
        except HookattnError as error:
            missing[name] = str(error)
    return found, missing


def _tokens_of(m: AttentionMap) -> Tokens | None:
    """What the keys of a map stand for; None where that is not known."""
    try:
        return m.tokens
    except TokenError:
        return None


def _common_tokens(found: Sequence[Tokens | None]) -> Tokens | None:
    """What the keys of all maps stand for, if that is one grid of whole images; else None."""
    first = found[0]
    same = all(t and first and (t.prefix, t.grid_size, t.places) == (first.prefix, first.grid_size, None) for t in found)
    return first if same else None


def _put(out: Array, values: Tensor, name: str) -> None:
    """Write values into the beginning of every axis."""
    if any(size > room for size, room in zip(values.shape, out.shape)):
        raise UnreadableError(
            f"{name!r} is {tuple(values.shape[1:])} for one of the images, and there is room for {out.shape[1:]}, as for the "
            'first: show all images at one size, crop="center", or make them so in the data set.'
        )
    out[tuple(slice(size) for size in values.shape)] = values.detach().float().cpu().numpy()
