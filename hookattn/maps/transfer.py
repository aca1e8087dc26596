"""From a GPU to the CPU: by way of memory that the GPU writes to itself, which is several times as fast."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..attention.softmax import is_ours_alone
from ..conditions.cuda_graphs import is_capturing

# Bytes that are on their way at a time. Such pinned memory takes longer to get than to copy to, and is never swapped out: so it
# is given back, PyTorch keeps it for whoever asks next, and nobody is left with more of it than a piece.
_PIECE = 2**25
_LARGE = 2**20


def copy_to_cpu(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The same on the CPU, and of a dtype if one is given: `tensor.to("cpu", dtype)`, in ordinary memory."""
    if not tensor.is_cuda or tensor.nbytes < _LARGE or not is_ours_alone(tensor) or is_capturing():
        return tensor.to("cpu", dtype)
    source = tensor.detach().to(dtype or tensor.dtype)
    found = torch.empty(source.shape, dtype=source.dtype, device="cpu")
    copy_into([(found.view(-1), source.flatten())])
    return found


def copy_into(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Copy tensors into others on the CPU, each given behind the one it goes to; a GPU is waited for once for many."""
    group: list[tuple[Tensor, Tensor]] = []
    size = 0
    for place, tensor in pairs:
        step = max(1, _PIECE * len(tensor) // max(1, tensor.nbytes))
        for part in zip(torch.split(place, step), torch.split(tensor, step)):
            if group and size + part[1].nbytes > _PIECE:
                start_copies(group).finish()
                group, size = [], 0
            group.append(part)
            size += part[1].nbytes
    start_copies(group).finish()


class Copies(NamedTuple):
    """Copies to the CPU that a GPU makes when it has come so far, while this process goes on.

    Attributes:
        pairs: where they go, and where they are meanwhile.
        made: what tells, by device, that they are made; nothing where they come from no GPU.
    """

    pairs: list[tuple[Tensor, Tensor]]
    made: list[torch.cuda.Event]

    @property
    def are_made(self) -> bool:
        """Whether nothing has to be waited for."""
        return all(event.query() for event in self.made)  # type: ignore[no-untyped-call]

    def finish(self) -> None:
        """Wait for them, and put them where they go."""
        for event in self.made:
            event.synchronize()
        for place, tensor in self.pairs:
            # what is small by numpy, in this thread alone: processes that read images leave others little to do it in
            if tensor.nbytes < _LARGE and tensor.dtype is not torch.bfloat16:
                place.numpy()[...] = tensor.numpy()
            else:
                place.copy_(tensor)


def start_copies(pairs: Sequence[tuple[Tensor, Tensor]]) -> Copies:
    """Let copies be made of tensors, each given behind the one on the CPU that it goes to."""
    # in pinned memory where they come from a GPU, which other devices do not do (torch 2.6 to 2.15)
    moved = [(place, tensor.detach().to("cpu", non_blocking=tensor.is_cuda)) for place, tensor in pairs]
    devices = {tensor.device for _, tensor in pairs if tensor.is_cuda}
    return Copies(moved, [torch.cuda.current_stream(device).record_event() for device in devices])
