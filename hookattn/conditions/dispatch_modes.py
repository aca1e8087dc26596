"""Dispatch modes: what a hook of ours runs is invisible to those that are on."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

# not documented, but what PyTorch itself uses to look at tensors while modes are on; in torch 2.6 to 2.15
from torch.utils._python_dispatch import _disable_current_modes


def unseen_by_modes() -> AbstractContextManager[object]:
    """A context in which no dispatch mode sees what runs.

    A selective checkpoint caches the outputs of operators by their number and looks them up by it in backward, so an operator
    too many gives the user wrong gradients without an error. Whoever counts operators counts the model's.
    """
    return _disable_current_modes() if torch._C._len_torch_dispatch_stack() else nullcontext()
