"""Where a call comes from: who made it, and which module put out what it was made with."""

from __future__ import annotations

import linecache
import sys
from collections.abc import MutableMapping
from dataclasses import dataclass
from types import FrameType
from typing import Any, Union

from torch import Tensor, nn
from torch.nn.modules import container
from torch.nn.modules import module as nn_module
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakTensorKeyDictionary

# Undocumented, torch 2.6 to 2.15: between a hook and the code that called the module lie frames of these two files alone.
_PASSED_THROUGH = {nn_module.__file__, container.__file__}
Origin = tuple[str, Union[str, None]]
"""Name of the module that made a tensor, and of the one that made what it was given."""


@dataclass(frozen=True)
class CallSite:
    """The place in the code that called an attention module, and which module made what it was called with.

    Attributes:
        file, line: where.
        function: the function it stands in, qualified where Python tells.
        code: the source line, without its indentation; empty where the source is not at hand.
        x: which module put out the tensor the call was made with, and what that module had received.
    """

    file: str
    line: int
    function: str
    code: str
    x: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line} in {self.function}\n    {self.code}\n    x is {self.x}"


def call_site(x: Tensor, origins: Origins) -> CallSite:
    """Find who calls the module whose hook we are in: the first frame above the hook that is not PyTorch's own."""
    # not inspect.stack(), which reads the source of every frame
    frame: FrameType | None = sys._getframe(1)
    inside = False
    while frame is not None:
        machinery = frame.f_code.co_filename in _PASSED_THROUGH
        if inside and not machinery:
            break
        inside = inside or machinery
        frame = frame.f_back
    assert frame is not None  # a hook is always called by a module, and a module by somebody
    code = frame.f_code
    line = linecache.getline(code.co_filename, frame.f_lineno).strip()
    function = getattr(code, "co_qualname", code.co_name)  # from Python 3.11 on
    return CallSite(code.co_filename, frame.f_lineno, function, line, origins.describe(x))


class Origins:
    """Which module put out which tensor, noted by forward hooks on all of them while a forward runs."""

    def __init__(self, model: nn.Module) -> None:
        self.names = {module: name for name, module in model.named_modules() if name}
        # Undocumented, torch 2.6 to 2.15. A WeakKeyDictionary would compare tensors by `==`, which compares their values.
        self._made_by: MutableMapping[Tensor, Origin] = WeakTensorKeyDictionary()

    def note(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Note which module put out a tensor: the innermost one, whose hook is called first, and none that hands it on."""
        given = [t for t in pytree.tree_leaves(args) if isinstance(t, Tensor)]
        for tensor in pytree.tree_leaves(output):
            if isinstance(tensor, Tensor) and not any(tensor is t for t in given):
                before = self._made_by.get(given[0]) if given else None
                name = self.names.get(module, type(module).__name__)
                self._made_by.setdefault(tensor, (name, before and before[0]))

    def describe(self, x: Tensor) -> str:
        """Say in words which module made a tensor, for `CallSite.x`."""
        origin = self._made_by.get(x)
        if origin is None:
            return "made between modules, in the code of the one that calls"
        name, before = origin
        if before is None:
            return f"what {name} put out"
        return f"what {name} made of the output of {before}"
