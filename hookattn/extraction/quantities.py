"""What can be asked of each image: figures, rows, vectors and maps, by name."""

from __future__ import annotations

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
    def is_large(self) -> bool:
        """Whether it grows with the number of tokens, and is stored in the dtype that is asked for; others are float32."""
        return bool({"query", "key"} & {*self.dims})


What = Union[str, Quantity]


def find_quantities(what: str | Quantity | Iterable[What]) -> tuple[Quantity, ...]:
    """The quantities of names, separated by commas or in a list, among which may be quantities of one's own.

    Raises:
        HookattnError: there is no such name, or one is there twice.
    """
    listed = [what] if isinstance(what, Quantity) else what.split(",") if isinstance(what, str) else list(what)
    found = tuple(each if isinstance(each, Quantity) else _find(each.strip()) for each in listed)
    names = [each.name for each in found]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise HookattnError(f"{twice!r} is asked for twice; leave one out, or give yours another name.")
    if not found:
        raise HookattnError(f"nothing is asked for: what={','.join(QUANTITIES)!r}, or some of these.")
    return found


def _find(name: str) -> Quantity:
    if name not in QUANTITIES:
        raise HookattnError(f"there is nothing called {name!r} to take of an image. {did_you_mean(name, QUANTITIES)}")
    return QUANTITIES[name]


def take_of_map(m: AttentionMap, images: int, quantities: Sequence[Quantity]) -> dict[str, Tensor]:
    """Take quantities of one map, which is computed once for all statistics among them: (images, *dims) each.

    Raises:
        HookattnError: one of them cannot be had of this map.
    """
    statistics = [each.statistic for each in quantities if each.statistic is not None]
    computed = iter(compute_statistics(m, *statistics)) if statistics else iter(())
    return {q.name: _by_image(q, m, q.of(m if q.statistic is None else next(computed)), images) for q in quantities}


def _by_image(quantity: Quantity, m: AttentionMap, found: Tensor, images: int) -> Tensor:
    """(images, *dims); a figure of windows is averaged over those of an image."""
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
