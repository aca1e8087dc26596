"""Train mode: the random streams that dropout draws from."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class RandomStreams(NamedTuple):
    """Where the random streams of the CPU and, where a call is on one, of a CUDA device are."""

    device: torch.device
    cpu: Tensor
    cuda: Tensor | None

    def restore(self) -> None:
        """Set the streams to where they were."""
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda, self.device)


def random_streams(device: torch.device) -> RandomStreams:
    """Where the random streams are now."""
    return RandomStreams(device, torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None)
