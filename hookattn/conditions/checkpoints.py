"""Which activation checkpoint a module runs in: the same in the forward and when backward runs it again."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.utils import checkpoint
from torch.utils.checkpoint import CheckpointFunction

# Undocumented, torch 2.6 to 2.15: a reentrant checkpoint is this function of autograd, and both of its methods call what is
# checkpointed from their own frame, with the same object as `ctx`.
_REENTRANT = {CheckpointFunction.forward.__code__, CheckpointFunction.backward.__code__}


def checkpoint_around() -> Any:
    """What stands for the activation checkpoint that the caller runs in, the same when backward runs it again; None outside.

    Of checkpoints one inside the other it is that of the outermost. It lives as long as the graph of its forward.
    """
    # The stack is walked since PyTorch tells nobody which checkpoint runs: there is no hook, and nothing to ask.
    frame: FrameType | None = sys._getframe(1)
    found = None
    while frame is not None:
        if frame.f_code.co_filename == checkpoint.__file__ and (one := _of(frame)) is not None:
            found = one
        frame = frame.f_back
    return found


def _of(frame: FrameType) -> Any:
    """Take from a frame of `torch.utils.checkpoint` an object that is one in forward and in backward; None if it has none."""
    if frame.f_code in _REENTRANT:
        return frame.f_locals["ctx"]
    # Undocumented, torch 2.6 to 2.15: without reentrance, a `_CheckpointFrame` stands for a checkpoint. In the forward it is
    # `new_frame` of the generator that `checkpoint` calls `gen`; in backward it is `frame` of the hook that unpacks what was
    # saved, from which the checkpoint is run again. Where these names have changed, no checkpoint is found.
    if frame.f_code.co_name == "unpack_hook":
        return frame.f_locals.get("frame")
    around = getattr(frame.f_locals.get("gen"), "gi_frame", None)
    return None if around is None else around.f_locals.get("new_frame")


def in_backward() -> bool:
    """Whether a backward runs in this thread: modules that run now are made again by a checkpoint, and are no forward."""
    # Undocumented, torch 2.6 to 2.15 (checkpoints and FSDP ask it too): the number of the backward that runs, or -1.
    return torch._C._current_graph_task_id() != -1


def fingerprint(tensors: Sequence[Tensor], checkpoint: object) -> bytes:
    """Bytes by which a call in a checkpoint is known when backward makes it again: its checkpoint, and values of its input."""
    # Values, since nothing else stays the same: the module may be called several times in a checkpoint, and the tensors it is
    # called with are others the second time. The step is odd, so that the values are not all of a few channels.
    values = tensors[0].detach().reshape(-1) if tensors else torch.empty(0, device="cpu")
    few = values[:: max(1, values.numel() // _FEW - 1 | 1)].contiguous()
    return str((id(checkpoint), *values.shape)).encode() + bytes(few.view(torch.uint8).tolist())


_FEW = 256
