"""Maps that are pickled note by which version, before anything else, so that another one can say why it does not read them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import hookattn

from ..errors import HookattnError

FORM = 1  # counted up when a class in a pickle is called otherwise, or is made of something else
T = TypeVar("T")


def reduce_to(kind: type[T], state: Mapping[str, Any]) -> tuple[Any, ...]:
    """What `pickle` and `copy` make an object of a class from, that has this state."""
    return begin, (kind, FORM, hookattn.__version__), dict(state)


def begin(kind: type[T], form: int, version: str) -> T:
    """An object without a state, which is looked at next.

    Raises:
        HookattnError: it was pickled in another form.
    """
    if form != FORM:
        raise HookattnError(
            f"this {kind.__name__} was pickled by hookattn {version}, in another form than {hookattn.__version__} has ({form}, "
            f'not {FORM}): load it with {version}, and keep it by maps.save("maps.safetensors"), which later versions read.'
        )
    return kind.__new__(kind)
