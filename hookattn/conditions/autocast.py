"""Mixed precision: autocast as it was when a module was called."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch


class Autocast(NamedTuple):
    """Autocast of one kind of device."""

    device: str
    enabled: bool
    dtype: torch.dtype
    cached: bool


def autocast_now(device: str) -> Autocast | None:
    """Autocast as it is now; None where a kind of device has none."""
    off = _off(device)
    if off is None or not torch._C._is_any_autocast_enabled() or not torch.is_autocast_enabled(device):
        return off
    return Autocast(device, True, torch.get_autocast_dtype(device), torch.is_autocast_cache_enabled())


@lru_cache
def _off(device: str) -> Autocast | None:
    """Autocast that is off: the dtype is that of no operation then."""
    return Autocast(device, False, torch.get_autocast_dtype(device), False) if torch.amp.is_autocast_available(device) else None
