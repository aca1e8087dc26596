"""Mixed precision: autocast as it was when a module was called."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import NamedTuple

import torch


class Autocast(NamedTuple):
    """Settings of autocast for one kind of device, which a call keeps so as to be read under the same."""

    device: str
    enabled: bool
    dtype: torch.dtype
    cached: bool


def autocast_now(device: str) -> Autocast | None:
    """Read what autocast is set to now, for a call that is recorded; None for a kind of device that has none (meta)."""
    off = _off(device)
    # Undocumented, torch 2.6 to 2.15: one call of C++ that says whether autocast is on for any device. It is asked at every
    # recorded call, where the three documented questions about one device would cost more.
    if off is None or not torch._C._is_any_autocast_enabled() or not torch.is_autocast_enabled(device):
        return off
    return Autocast(device, True, torch.get_autocast_dtype(device), torch.is_autocast_cache_enabled())


@lru_cache
def _off(device: str) -> Autocast | None:
    """Settings of autocast that is off: made once for a kind of device, since nothing is cast to their dtype."""
    return Autocast(device, False, torch.get_autocast_dtype(device), False) if torch.amp.is_autocast_available(device) else None


_NOTHING = nullcontext()


def without_autocast(device: torch.device) -> AbstractContextManager[None]:
    """A block in which autocast does not touch what is computed on a device, for scores and softmax in full precision."""
    # Undocumented, torch 2.6 to 2.15: whether it is on for any device, which it nearly never is.
    if torch._C._is_any_autocast_enabled() and torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return _NOTHING
