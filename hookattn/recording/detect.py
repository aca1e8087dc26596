"""Watch one forward for the modules that form attention maps, where the names of classes tell nothing."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakTensorKeyDictionary

from ..calls.hooks import Hook
from ..calls.restore import is_reading
from ..conditions.frames import Running, caller_of_hook
from ..conditions.threads import Here
from ..maps.intercept import SOFTMAX
from .passes import is_a_forward

_FORM = {F.scaled_dot_product_attention, F.multi_head_attention_forward}
_MATMUL = {torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm, torch.einsum, torch.baddbmm}
Noted = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]


class Watching:
    """The modules that run, one inside the other, and which of them form a map.

    A module forms a map if it is the innermost one that runs while `scaled_dot_product_attention` is called, or while a
    softmax is taken whose outcome is then multiplied onto values. A softmax that weighs branches, experts or classes is none.

    Args:
        model: watched while its forward runs.
        enter: called before each module runs with what it was called with; what it returns is kept until the module ends.
        leave: called after a module that has formed a map, with the module, what `enter` returned and its output.
        end: called when the forward has ended, with whether it returned; after that nothing is watched any more.
    """

    def __init__(
        self, model: nn.Module, enter: Callable[..., Any], leave: Callable[..., None], end: Callable[[bool], None]
    ) -> None:
        self._model, self._enter, self._leave, self._end = model, enter, leave, end
        self._running: list[list[Any]] = []
        self._mode = _Mode(self._running)
        self._on = ExitStack()
        self._call: Running | None = None
        self._over = False
        self._here = Here()

    def hook(self, stack: ExitStack) -> None:
        """Put hooks on all modules; they come off with the stack."""
        stack.callback(self._on.close)
        for module in self._model.modules():
            stack.enter_context(module.register_forward_pre_hook(Hook(self._begin), with_kwargs=True))
            stack.enter_context(module.register_forward_hook(Hook(self._finish), always_call=True))

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._over or not is_a_forward() or not self._here():
            return
        if module is self._model and not (self._running and self._call):  # one that was interrupted ran no hook at its end
            self._on.close()
            self._running.clear()
            self._call = Running(caller_of_hook(), held=True)
            self._on.enter_context(self._mode)
        if module is self._model or self._running:
            self._running.append([module, self._enter(module, args, kwargs), False])

    def _finish(self, module: nn.Module, _: Any, output: Any) -> None:
        if not self._running or not self._here() or self._running[-1][0] is not module:
            return
        module, kept, formed = self._running.pop()
        if formed:
            self._leave(module, kept, output)
        if not self._running:
            self._call = None
            self._on.close()
            self._over = output is not None  # a forward that raised is watched again
            self._end(self._over)


class _Mode(TorchFunctionMode):
    """Marks the innermost running module when a map is formed."""

    def __init__(self, running: list[list[Any]]) -> None:
        super().__init__()
        self.running = running
        self.weights: MutableMapping[Tensor, list[Any]] = WeakTensorKeyDictionary()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if is_reading() or not self.running:
            return out
        if func in _FORM:
            self._innermost()[2] = True
        elif func in SOFTMAX:
            if out.dim() >= 3:
                self.weights[out] = self._innermost()
        elif isinstance(out, Tensor) and self.weights:
            for tensor in pytree.tree_leaves(args[:2]):
                if isinstance(tensor, Tensor) and (formed := self.weights.get(tensor)) is not None:
                    formed[2] = formed[2] or (func in _MATMUL and _weighs_tokens(tensor, args))
                    if out is not tensor and out.numel() == tensor.numel() and func not in _MATMUL:
                        self.weights[out] = formed  # after dropout, a cast, a mask
        return out

    def _innermost(self) -> list[Any]:
        """The innermost module that is more than a softmax."""
        return next(each for each in reversed(self.running) if not isinstance(each[0], (nn.Softmax, nn.Softmax2d)))


def _weighs_tokens(weights: Tensor, operands: Any) -> bool:
    """Whether weights (batch, ..., keys) are multiplied onto values with as many tokens, and not onto experts or bins."""
    values = [t for t in pytree.tree_leaves(operands) if isinstance(t, Tensor) and t is not weights]
    return any(v.dim() >= 3 and len(v) == len(weights) and weights.shape[-1] in v.shape[1:] for v in values)
