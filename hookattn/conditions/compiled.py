"""Compiled, exported and traced code: what was compiled has no hooks in it, so it runs eagerly meanwhile or on other graphs."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from torch.compiler import is_dynamo_compiling
from torch.fx import _symbolic_trace

from ..errors import RecorderError

INSIDE = (
    "a recorder cannot be used inside compiled code, which does not see its hooks: open it around the compiled function, "
    "or move the block into a function of its own under @torch.compiler.disable."
)


class _Compiled:
    """Makes compiled code run eagerly while a recorder is open: compiled before the hooks were put on, it would run past them.

    Or lets it run on graphs that call the hooks, while there is but one recorder.

    The stance that was there before comes back when the last recorder leaves, in whatever order they do.
    """

    # One for the process, since a stance is for all threads. Each recorder puts its own on the one stack, which is closed from
    # the top down when the last one leaves, and so comes back to what the first had found.

    def __init__(self) -> None:
        self.lock, self.open, self.stance = threading.Lock(), 0, ExitStack()
        self._was_usual = False

    def __enter__(self) -> None:
        with self.lock:
            # Set anew by each recorder: the user may have set another since. It imports torch._dynamo, which takes seconds
            # once and is not to be avoided: a model may be compiled for the first time inside the block.
            try:
                self._was_usual = self.open == 0 and _is_usual()
                self.stance.enter_context(torch.compiler.set_stance("force_eager"))
            except RuntimeError as inside:  # documented to raise inside compiled code, though not what
                raise RecorderError(INSIDE) from inside
            self.open += 1

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.open -= 1
            if self.open == 0:
                self.stance.close()

    def is_usual(self) -> bool:
        """Whether the user lets compiled code do as usual, as far as it is known; and not, say, fail where it is compiled."""
        return self.open > 1 or self._was_usual

    def may_call_hooks(self) -> bool:
        """Whether there is no other recorder, which graphs know nothing of."""
        return self.open == 1 and self._was_usual

    def call_hooks(self, backend: Callable[..., Any]) -> None:
        """Let compiled code run on graphs of this backend, which call hooks, until the next recorder is opened."""
        with self.lock:
            if self.may_call_hooks():
                # Undocumented, torch 2.6 to 2.15: else a graph of a module without hooks is taken for one of its class that has
                # them. It is a setting of this thread alone.
                settings, name = torch._dynamo.config, "skip_nnmodule_hook_guards"
                self.stance.callback(setattr, settings, name, getattr(settings, name))
                setattr(settings, name, False)
                self.stance.enter_context(torch.compiler.set_stance("default", force_backend=backend))


def _is_usual() -> bool:
    """Whether compiled code does as usual; the stance of a user, such as to fail where something is compiled, is kept to."""
    # Undocumented, torch 2.6 to 2.15: the stance that is in force.
    stance = torch._dynamo.eval_frame._stance
    return stance.stance == "default" and stance.backend is None


COMPILED = _Compiled()


def is_compiled() -> bool:
    """Whether modules run to be compiled, for a graph that is called here; not to be exported, which calls nothing of ours."""
    # Undocumented, torch 2.11 to 2.15: what `is_exporting` returns, which Dynamo of 2.11 takes for true wherever it is asked.
    return is_dynamo_compiling() and not torch.compiler._is_exporting_flag


def is_traced() -> bool:
    """Whether modules run to be compiled, exported or traced: what they are called with then has no values to read."""
    # All of this thread alone, so that a forward beside a trace in another is recorded; but FX's flag, which was global in 2.6.
    # Undocumented, torch 2.6 to 2.15: `_is_tracing`, which torch.jit.is_tracing asks at one more call.
    if is_dynamo_compiling() or torch._C._is_tracing():
        return True
    # Undocumented, torch 2.6 to 2.15: while FX traces symbolically it has put another function in place of Module.__call__,
    # which is `_wrapped_call_impl` else. That is compared first, since it costs next to nothing.
    if nn.Module.__call__ is not nn.Module._wrapped_call_impl and _is_fx_tracing():
        return True
    # Undocumented, torch 2.6 to 2.15: export and make_fx run modules under dispatch modes, which are kept by these keys.
    for key in _TRACERS if torch._C._len_torch_dispatch_stack() else ():
        if torch._C._get_dispatch_mode(key) is not None:
            return True
    return False


_TRACERS = (torch._C._TorchDispatchModeKey.FAKE, torch._C._TorchDispatchModeKey.PROXY)
# Undocumented: torch 2.6 has `is_fx_tracing` alone; that of 2.14 logs a warning, and the longer name does not.
_is_fx_tracing = getattr(_symbolic_trace, "is_fx_symbolic_tracing", _symbolic_trace.is_fx_tracing)
