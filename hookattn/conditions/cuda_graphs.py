"""CUDA graphs: what is captured has not run yet, so nothing of it can be waited for."""

from __future__ import annotations

import torch

from ..errors import UnreadableError


def is_capturing() -> bool:
    """Whether a CUDA graph is captured on this stream now; to wait for the device would end the capture."""
    initialized: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return initialized and torch.cuda.is_current_stream_capturing()


def refuse_capturing() -> None:
    """Raise UnreadableError while a CUDA graph is captured: in train mode each replay draws random numbers of its own."""
    if is_capturing():
        raise UnreadableError(
            "it was called in train mode while a CUDA graph was captured, each replay of which draws other random numbers; "
            "call model.eval() before the capture."
        )
