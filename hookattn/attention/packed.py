"""Several projections that one layer makes at once, such as queries, keys and values, and where each lies in its weight."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import NamedTuple

from einops import rearrange
from torch import Tensor, nn

from .overheard import Own

AXES = r"\([^()]*\)|[^\s()]+"
PACKED = r"\(([^()]*\bparts\b[^()]*)\)"


class Plan(NamedTuple):
    """How x, weight and bias are cut before they are multiplied, made of a pattern of einops for `project`.

    Attributes:
        x: the pattern that makes (batch, tokens, features) of x; empty if it is that already.
        packed: names of the axes that are packed in the rows of the weight, in their order.
    """

    x: str
    packed: tuple[str, ...]


@lru_cache
def plan_of(pattern: str) -> Plan | None:
    """The plan of a pattern whose outcome is (parts, batch, heads, tokens, head_dim); None of others, which are not cut."""
    left, _, right = pattern.partition("->")
    out, packed = re.findall(AXES, right), re.search(PACKED, left)
    if packed is None or len(out) != 5 or (out[0], out[2], out[4]) != ("parts", "h", "d"):
        return None
    names = packed.group(1).split()
    if sorted(names) != ["d", "h", "parts"]:
        return None
    before, after = left.replace(packed.group(0), "c").split(), [*out[1].split(), *out[3].split(), "c"]
    return Plan("" if before == after else f"{' '.join(before)} -> {out[1]} {out[3]} c", tuple(names))


class Packed:
    """The projections that a plain layer makes at once, none of which is cut out of its weight before it is needed.

    Args:
        layer, x: the layer, and what it is called with.
        weight, bias: of the layer.
        pattern, plan: how it packs them.
        axes: sizes of the axes in the pattern; "parts" is how many projections there are.

    Attributes:
        heads, width: of each projection.

    Raises:
        ValueError: the weight cannot be divided like this.
    """

    def __init__(
        self,
        layer: nn.Linear | nn.Conv2d,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        pattern: str,
        plan: Plan,
        axes: dict[str, int],
    ) -> None:
        self.layer, self.x, self.weight, self.bias = layer, x, weight, bias
        self._pattern, self._plan, self._axes = pattern, plan, axes
        rows = weight.shape[0]
        self._count = rows // axes["parts"]
        self.heads = axes["h"] if "h" in axes else self._count // axes["d"]
        self.width = axes["d"] if "d" in axes else self._count // self.heads
        if axes["parts"] * self.heads * self.width != rows:
            raise ValueError(f"{layer} makes {rows} features, which cannot be divided as {pattern!r} with {axes} says")

    def cut(self, t: Tensor, number: int) -> Tensor:
        """(heads, head_dim, ...) of one projection, out of the weight or the bias, in whatever order they are packed."""
        names = self._plan.packed
        if names == _IN_ORDER:
            return self.flat(t, number).view(self.heads, self.width, *t.shape[1:])
        sizes = {"parts": self._axes["parts"], "h": self.heads, "d": self.width}
        part = t.view(*[sizes[name] for name in names], *t.shape[1:]).select(names.index("parts"), number)
        return part if names.index("h") < names.index("d") else part.transpose(0, 1)

    def flat(self, t: Tensor, number: int) -> Tensor:
        """The same as (heads * head_dim, ...)."""
        if self._plan.packed == _IN_ORDER:
            return t[number * self._count : (number + 1) * self._count]
        return self.cut(t, number).flatten(0, 1)

    def own(self, number: int) -> Own:
        """Where the module makes one of them itself."""
        if self._plan.x:
            return Own(self.layer, self.x, lambda y: rearrange(y, self._pattern, **self._axes)[number])
        return Own(self.layer, self.x, lambda y: self._part_of(y, number))

    def tokens(self) -> Tensor:
        """(batch, tokens, features) of x."""
        if not self._plan.x:
            return self.x
        return rearrange(self.x, self._plan.x, **{n: size for n, size in self._axes.items() if n not in self._plan.packed})

    def _part_of(self, y: Tensor, number: int) -> Tensor:
        """(batch, heads, tokens, head_dim) of one, out of all of them, (batch, tokens, parts * heads * head_dim)."""
        part = self.cut(y.movedim(-1, 0), number)
        return part.permute(2, 0, 3, 1)


_IN_ORDER = ("parts", "h", "d")
