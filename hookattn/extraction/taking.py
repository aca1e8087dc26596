"""What is done with a batch: the model runs, and what was asked for is taken of its attention, layer by layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..errors import HookattnError, NoMapError, RecorderError, TokenError, UnreadableError, explained
from ..image.tokens import Tokens
from ..maps.attention_map import AttentionMap
from ..maps.transfer import Copies, copy_into, start_copies
from ..recording.maps import Maps
from ..recording.recorder import AttentionRecorder
from ..recording.reduce import Keep
from ..recording.selection import Layers
from .geometry import Facts, describe_layers
from .layout import Array
from .quantities import Quantity, check_axes, take_of_map

Shape = tuple[int, ...]
_MOST = 2**26  # bytes of a batch that are on their way while the next is read: memory that is pinned, and copies on the device


@dataclass(frozen=True)
class Shapes:
    """What a model gives for one image, found by running it once.

    Attributes:
        layers: heads, queries and keys of each map and where they lie, by name, in the order the modules run.
        shapes: of each quantity without the image: (layers, *dims), each as long as the longest of its name, of any layer.
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
        dims = {each.name: each.axes for each in quantities}
        grown = {
            name: tuple(size + more * (dim in axes) for dim, size in zip(dims[name], shape))
            for name, shape in self.shapes.items()
        }
        return replace(self, shapes=grown, tokens=None)


class Taken(NamedTuple):
    """What was taken of a batch.

    Attributes:
        grid: rows and columns of patches of all images of the batch; zeros where they are not known.
        copies: what is still on its way to where it goes.
    """

    grid: tuple[int, int]
    copies: Copies


class _Batch(NamedTuple):
    """The batch that is being taken: how many images, what the model gives, and by quantity where it goes."""

    images: int
    known: Shapes
    out: Mapping[str, Array]


class _OfLayer(NamedTuple):
    """What was taken of one layer and has not gone yet: by quantity, and what its keys stand for."""

    values: dict[str, Tensor]
    tokens: Tokens | None


class Taker:
    """Takes quantities of batches of images.

    What is taken of one layer is taken while the model runs, and its map and input are let go before the next layer runs; for
    what is made of all layers together, inputs are held until the forward has ended. On the model's device there is never
    more than a chunk of one layer's map at a time, or one layer's map where maps are asked for.

    The model is recorded from the first batch to the end of the block.

        with Taker(model, None, quantities) as taker:
            known = taker.probe(images[:1])
            taken = taker.take(images, known, out)

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
        self._open = ExitStack()
        self._taking: AttentionRecorder | None = None
        self._batch = _Batch(0, Shapes({}, {}, None), {})

    def __enter__(self) -> Taker:
        return self

    def __exit__(self, *error: object) -> None:
        self._taking = None
        self._open.close()

    def probe(self, images: Tensor) -> Shapes:
        """Run the model once to see what it gives.

        Raises:
            NoMapError: it has no attention that can be read.
            HookattnError: a quantity cannot be had of any layer; the reason is told.
        """
        with AttentionRecorder(self.model, self._layers) as rec:
            self._run(images)
        maps = rec.maps
        if not maps:
            raise NoMapError(f"no attention of {maps.model} can be read. {explained(maps.skipped.values())}")
        shapes, missing = dict[str, Shape](), dict[str, dict[str, str]]()
        for quantity in self._of_layers:
            found, missing[quantity.name] = _try_layers(maps, len(images), quantity)
            if not found:
                raise _cannot_be_had(quantity, next(iter(missing[quantity.name].values())))
            shapes[quantity.name] = (len(maps), *(max(lengths) for lengths in zip(*found)))
        shapes |= {quantity.name: _try_all(maps, quantity) for quantity in self._of_all}
        return Shapes(
            describe_layers(maps),
            _align(shapes, {each.name: each.axes for each in (*self._of_layers, *self._of_all)}),
            _common_tokens([_tokens_of(m) for m in maps.values()]),
            {name: why for name, why in missing.items() if why},
        )

    def take(self, images: Tensor, known: Shapes, out: Mapping[str, Array]) -> Taken:
        """Run the model on a batch.

        On a GPU it need not have ended when this returns, so that the next batch can be read and begun meanwhile.

        Args:
            images: (images, channels, height, width).
            known: what the model gives.
            out: where it goes, by quantity: (images, layers, *dims), or (images, *dims) of all layers together. What an image
                or a layer does not have stays as it is.

        Raises:
            HookattnError: something that could be had in the probe cannot be had, or is larger.
        """
        self._batch = _Batch(len(images), known, out)
        rec = self._recorder()
        self._run(images)
        layers = {n: self._take(m) for n, m in rec.maps.items()} if self._of_all else _collect(rec)
        if absent := [name for name in known.layers if name not in layers]:
            raise UnreadableError(f"{absent[0]!r} ran for the first image and not for a later one; leave it out: layers=.")
        found = [(q, values, place) for place, name in enumerate(known.layers) for q, values in layers[name].values.items()]
        pairs = [_place(out[name][:, place], values, name) for name, values, place in found]
        pairs += [_place(out[each.name], each.of(rec.maps), each.name) for each in self._of_all]
        if sum(values.nbytes for _, values in pairs) > _MOST:
            copy_into(pairs)
            pairs = []
        tokens = _common_tokens([layer.tokens for layer in layers.values()])
        return Taken((0, 0) if tokens is None else tokens.grid_size, start_copies(pairs))

    def _recorder(self) -> AttentionRecorder:
        """A recorder that is open, for all batches one."""
        if self._taking is None:
            keep: Keep = "inputs" if self._of_all else self._take
            self._taking = self._open.enter_context(AttentionRecorder(self.model, self._layers, keep=keep))
        return self._taking

    def _run(self, images: Tensor) -> None:
        with torch.no_grad(), _answering_model(self.model, images):
            self.model(images.to(self._like.device, self._like.dtype, non_blocking=True))

    def _take(self, m: AttentionMap) -> _OfLayer:
        """What is taken of one map, while its module runs; maps themselves go to the CPU before the next is made."""
        images, known, out = self._batch
        wanted = [each for each in self._of_layers if m.name not in known.missing.get(each.name, ())]
        taken = take_of_map(m, images, wanted)
        if m.name in known.layers:
            place = [*known.layers].index(m.name)
            maps = [each.name for each in wanted if "query" in each.dims]
            copy_into(_place(out[name][:, place], taken.pop(name), name) for name in maps)
        return _OfLayer(taken, _tokens_of(m))


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
    except Exception as error:  # whatever it is
        kind, shape = type(model).__name__, " x ".join(map(str, images.shape))
        raise HookattnError(
            f"this {kind} takes no images {shape} ({type(error).__name__}: {error}). Show all at its own size: crop='center' "
            'without another size, the "input_size" of preprocessing, or what the transform of a data set makes.'
        ) from error


def _collect(rec: AttentionRecorder) -> dict[str, _OfLayer]:
    """What was taken of each layer while the model ran, or what was raised there."""
    try:
        return dict(rec.reduced)
    except RecorderError as error:
        if isinstance(error.__cause__, HookattnError):
            raise error.__cause__ from None
        raise


def _try_all(maps: Maps, quantity: Quantity) -> Shape:
    """The shape of a quantity of all layers together, without the image."""
    try:
        return tuple(check_axes(quantity, quantity.of(maps)).shape[1:])
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


def _align(shapes: Mapping[str, Shape], axes: Mapping[str, tuple[str, ...]]) -> dict[str, Shape]:
    """Shapes in which axes of one name are of one length, the longest, as xarray wants them."""
    lengths: dict[str, int] = {}
    for name, shape in shapes.items():
        lengths |= {axis: max(size, lengths.get(axis, 0)) for axis, size in zip(axes[name], shape)}
    return {name: tuple(lengths[axis] for axis in axes[name]) for name in shapes}


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


def _place(out: Array, values: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """The beginning of every axis of an array, as a tensor, and the values that go there."""
    if any(size > room for size, room in zip(values.shape, out.shape)):
        raise UnreadableError(
            f"{name!r} is {tuple(values.shape[1:])} for one of the images, and there is room for {out.shape[1:]}, as for the "
            'first: show all images at one size, crop="center", or make them so in the data set.'
        )
    return torch.from_numpy(out[tuple(slice(size) for size in values.shape)]), values
