"""A module as it was in a forward, to be asked later: its numbers, words and tuples of such may have been set anew since."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from torch import nn

_SETTINGS = (int, float, str, tuple)


def read_settings(module: nn.Module) -> dict[str, Any]:
    """Attributes of a module that are numbers, words or tuples of such."""
    # what tells of windows and patches is plain; modules and tensors may be large
    return {
        name: value
        for name, value in module.__dict__.items()
        if (kind := type(value)) in _PLAIN or (kind not in _OTHERS and isinstance(value, _SETTINGS))
    }


_PLAIN, _OTHERS = frozenset({*_SETTINGS, bool}), frozenset({dict, OrderedDict, list, set, type(None)})


class ModuleSnapshot:
    """A module whose numbers are those of an earlier time, all else as it is; methods of its class see these numbers."""

    def __init__(self, module: nn.Module, settings: Mapping[str, Any]) -> None:
        self._module, self._settings = module, settings

    def __getattr__(self, name: str) -> Any:
        if name in self._settings:
            return self._settings[name]
        found = getattr(self._module, name)
        function = getattr(found, "__func__", None)
        return found if function is None or found.__self__ is not self._module else function.__get__(self)
