"""What a function makes of each map while the model runs; the map and what the module was called with are let go."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from sys import exc_info
from typing import Any, Literal, Union

import torch

from ..calls.arguments import tensors_in
from ..calls.call import Call
from ..calls.restore import is_reading, reading
from ..conditions.autocast import without_autocast
from ..conditions.training import random_streams
from ..conditions.transforms import is_left_behind
from ..errors import LayerNotFoundError, NoMapError, RecorderError, UnreadableError, did_you_mean, listed
from ..maps.attention_map import AttentionMap
from ..maps.established import NotEstablishedError, deferring
from ..maps.lazy import LazyArray
from ..maps.reading import Lost
from .passes import ForwardPass, ForwardPasses, why_empty

Function = Callable[[AttentionMap], Any]
Keep = Union[Literal["inputs", "maps"], Function]


class Reduction:
    """Puts in place of a map what a function returns for it; the function is called once a map.

    While it runs, the map is read like any other. Afterwards the map object refuses to be read, since its call is let go.
    """

    def __init__(self, function: Function) -> None:
        self._function = function

    def __call__(self, m: AttentionMap) -> AttentionMap:
        """What is kept of a map, whatever it costs to find its axes; one that cannot be read is lost, with the reason."""
        return self._reduced(m, nullcontext())

    def in_forward(self, m: AttentionMap) -> AttentionMap:
        """The same inside of the user's forward: a map whose axes would have to be established first stays as it is."""
        return self._reduced(m, deferring())

    def _reduced(self, m: AttentionMap, while_looked_at: AbstractContextManager[Any]) -> AttentionMap:
        if isinstance(m._origin, Lost):
            return m
        try:
            with while_looked_at:  # before the function is called, which may do more than read, and is not called twice
                _ = m.shape
        except NotEstablishedError:
            return m
        except Exception as reason:  # whatever it is, the user's forward goes on
            return m.lost(reason)
        return m._from(self._outcome_of(m))

    def _outcome_of(self, m: AttentionMap) -> Outcome:
        handled = exc_info()[1]
        try:
            with _apart(m.call):
                value = self._function(m)
            if isinstance(value, LazyArray):
                raise RecorderError(f"it returned {value!r}, which is let go with what it is computed from: return m[...].")
        except Exception as error:
            told = f"the function given as keep= raised for {m.name!r}: {type(error).__name__}: {error}"
            where = traceback.format_tb(error.__traceback__)[1:]
            _drop_frames(error, handled)
            return Outcome(m.name, error=error, told="\n".join([told, *where]))
        finally:
            m._origin = Lost(
                m.name,
                f"the map of {m.name!r} was let go when the function given as keep= returned: read there what is wanted of it, "
                "such as m[...], or record without keep=.",
                RecorderError,
            )
        return Outcome(m.name, value)


class Outcome(Lost):
    """What a function returned or raised for a map, in place of the map."""

    def __init__(self, name: str, value: Any = None, error: Exception | None = None, told: str = "") -> None:
        super().__init__(name, f"of {name!r} is kept what the function given as keep= made: rec.reduced.", RecorderError)
        self._value, self._error, self._told = value, error, told

    def get(self) -> Any:
        """What the function returned.

        Raises:
            RecorderError: it raised; its error is the cause.
            UnreadableError: it returned a tensor of a `torch.vmap` that has returned.
        """
        if self._error is not None:
            raise RecorderError(self._told) from self._error
        if any(map(is_left_behind, tensors_in([self._value]))):
            raise UnreadableError(
                f"{self._name!r} ran under torch.vmap, which has returned: open the recorder inside of what is mapped, and "
                f"return rec.reduced[{self._name!r}] from there."
            )
        return self._value


class Reduced(Mapping[str, Any]):
    """What a function returned for the maps of one forward, by name, in the order the modules ran.

    Reading one for which it raised raises a RecorderError, whose cause is what it raised; the others can be read.
    """

    def __init__(self, maps: Mapping[str, AttentionMap]) -> None:
        done = {name: m._origin for name, m in list(maps.items()) if isinstance(m._origin, Lost)}
        self._skipped = {name: why for name, lost in done.items() if (why := lost.why_unreadable)}
        self._made = {name: outcome for name, outcome in done.items() if name not in self._skipped}

    def __getitem__(self, name: str) -> Any:
        if name in self._skipped:
            raise UnreadableError(self._skipped[name])
        if name not in self._made:
            raise LayerNotFoundError(f"there is nothing of {name!r}. {did_you_mean(str(name), self._made)}")
        outcome = self._made[name]
        return outcome.get() if isinstance(outcome, Outcome) else outcome.open()  # which says why there is none

    def __contains__(self, name: object) -> bool:
        return name in self._made

    def __iter__(self) -> Iterator[str]:
        return iter(self._made)

    def __len__(self) -> int:
        return len(self._made)

    def __repr__(self) -> str:
        return f"Reduced: {listed(self)}"


class Reducing:
    """Base of the recorder: what a function made of the maps of the last forward."""

    _passes: ForwardPasses
    _reduction: Reduction | None

    @property
    def layers(self) -> list[str]:
        """Names of the modules that are recorded."""
        raise NotImplementedError

    @property
    def reduced(self) -> Reduced:
        """What the function given as `keep` returned for each map of the last forward, by name, in the order the modules ran.

            with AttentionRecorder(model, keep=lambda m: m.rows("cls")) as rec:
                model(images)
            rec.reduced["blocks.11.attn"]

        Raises:
            RecorderError: the recorder was given no function; or, when one is read, the function raised for that map.
            NoMapError: no forward has run, or none that called an attention module.
        """
        if (reduction := self._reduction) is None:
            raise RecorderError(
                "rec.reduced is what a function makes of each map: AttentionRecorder(model, keep=function). Maps are rec.maps."
            )
        maps = self._last_forward().maps
        if not is_reading():  # else it is the function itself that asks for what came before
            maps.update({name: reduction(m) for name, m in list(maps.items())})
        return Reduced(maps)

    def _last_forward(self) -> ForwardPass:
        if not self._passes.all or not self._passes.all[-1].maps:
            raise NoMapError(why_empty(self._passes.module, self._passes, self.layers))
        return self._passes.all[-1]

    def _check_kept(self) -> None:
        """Raise a RecorderError where maps are asked for and a function was to reduce them."""
        if self._reduction is not None:
            raise RecorderError(
                "the maps were let go once the function given as keep= had seen them: read what it returned, "
                'rec.reduced["<name>"], or record without keep=.'
            )


def reduction_of(keep: Any, *, passes: str, gradients: bool, verify: bool) -> Reduction | None:
    """What `keep=` tells to make of maps; None for one of its words.

    Raises:
        ValueError: it is neither a word that is known nor a function, or goes with no function.
    """
    if isinstance(keep, str) and keep in ("inputs", "maps"):
        return None
    if not callable(keep):
        raise ValueError(f'keep={keep!r} is not known: keep="inputs" or keep="maps", or a function of a map.')
    if passes == "all":
        raise ValueError(
            'passes="all" keeps the maps of each forward, and with a function as keep= there are none: read rec.reduced after '
            "each forward, or let the function collect what it makes."
        )
    if gradients:
        raise ValueError(
            "gradients=True is for maps that are there when backward has run, and with a function as keep= there are none: "
            'keep="maps", and m.gradient of rec.maps.'
        )
    if verify:
        raise ValueError(
            "verify=True compares a map when its module has run, and with a function as keep= it is gone by then: call "
            'm.verify() in the function, which runs the module twice, or keep="maps".'
        )
    return Reduction(keep)


@contextmanager
def _apart(call: Call) -> Iterator[None]:
    """Run a function of the user's inside of a forward without a trace in it.

    Modes of ours take what it calls for no part of the forward; in the graph is what the call has in it; autocast is off, as
    where maps are read after a forward; random streams are put back where modules draw from them.
    """
    device = call.tensors[0].device  # of which there is one, or there would be no map
    streams = None if call.modes.random is None else random_streams(device)
    token = reading.set(True)
    try:
        with torch.set_grad_enabled(call.modes.grad), without_autocast(device):
            yield
    finally:
        reading.reset(token)
        if streams is not None:
            streams.restore()


def _drop_frames(error: BaseException | None, handled: BaseException | None) -> None:
    """Let go of the frames that an error holds, which hold what modules were called with, and of what was handled before."""
    if error is None:
        return
    error.__traceback__ = None
    for other in (error.__cause__, error.__context__):
        if other is not handled and other is not None and other.__traceback__ is not None:
            _drop_frames(other, handled)
    if error.__context__ is handled:
        error.__context__ = None
