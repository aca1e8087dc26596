"""What can be asked of each image: figures, rows, vectors and maps, by name."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Union

from torch import Tensor

from ..analysis.rollouts import rollout
from ..analysis.statistics import Statistic, compute_statistics, entropy, mean_attention_distance, received
from ..errors import HookattnError, UnreadableError, did_you_mean
from ..maps.attention_map import AttentionMap


@dataclass(frozen=True)
class Quantity:
    """Something that is taken of every image.

        extract(model, "photos/", "run.zarr", what=["entropy", Quantity("top", ("head",), lambda m: m[:, :, 0].amax(-1))])

    Attributes:
        name: of its array in the store.
        dims: names of its axes beside image and layer: "head", "query", "key", "channel", or others.
        of: makes it of a map: (images, *dims); of `rec.maps` where it is not `per_layer`.
        statistic: what `of` is given in place of the map: all statistics of a map are taken while it is computed once.
        per_layer: False for what is made of all layers together.
        bounded: True where values lie between 0 and 1, so that 8 bits can hold them.
        units: of values, for the axes of plots.
    """

    name: str
    dims: tuple[str, ...]
    of: Callable[[Any], Tensor]
    statistic: Statistic | None = None
    per_layer: bool = True
    bounded: bool = False
    units: str = ""

    @property
    def axes(self) -> tuple[str, ...]:
        """Names of its axes beside image."""
        return ("layer", *self.dims) if self.per_layer else self.dims

    @property
    def is_large(self) -> bool:
        """Whether it grows with the number of tokens, and is stored in the dtype that is asked for; others are float32."""
        return bool({"query", "key"} & {*self.dims})


What = Union[str, Quantity]
COORDINATES = {"image", "layer", "depth", "head", "key_token", "key_row", "key_col", "label", "status", "sha256", "error"}
COORDINATES |= {"grid_rows", "grid_cols"}
"""Arrays of the store that are there whatever is taken."""


def find_quantities(what: str | Quantity | Iterable[What]) -> tuple[Quantity, ...]:
    """The quantities of names, separated by commas or in a list, among which may be quantities of one's own.

    Raises:
        HookattnError: there is no such name, one is there twice, or one's own cannot be called so.
    """
    listed = [what] if isinstance(what, Quantity) else what.split(",") if isinstance(what, str) else list(what or ())
    found = tuple(each if isinstance(each, Quantity) else _find(each) for each in listed)
    _check_names(found)
    names = [each.name for each in found]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise HookattnError(f"{twice!r} is asked for twice; leave one out, or give yours another name.")
    if not found:
        raise HookattnError(f"nothing is asked for: what={','.join(QUANTITIES)!r}, or some of these.")
    return found


def _find(name: Any) -> Quantity:
    found = QUANTITIES.get(str(name).strip())
    if found is None:
        raise HookattnError(f"there is nothing called {name!r} to take of an image. {did_you_mean(str(name), QUANTITIES)}")
    return found


def _check_names(quantities: Sequence[Quantity]) -> None:
    """Check that each can have an array of its name, and xarray its axes."""
    dims = {dim for each in quantities for dim in each.dims}
    there = {*COORDINATES, *dims, *(f"{each.name}_max" for each in quantities)}
    for each in quantities:
        if each.name in there or re.fullmatch(r"\w[\w.-]*", each.name) is None:
            raise HookattnError(f"a store can have no array {each.name!r} for a quantity; give it another name.")
        if len({*each.dims, "image", "layer"}) < len(each.dims) + 2:
            raise HookattnError(
                f"{each.name!r} has the axes {', '.join(each.dims)}: name each once, without image and layer, which are there."
            )


def take_of_map(m: AttentionMap, images: int, quantities: Sequence[Quantity]) -> dict[str, Tensor]:
    """Take quantities of one map, which is computed once for all statistics among them: (images, *dims) each.

    Raises:
        HookattnError: one of them cannot be had of this map.
    """
    statistics = [each.statistic for each in quantities if each.statistic is not None]
    computed = iter(compute_statistics(m, *statistics)) if statistics else iter(())
    return {q.name: _by_image(q, m, q.of(m if q.statistic is None else next(computed)), images) for q in quantities}


def check_axes(quantity: Quantity, found: Any) -> Tensor:
    """What was made of a map, or of all: a tensor of the axes that the quantity has.

    Raises:
        HookattnError: it is none.
    """
    if isinstance(found, Tensor) and found.dim() == 1 + len(quantity.dims):
        return found
    what = f"a tensor {tuple(found.shape)}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
    raise HookattnError(f"its `of` gives {what} where a tensor ({', '.join(('images', *quantity.dims))}) is expected")


def _by_image(quantity: Quantity, m: AttentionMap, found: Tensor, images: int) -> Tensor:
    """(images, *dims); a figure of windows is averaged over those of an image."""
    check_axes(quantity, found)
    if len(found) == images:
        return found
    if m.axes[0] == "batch * windows" and not quantity.is_large:
        return found.reshape(images, -1, *found.shape[1:]).mean(1)
    raise UnreadableError(
        f"{quantity.name!r} of {m.name!r} is of {len(found)} pieces of {images} images ({m.axes[0]}), and is stored where "
        "a map is of a whole image; ask for entropy and distance there, or for other layers."
    )


QUANTITIES = {
    each.name: each
    for each in (
        Quantity("cls", ("head", "key"), lambda m: m.rows("cls"), bounded=True),
        Quantity("rollout", ("key",), partial(rollout, query="cls"), per_layer=False, bounded=True),
        Quantity("entropy", ("head",), lambda rows: rows.mean(-1), entropy, units="nats"),
        Quantity("distance", ("head",), lambda found: found, mean_attention_distance, units="pixels"),
        Quantity("received", ("head", "key"), lambda found: found, received, bounded=True),
        Quantity("keys", ("head", "key", "channel"), lambda m: m.k[...]),
        Quantity("maps", ("head", "query", "key"), lambda m: m[...], bounded=True),
    )
}
"""What is known by name.

    cls        what the class token attends to: (image, layer, head, key)
    rollout    where it comes from, through all layers: (image, key), see `analysis.rollout`
    entropy    mean entropy of the rows of a head, in nats: (image, layer, head)
    distance   mean attention distance of a head, in pixels: (image, layer, head)
    received   what each key gets, the mean of its column: (image, layer, head, key)
    keys       keys as they meet the queries: (image, layer, head, key, channel)
    maps       whole maps: (image, layer, head, query, key)
"""
