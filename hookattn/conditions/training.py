"""Train mode: the random streams that dropout draws from."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .cuda_graphs import refuse_capturing


class RandomStreams(NamedTuple):
    """States of the random streams that a call in train mode draws from, so that a later run draws the same."""

    device: torch.device
    cpu: Tensor
    cuda: Tensor | None

    def restore(self) -> None:
        """Set the streams to where they were when the call began."""
        torch.set_rng_state(self.cpu)  # of a call on a GPU too, which may draw numbers on the CPU
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda, self.device)

    def have_moved(self) -> bool:
        """Whether something was drawn from the streams since they were here."""
        on_device = self.cuda is None or torch.equal(torch.cuda.get_rng_state(self.device), self.cuda)
        return not (on_device and torch.equal(torch.get_rng_state(), self.cpu))


def random_streams(device: torch.device) -> RandomStreams:
    """States of the streams as they are now; taken in train mode only, since each is a copy of some kilobytes.

    Raises:
        UnreadableError: a CUDA graph is captured, which has no such states.
    """
    if device.type != "cuda":
        return RandomStreams(device, torch.get_rng_state(), None)
    refuse_capturing()
    return RandomStreams(device, torch.get_rng_state(), torch.cuda.get_rng_state(device))
