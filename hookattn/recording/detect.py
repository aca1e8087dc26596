"""Watch one forward for the modules that form attention maps, where the names of classes tell nothing."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree  # undocumented, torch 2.6 to 2.15
from torch.utils.weak import WeakTensorKeyDictionary

from ..calls.hooks import Args, Around, Kwargs
from ..conditions.checkpoints import in_backward
from ..conditions.frames import Running, caller_of_hook
from ..conditions.function_modes import lowest
from ..conditions.threads import Here
from ..maps.intercept import Intercept, Run, Sites

_MATMUL = {torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm, torch.einsum, torch.baddbmm}


@dataclass(eq=False)
class _Entered:
    """A call of a module that has begun and not ended, with what `enter` returned, and whether it formed a map itself."""

    module: nn.Module
    noted: Any
    forms_a_map: bool = False


class Detection:
    """Watches one forward of a model, and tells which of its modules form a map.

    A module forms a map if it is the innermost one that runs while `scaled_dot_product_attention` is called, or while a
    softmax is taken whose outcome is then multiplied onto values. A softmax that weighs branches, experts or classes is none.

    Args:
        enter: called before each module runs with what it was called with; what it returns is kept until the module ends.
        leave: called after a module that has formed a map, with the module, what `enter` returned and its output.
        end: called when the forward has ended, with whether it returned; after that nothing is watched any more.
    """

    def __init__(
        self, model: nn.Module, enter: Callable[..., Any], leave: Callable[..., None], end: Callable[[bool], None]
    ) -> None:
        self._model, self._enter, self._leave, self._end = model, enter, leave, end
        self._running: list[_Entered] = []
        self._mode = Intercept([_Formed(self._running)])
        self._on, self._hooks = ExitStack(), ExitStack()
        self._call: Running | None = None
        self._over = False
        self._here = Here()

    def hook(self, stack: ExitStack) -> None:
        """Put hooks on all modules; they come off with the stack, or when a forward begins after the one that was watched."""
        stack.callback(self._hooks.close)
        stack.callback(self._on.close)
        for module in self._model.modules():
            around = _Watched(module, self)
            self._hooks.callback(around.close)
            around.hook()

    def begin(self, module: nn.Module, args: Args, kwargs: Kwargs) -> _Entered | None:
        """Note that a module begins to run, if it does so in the forward that is watched."""
        if in_backward() or not self._here():
            return None
        if self._over:
            self._hooks.close()
            return None
        if module is self._model and not (self._running and self._call):  # one that was interrupted ran no hook at its end
            self._on.close()
            self._running.clear()
            self._call = Running(caller_of_hook(module), held=True)
            self._on.enter_context(lowest(self._mode))
        if module is not self._model and not self._running:
            return None
        self._running.append(_Entered(module, self._enter(module, args, kwargs)))
        return self._running[-1]

    def end(self, entered: _Entered, output: Any) -> None:
        """Report a module that has run, if it has formed a map; with the model itself, the forward is over."""
        if entered not in self._running:
            return
        del self._running[self._running.index(entered) :]  # with what is left of calls in it that were interrupted
        if entered.forms_a_map:
            self._leave(entered.module, entered.noted, output)
        if not self._running:
            self._call = None
            self._on.close()
            self._over = output is not None  # a forward that raised is watched again
            self._end(self._over)


class _Watched(Around):
    """The hooks that a `Detection` puts on one module."""

    def __init__(self, module: nn.Module, detection: Detection) -> None:
        super().__init__(module)
        self._detection = detection

    def begin(self, args: Args, kwargs: Kwargs) -> _Entered | None:
        """Tell the detection that the module begins to run."""
        return self._detection.begin(self.module, args, kwargs)

    def end(self, state: _Entered, args: Args, kwargs: Kwargs, changed: bool, output: Any) -> None:
        """Tell the detection that the module has run."""
        self._detection.end(state, output)


class _Formed(Sites):
    """Marks the innermost running module where a map is formed, by SDPA or by a softmax that weighs values."""

    def __init__(self, running: list[_Entered]) -> None:
        self._running = running
        # Undocumented, torch 2.6 to 2.15. Weak, so that no softmax lives longer than in the forward; by identity, since a
        # WeakKeyDictionary would compare tensors by their values.
        self._weights: MutableMapping[Tensor, _Entered] = WeakTensorKeyDictionary()

    def fused(self, run: Run, args: Args, kwargs: Kwargs) -> Any:
        """SDPA forms a map."""
        if self._running:
            self._innermost().forms_a_map = True
        return run(*args, **kwargs)

    def softmax(self, run: Run, args: Args, kwargs: Kwargs) -> Any:
        """A softmax is remembered, since it may turn out to be a map."""
        out = run(*args, **kwargs)
        # of (batch, queries, keys) at least: one of two axes chooses a class, a branch or an expert
        if self._running and out.dim() >= 3:
            self._weights[out] = self._innermost()
        return out

    def follow(self, func: Run, args: Args, kwargs: Kwargs, out: Any) -> None:
        """A softmax that is multiplied onto values was a map; after dropout, a cast or a mask it is still looked for."""
        if not self._weights or not isinstance(out, Tensor):
            return
        for tensor in pytree.tree_leaves(args[:2]):
            if isinstance(tensor, Tensor) and (formed := self._weights.get(tensor)) is not None:
                formed.forms_a_map = formed.forms_a_map or (func in _MATMUL and _weighs_tokens(tensor, args))
                if out is not tensor and out.numel() == tensor.numel() and func not in _MATMUL:
                    self._weights[out] = formed

    def _innermost(self) -> _Entered:
        """The innermost module that runs, `nn.Softmax` apart, which forms the map of the module that calls it."""
        return next(each for each in reversed(self._running) if not isinstance(each.module, (nn.Softmax, nn.Softmax2d)))


def _weighs_tokens(weights: Tensor, operands: Any) -> bool:
    """Whether weights (batch, ..., keys) are multiplied onto values with as many tokens, and not onto experts or bins."""
    # values of the same batch: experts and bins are parameters, which have none
    values = [t for t in pytree.tree_leaves(operands) if isinstance(t, Tensor) and t is not weights]
    return any(v.dim() >= 3 and len(v) == len(weights) and weights.shape[-1] in v.shape[1:] for v in values)
