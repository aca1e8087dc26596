"""Queries, keys and values of a map: what meets in its softmax, and what it is multiplied onto."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Literal

import torch
from einops import rearrange
from torch import Tensor

from ..attention.narrowing import ALL, Pick, pick
from ..attention.projected import Projected, compute
from ..attention.sources import QK, Dense, Source
from ..calls.call import Call
from ..conditions.function_modes import SDPA
from ..errors import UnreadableError
from ..image.tokens import Tokens
from ..recipes.places import keep_reason, raise_reason
from ..recipes.registry import find_values, qualified_name
from .established import NameInErrors, TellWhy, as_in_training
from .forward import Forward, recall
from .lazy import Delivery, LazyArray, Spec
from .pickled import reduce_to
from .reading import Kept, Lost, keep_or_lose, source_of


@dataclass(frozen=True, eq=False)
class Rows(Dense):
    """Queries, keys or values of a call, projected when they are read, and then only what is asked for.

    Attributes:
        tensor: (batch, heads, tokens, head_dim).
    """

    def narrow(self, batch: Pick = ALL, heads: Pick = ALL, rows: Pick = ALL) -> Rows:
        """Cut them to some images, heads and tokens."""
        if isinstance(self.tensor, Projected):
            return Rows(self.tensor.compute_part(batch, heads, rows))
        return Rows(pick(self.tensor, batch, heads, rows))

    def values(self) -> Tensor:
        """The vectors, a copy, since what is read is the reader's."""
        return compute(self.tensor).clone()


class Vectors(LazyArray):
    """Queries, keys or values of one call: (batch, heads, tokens, head_dim), computed when they are sliced, like a map.

        m.k[:, :, 0]           # the key of the first token in each head
        m.k[0, 3, :, :16]      # some of one head of one image
        m.k.image()            # keys as pictures: (images, heads * head_dim, rows, columns)

    They are of the dtype that the module makes them in, unless the recorder was given a `dtype`. What they are is told by
    `AttentionMap.q`, `k` and `v`.

    Attributes:
        shape: (batch, heads, tokens, head_dim).
        dtype, device: of what slices give.
    """

    def __init__(
        self, name: str, which: Literal["q", "k", "v"], call: Call | Kept | Lost, tokens: Callable[[], Tokens], to: Delivery
    ) -> None:
        super().__init__(name, to)
        self._which, self._call, self._tokens = which, call, tokens

    @contextmanager
    def open(self) -> Iterator[Source]:
        """What they are computed from, in the modes of the call for as long as the block lasts.

        Raises:
            UnreadableError: there are none, or it cannot be told which; the reason is told.
            StaleMapError: an input or a parameter has changed since the forward.
        """
        if isinstance(call := self._call, (Kept, Lost)):  # a copy, or one that was saved
            with call.open() as source:
                yield source
            return
        with call.resumed(), NameInErrors(call):
            with TellWhy(self.name), as_in_training(call):
                found = Rows(_values_of(call) if self._which == "v" else _factor_of(call, self._which))
            yield found

    def _spec(self) -> Spec:
        return self._found

    @cached_property
    def _found(self) -> Spec:
        return super()._spec()

    def image(self) -> Tensor:
        """Lay them on the grid that covers the image, heads one after the other as channels; windows are put back.

        Descriptors for finding parts and objects: Amir et al. 2021, "Deep ViT features as dense visual descriptors", take keys.

        Returns:
            (images, heads * head_dim, rows, columns). A patch that stands in several windows has the mean of its vectors, a
            place without a token zero; prefix tokens are left out.

        Raises:
            TokenError: it is not known where the tokens lie on the image.
        """
        tokens = self._tokens()
        given = rearrange(self.read(...), "(b w) h n d -> b w (h d) n", w=tokens.windows)
        laid, count = tokens.lay_out(given), tokens.lay_out(torch.ones_like(given[:, :, :1]))
        return self._deliver(laid / count.where(count > 0, 1))

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled, copied and saved as what they are, computed now; or why there are none."""
        tokens = partial(raise_reason, keep_reason(self._tokens))
        return reduce_to(Vectors, vars(Vectors(self.name, self._which, keep_or_lose(self), tokens, self._deliver)))

    def __repr__(self) -> str:
        try:
            return f"Vectors({self.name!r}, {self._which}, shape={self.shape}, dtype={str(self.dtype).removeprefix('torch.')})"
        except Exception as error:  # a repr never raises
            return f"Vectors({self.name!r}, {self._which}, {type(error).__name__})"


class OfVectors(LazyArray):
    """Base of maps: what they are made of, and what they are multiplied onto."""

    @property
    def call(self) -> Call:
        """The captured call."""
        raise NotImplementedError

    @property
    def x(self) -> Tensor:
        """The tensor the module was called with."""
        return self.call.x

    @property
    def tokens(self) -> Tokens:
        """What the keys stand for."""
        raise NotImplementedError

    @property
    def query_tokens(self) -> Tokens:
        """What the queries stand for."""
        raise NotImplementedError

    @property
    def q(self) -> Vectors:
        """Queries, (batch, heads, queries, head_dim): what meets the keys in the softmax, normalised and rotated, not scaled.

        See `Vectors`; reading them raises UnreadableError where a map is not made of queries and keys.
        """
        return Vectors(self.name, "q", self.call, lambda: self.query_tokens, self._deliver)

    @property
    def k(self) -> Vectors:
        """Keys, (batch, heads, keys, head_dim), likewise."""
        return Vectors(self.name, "k", self.call, lambda: self.tokens, self._deliver)

    @property
    def v(self) -> Vectors:
        """Values, (batch, heads, keys, head_dim): what the map is multiplied onto.

        Only what is asked for is projected where the recipe of the class tells them; elsewhere its forward is run. Where
        something is done to the map before, it is `effective` that they belong to. Reading them raises UnreadableError where it
        is multiplied onto several tensors, or in no product of matrices that can be seen.
        """
        return Vectors(self.name, "v", self.call, lambda: self.tokens, self._deliver)


def _factor_of(call: Call, which: Literal["q", "k"]) -> Tensor:
    """The queries or the keys of a call, whose modes are on already."""
    source = source_of(call)
    if not isinstance(source, QK):
        raise UnreadableError(
            "it does not show queries and keys, only scores or the map that is made of them; slice the map itself, m[...]."
        )
    return source.q if which == "q" else source.k


def _values_of(call: Call) -> Tensor:
    """The values of a call, whose modes are on already: by recipe, or else its forward is run again."""
    found = values_by_recipe(call)
    return Forward(call, recall(call)).values() if found is None else found


def values_by_recipe(call: Call) -> Tensor | None:
    """What a recipe tells of values; None where it tells nothing of such a call, as under modes or an SDPA of the user's.

    Raises:
        UnreadableError: it has made something else than an array of four axes.
    """
    make = find_values(call.layer.module)
    as_written = not call.modes.functions and call.modes.sdpa is SDPA and not any(t.is_nested for t in call.tensors)
    if make is None or not as_written:
        return None
    found: Any = make(call.layer.module, *call.args, **call.kwargs)
    # random numbers are the forward's own only where they are drawn in its order, after all that it draws before
    if found is NotImplemented or _has_drawn(call):
        return None
    if not isinstance(found, Tensor) or found.dim() != 4:
        what = f"of shape {tuple(found.shape)}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
        raise UnreadableError(
            f"values= of the recipe of {qualified_name(type(call.layer.module))} has returned {what}, not (batch, heads, keys, "
            "head_dim); prove it with hookattn.testing.check_recipe."
        )
    return found


def _has_drawn(call: Call) -> bool:
    """Whether random numbers were drawn since the streams were set to where they were in the call."""
    return call.modes.random is not None and call.modes.random.have_moved()
