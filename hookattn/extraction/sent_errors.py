"""Errors as they are sent from one process to another."""

from __future__ import annotations

import pickle
from collections.abc import Callable

from ..errors import HookattnError


def make_sendable(error: Exception, dumps: Callable[[Exception], bytes] = pickle.dumps) -> Exception:
    """The error itself where another process can be sent it, else one of ours that says the same."""
    try:
        if type(pickle.loads(dumps(error))) is type(error):
            return error
    except Exception:  # of whatever it holds, or of a constructor that wants more than a message
        pass
    return HookattnError(f"{type(error).__name__}: {error}")
