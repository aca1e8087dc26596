"""Hooks that note what lies around attention: images, how they are cut, what blocks are given, which module put out what."""

from __future__ import annotations

from contextlib import ExitStack, suppress
from functools import partial
from typing import Any

from torch import nn

from ..calls.callsite import Origins
from ..calls.hooks import Args, Around, Hook, Kwargs, put_on
from ..image.geometry import measure_arguments
from ..image.images import images_in
from ..image.trunk import cut_of
from .passes import ForwardPasses


class Stem(Around):
    """The hook of what images go into first; it notes the pictures that the next maps of some trunks are of."""

    def __init__(self, stem: nn.Module, trunks: list[nn.Module], passes: ForwardPasses) -> None:
        super().__init__(stem)
        self._trunks, self._passes = trunks, passes

    def begin(self, args: Args, kwargs: Kwargs) -> None:
        """Note the images that go in."""
        if self._passes.is_recorded_here() and (images := images_in(args, kwargs)) is not None:
            self._passes.images.update(dict.fromkeys(self._trunks, images))
            for trunk in self._trunks:  # which may be made for images of another size between two forwards
                self._passes.cuts[trunk] = cut_of(trunk, self._passes.cuts.get(trunk))


class Block(Around):
    """The hook of a block that cuts windows; it notes what is cut."""

    def __init__(self, block: nn.Module, passes: ForwardPasses) -> None:
        super().__init__(block)
        self._passes = passes

    def begin(self, args: Args, kwargs: Kwargs) -> None:
        """Note the sizes of what the block is called with."""
        if self._passes.is_recorded_here():
            self._passes.blocks[self.module] = measure_arguments(args, kwargs)


def note_outputs(model: nn.Module, origins: Origins, passes: ForwardPasses, stack: ExitStack) -> None:
    """Put a hook on every module, for `called_from`, that notes which one put out what; they come off with the stack."""
    for module in model.modules():
        stack.enter_context(put_on(module.register_forward_hook, Hook(partial(_note, origins, passes))))


def _note(origins: Origins, passes: ForwardPasses, module: nn.Module, args: Args, output: Any) -> None:
    if passes.is_here():
        with suppress(Exception):  # what a module is given may be anything; who made it is then not known
            origins.note(module, args, output)
