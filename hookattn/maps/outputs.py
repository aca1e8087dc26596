"""What of a map reaches the output of its module: what multiplies the values, and what each head adds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar, Union

import torch
from einops import rearrange
from torch import Tensor

from ..attention.narrowing import ALL
from ..attention.sources import Dense, Source, exact_dtype
from ..attention.weighted import Weighted
from ..calls.call import Call
from ..conditions.autocast import without_autocast
from ..errors import TokenError, UnreadableError
from ..image.tokens import Query
from ..recipes.registry import attends_to_channels, qualified_name
from .comparison import largest_difference, tolerance_of
from .established import NameInErrors, TellWhy, as_in_training, source_by_recipe
from .fed import at_places, places_fed, random_outcomes
from .forward import Forward, floats_in, recall
from .reading import Computed, Origin, source_of
from .replay import run_under, source_of_watched
from .sites import Watch
from .vectors import OfVectors

M = TypeVar("M", bound="OfOutputs")
Index = Union[int, slice, Sequence[int], None]


class OfOutputs(OfVectors):
    """Base of maps: what of them reaches the output of their module."""

    def derived(self: M, origin: Origin) -> M:
        """Something else over the same queries and keys, read like this map."""
        raise NotImplementedError

    @property
    def effective(self: M) -> M:
        """What really multiplies the values, (batch, heads, queries, keys), read like a map; dropout is left out.

        It is this map, bit for bit and as cheap to read, where the module multiplies what comes out of its softmax. Elsewhere
        it is what the module has made of it by then, in the tensor that meets the values, and the module's forward is run for
        it: talking heads after they are mixed, the gated sum of two maps (GPSA), a map that is renormalised. Where two maps
        multiply the same values and their outcomes are added up (differential attention on the fused kernel), it is their
        weighted sum. Rows need not sum to 1, and may be negative; heads are those of `v`, fewer where maps are summed.

        Reading it raises UnreadableError where the map is multiplied in no product of matrices that can be seen, and
        RecorderError where the call was let go (`keep="maps"`).
        """
        return self.derived(Computed(self.name, "what multiplies the values", lambda: _effective(self.call)))

    def output(self, heads: Index = None, queries: Query | Index = None) -> Tensor:
        """What each head adds to the output of its module: `effective @ v`, and the head's part of what is done to it then.

        With the output projection's part W_h of each head, this is (A_h v_h) W_h. Summed over heads, and with what the module
        puts out where its map brings nothing (the bias of the projection; what a parallel block adds beside), it is the
        module's own output, dropout left out. In general it is what the module puts out with this head alone, less that: gates
        that are made of the input, layer scale, and activations of single channels are part of it. Norms of what the heads have
        brought together (EVA-02, differential attention) divide by what they do for all heads together, while each head is
        centred by itself.

        Args:
            heads: a head by its number, which keeps its axis; a slice or a list of them; None for all.
            queries: a token as in `rows`, or a number, for which the axis of queries is left out; a slice or a list of numbers;
                None for all.

        Returns:
            (batch, heads, queries, dim), in the order of the map's queries, with the windows of `axes`; float32, float64 for a
            float64 model, unless the recorder was given a dtype.

        Raises:
            UnreadableError: these parts do not add up to the module's output (an MLP comes after, another norm), it mixes
                places then, or it attends to channels.
            TokenError: there is no such query.
            StaleMapError: an input or a parameter has changed since the forward.

        Source: Elhage et al. 2021, "A mathematical framework for transformer circuits"; Gandelsman et al. 2024, "Interpreting
        CLIP's image representation via text-based decomposition".
        """
        call, rows = self.call, self._numbers(queries)
        with call.resumed(), NameInErrors(call), TellWhy(self.name, IndexError, TokenError), as_in_training(call):
            found = head_outputs(Forward(call, recall(call)), _as_slice(heads), rows)
        return self._deliver(self._check(found))

    def _numbers(self, queries: Query | Index) -> Any:
        if queries is None:
            return ALL
        if not isinstance(queries, (str, tuple)):
            return list(queries) if isinstance(queries, Sequence) else queries
        if self.query_tokens.places is not None:
            raise TokenError(f"{self.name!r} looks at windows: choose queries by number, or take all, m.output().")
        return self.query_tokens.index(queries)


def _as_slice(heads: Index) -> Any:
    if heads is None:
        return ALL
    return [heads] if isinstance(heads, int) else heads if isinstance(heads, slice) else list(heads)


@contextmanager
def _effective(call: Call) -> Iterator[Source]:
    with call.resumed(), NameInErrors(call):
        with TellWhy(call.layer.name), as_in_training(call):
            source = effective_source(call)
        yield source


def effective_source(call: Call, forward: Forward | None = None) -> Source:
    """What is computed of a call, whose modes are on already, to multiply the values."""
    carried = recall(call) if forward is None else None
    if carried is not None and carried.is_map and carried.members is None:  # it is the map, where the call goes the same way
        source = source_by_recipe(call)
        watch = None if source is not None else run_under(call, Watch())[1]
        if watch is not None and watch.went == carried.went:
            source = source_of_watched(call, watch, carried.map)
        if source is not None:
            return source
    forward = forward or Forward(call, carried)
    if not forward.carried.is_map:
        return Dense(forward.effective())
    source, members = source_of(call), forward.carried.members
    return source if members is None else Weighted(source, members, forward.weights())


class Ending(NamedTuple):
    """What a forward does with the outcomes of its products.

    Attributes:
        leaf: which of its outputs they reach.
        linear: the how manieth projection makes that output, of nothing but the outcomes with heads side by side; None where
            it is not as simple.
        norm: the how manieth norm comes between, if one does.
    """

    leaf: int
    linear: int | None = None
    norm: int | None = None


def ending_of(forward: Forward) -> Ending:
    """What the forward does with what comes out of its products; found once for all such calls.

    Raises:
        UnreadableError: it attends to channels.
    """
    if attends_to_channels(forward.call.layer.module):
        raise UnreadableError("it attends to channels, each of which feeds all places of its output; see m.effective and m.v.")
    ending: Ending = forward.find_once("ending", _find_ending)
    return ending


def _find_ending(forward: Forward) -> Ending:
    other = random_outcomes(forward)
    (output, run), base = forward.run_with(other), floats_in(forward.run_with(torch.zeros_like(other))[0])
    reached = [n for n, (a, b) in enumerate(zip(floats_in(output), base)) if not torch.equal(a, b)]
    if not reached:
        raise UnreadableError("what its map is multiplied onto does not reach its output.")
    y = floats_in(output)[reached[0]]
    merged = other.transpose(1, 2).flatten()
    for number, (given, weight, out) in enumerate(run.linears):
        if weight.dim() != 2 or not _are_same_rows(y, out, len(weight)):
            continue
        if _are_same_rows(given, merged, weight.shape[1]):
            return Ending(reached[0], number)
        for n, (norm, _, normed) in enumerate(run.norms):
            of_all = norm.x.numel() == merged.numel() and norm.x.shape[norm.axes[0] :] == weight.shape[1:]
            if of_all and torch.equal(norm.x.flatten(), merged) and torch.equal(normed.flatten(), given.flatten()):
                return Ending(reached[0], number, n)
    return Ending(reached[0])


def _are_same_rows(a: Tensor, b: Tensor, width: int) -> bool:
    """Whether rows of random numbers are the same, in whatever order: `nn.MultiheadAttention` has queries before images."""
    if a.numel() != b.numel() or a.shape[-1:] != (width,):
        return False
    a, b = (each[each[:, 0].argsort()] for each in (a.reshape(-1, width), b.reshape(-1, width)))
    return torch.equal(a, b)


def head_outputs(forward: Forward, heads: Any = ALL, rows: Any = ALL) -> Tensor:
    """What heads add to the output, (images * windows, heads, queries, dim)."""
    ending, outcomes = ending_of(forward), forward.outcomes()
    if ending.linear is None:
        return torch.stack(_parts(forward, ending, outcomes), 1)[:, heads][:, :, rows]
    projection = projection_of(forward)
    brought = projection.divided(outcomes)[:, heads][:, :, rows]
    with without_autocast(brought.device):
        return torch.einsum("bh...e,hed->bh...d", brought, projection.weight[heads])


class Projection(NamedTuple):
    """What is done to what heads bring, where that is a projection, or a norm and a projection.

    Attributes:
        weight: (heads, width, dim), each head's part.
        scale: (images * windows, 1, queries, 1), what a norm divides by first; None without one.
    """

    weight: Tensor
    scale: Tensor | None

    def divided(self, outcomes: Tensor) -> Tensor:
        """What heads bring, (images * windows, heads, queries, width), as it is projected."""
        outcomes = outcomes.to(self.weight.dtype)
        return outcomes if self.scale is None else outcomes / self.scale.to(outcomes)


def projection_of(forward: Forward) -> Projection:
    """Each head's part of the output projection, where nothing else but a norm is done to what heads bring."""
    ending = ending_of(forward)
    if ending.linear is None:
        name = qualified_name(type(forward.call.layer.module))
        raise UnreadableError(
            f"{name} does something else to what heads bring than to project it (nothing, where a module around it projects, "
            "norms of single heads, a residual, another layout); m.output() may tell what each head brings."
        )
    weight = forward.watch.linears[ending.linear][1]
    matrix, scale = weight.to(exact_dtype(weight.dtype)).T, None
    windows, heads, queries = forward.carried.rows.index.shape
    if ending.norm is not None:
        norm, scale, _ = forward.watch.norms[ending.norm]
        matrix, scale = norm.then(matrix.T), scale.reshape(windows, 1, queries, 1)
    return Projection(rearrange(matrix, "(h e) d -> h e d", h=heads), scale)


def _parts(forward: Forward, ending: Ending, outcomes: Tensor) -> list[Tensor]:
    """What each head adds, by runs with the others' outcomes zero; these have to add up to the output."""

    def run(brought: Tensor) -> Tensor:
        y = floats_in(forward.run_with(brought)[0])[ending.leaf]
        return y.to(exact_dtype(y.dtype))

    members = forward.carried.members
    groups = torch.arange(outcomes.shape[1], device="cpu")[:, None] if members is None else members
    nothing, whole = run(torch.zeros_like(outcomes)), floats_in(forward.output)[ending.leaf]
    parts = []
    for group in groups:
        alone = torch.zeros_like(outcomes)
        alone[:, group] = outcomes[:, group]
        parts.append(run(alone) - nothing)
    missing = largest_difference(nothing + torch.stack(parts).sum(0), whole)
    if not missing <= tolerance_of(whole):
        name = qualified_name(type(forward.call.layer.module))
        raise UnreadableError(
            f"what {name} does once heads have brought their values (a norm that it writes itself, an MLP) does "
            f"not take them one by one: their parts miss its output by {missing:.2g}."
        )
    places = forward.find_once("places", lambda other: places_fed(other, ending.leaf))
    if places is not None and any(part.count_nonzero() > at_places(part, places, outcomes).count_nonzero() for part in parts):
        places = places_fed(forward, ending.leaf)  # this call feeds others, as where tokens are chosen by their values
    return [at_places(part, places, outcomes) for part in parts]
