"""Compiled, exported and traced code: what was compiled before has no hooks in it, so it runs eagerly meanwhile."""

from __future__ import annotations

import threading
from contextlib import ExitStack

import torch
from torch import nn
from torch.compiler import is_dynamo_compiling
from torch.fx import _symbolic_trace

from ..errors import RecorderError

INSIDE = (
    "a recorder cannot be used inside compiled code, which does not see its hooks: open it around the compiled function, which "
    "then runs eagerly, or move the block into a function of its own under @torch.compiler.disable."
)


class _Eager:
    """Entered by each recorder; the stance that was there before comes back when the last one leaves, whatever the order."""

    def __init__(self) -> None:
        self.lock, self.open, self.stance = threading.Lock(), 0, ExitStack()

    def __enter__(self) -> None:
        with self.lock:
            try:  # imports torch._dynamo, as the first torch.compile would
                self.stance.enter_context(torch.compiler.set_stance("force_eager"))
            except RuntimeError as inside:
                raise RecorderError(INSIDE) from inside
            self.open += 1

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.open -= 1
            if self.open == 0:
                self.stance.close()


EAGER = _Eager()


def is_traced() -> bool:
    """Whether modules run to be compiled, exported or traced: what they are called with has no values to read."""
    if is_dynamo_compiling() or torch._C._is_tracing():  # each of this thread
        return True
    if nn.Module.__call__ is not nn.Module._wrapped_call_impl and _is_fx_tracing():  # FX puts its own in place
        return True
    return bool(torch._C._len_torch_dispatch_stack()) and any(torch._C._get_dispatch_mode(key) is not None for key in _TRACERS)


_TRACERS = (torch._C._TorchDispatchModeKey.FAKE, torch._C._TorchDispatchModeKey.PROXY)
_is_fx_tracing = getattr(_symbolic_trace, "is_fx_symbolic_tracing", _symbolic_trace.is_fx_tracing)
