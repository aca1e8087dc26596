"""Everything that hookattn raises on purpose.

    HookattnError
    ├── ModelError            the model cannot be recorded: no attention, DataParallel, scripted (a TypeError)
    ├── RecorderError         the recorder is used in the wrong order: entered twice, asked for what it was not told to keep
    ├── LayerNotFoundError    `layers=` or `rec.maps[...]` names nothing (a KeyError)
    ├── NoMapError            there is no map yet: no forward, or a forward that reached no hook (a LookupError)
    ├── NoGradientError       no backward has reached this map (a LookupError)
    ├── UnreadableError       this module forms no map that can be read; the reason is told
    ├── StaleMapError         what the map would be computed from has changed since the forward
    ├── UnfaithfulMapError    a map put into the module's own forward gave another output
    ├── TokenError            tokens and image do not fit: no class token, no such patch (a ValueError)
    │   └── LayoutError       a layout or a partition returned what does not fit the map
    ├── StoreError            a store of extracted data is another run's, in use, damaged, or cannot be written
    └── MissingExtraError     an optional dependency is not installed (an ImportError)

Each message says what was found and what to type next.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


# Most are also the built-in error that fits (a missing key, a wrong value), for callers that know nothing of hookattn.
class HookattnError(Exception):
    """Base of everything that hookattn raises on purpose."""


class ModelError(HookattnError, TypeError):
    """The model cannot be recorded as it is."""


class RecorderError(HookattnError, RuntimeError):
    """The recorder is used in the wrong order, or asked for what it was not told to keep."""


class LayerNotFoundError(HookattnError, KeyError):
    """No attention module answers to this name, pattern or index."""

    __str__ = Exception.__str__  # a KeyError shows its message in quotes


class NoMapError(HookattnError, LookupError):
    """No map was recorded."""


class NoGradientError(HookattnError, LookupError):
    """No gradient has arrived at the output of this module."""


class UnreadableError(HookattnError):
    """The module forms no map that can be read, for the reason told."""


class StaleMapError(HookattnError, RuntimeError):
    """An input or a parameter has changed since the forward, so the map of that forward is gone."""


class UnfaithfulMapError(HookattnError, AssertionError):
    """The map is not the one the module's output came from."""


class TokenError(HookattnError, ValueError):
    """The tokens of the map do not stand for what was asked."""


class LayoutError(TokenError):
    """A layout or a partition returned what does not fit the map, or asked for what was not given."""


class StoreError(HookattnError):
    """A store of extracted data is of another run, in use by one, damaged, or cannot be written."""


class MissingExtraError(HookattnError, ImportError):
    """An optional dependency is not installed."""


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """A sentence for errors that says what somebody who typed `name` may have meant, or what there is."""
    names = list(names)
    close = difflib.get_close_matches(name, names, n=4, cutoff=0.4)
    return f"Did you mean {', '.join(map(repr, close))}?" if close else f"There is: {listed(names)}."


def listed(names: Iterable[str]) -> str:
    """Names for an error, separated by commas; of more than eight the first four and the last two."""
    names = list(names)
    return ", ".join(names if len(names) <= 8 else [*names[:4], "...", *names[-2:]]) or "nothing"


def explained(reasons: Iterable[str]) -> str:
    """Reasons for an error as one sentence, of more than three the first three and how many more there are."""
    told = [reason.rstrip(".") for reason in reasons]
    more = [f"and {len(told) - 3} more"] * (len(told) > 3)
    return "; ".join([*told[:3], *more]) + "." * bool(told)
