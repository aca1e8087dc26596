"""Compiled code runs eagerly as long as any recorder is open: what was compiled before has no hooks in it."""

from __future__ import annotations

import threading
from contextlib import ExitStack

import torch

from .errors import RecorderError

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
