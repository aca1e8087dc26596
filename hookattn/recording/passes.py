"""What counts as one forward: a call of the model, of one of its methods, or of its modules one by one; and its maps."""

from __future__ import annotations

import sys
from collections.abc import Callable, Container, Iterator
from functools import cached_property
from itertools import count
from types import CodeType, FrameType
from typing import Any

import torch
from torch import nn

from ..calls.hooks import Around
from ..conditions.frames import Running, caller_of_hook, code_of_methods
from ..conditions.meta import name_missing
from ..conditions.threads import Here
from ..image.geometry import ArgumentSizes
from ..image.images import Images, frames_in, images_in
from ..image.trunk import Cut
from ..maps.attention_map import AttentionMap
from ..maps.gradient import Backwards, Gradient

_TOLD = 4  # other threads that an error names


class ForwardPass:
    """The maps of one forward, and what is known of its images, gathered while it runs.

    Args:
        called: what of the model was called: one of its methods by name; "" for modules that are called one by one.
        modules: names of those that are recorded.

    Attributes:
        maps: by name, in the order the modules ran.
        images: the pictures that each part of the model looks at, those of the whole model under None.
        frames: how many frames a clip may have that the model was called with.
        closed: whether it was a call of the model that has returned.
        backwards: which backward was the last to reach it.
    """

    def __init__(self, called: str = "", modules: Container[str] = ()) -> None:
        self.called, self._modules = called, modules
        self.maps: dict[str, AttentionMap] = {}
        self._names: dict[str, tuple[str, ...]] = {}  # of the maps of each module
        self.images: dict[nn.Module | None, Images] = {}
        self.frames: tuple[int, ...] = ()
        self.closed = False
        self.backwards = Backwards()

    def next_name(self, module: str) -> str:
        """What to call the map of a module's next call: as the module, then `name#1`, `name#2`, ...; never as another one."""
        if module not in self.maps:  # nearly always, and at each call
            self._names[module] = (module,)
            return module
        names = self._names.get(module, ())
        tried = (f"{module}#{i}" for i in count(max(1, len(names))))
        name = next(n for n in tried if n not in self.maps and n not in self._modules)
        self._names[module] = (*names, name)
        return name

    def maps_of(self, module: str) -> list[AttentionMap]:
        """The maps of a module, call by call."""
        return [self.maps[name] for name in self._names.get(module, ()) if name in self.maps]


class ForwardPasses(Around):
    """Tells forwards of a model apart while they run, and keeps the last one or all.

    A call of the model is announced by its hooks. A call of one of its methods (`forward_features`) announces nothing: it is
    recognised by its frame on the stack. Either lasts as long as that frame is on the stack, since PyTorch calls no hook where
    a KeyboardInterrupt ends it. Where there is neither, somebody calls module after module by hand, and a new forward begins
    when one is called again.

    Args:
        model: whose forwards they are.
        modules: names of those that are recorded, which may become more.
        keep_all: whether the ones before the last are kept.
        here: the thread and the task that they run in; None for any.
        ended: called with each forward that was a call of the model, when it has ended.

    Attributes:
        elsewhere: in which other threads and tasks the model was called, in words; some of them, if they are many.
        let_go: names of maps of forwards before the last that are not kept, each with what of the model was called.
        images: the pictures that the maps to come are of, by the part of the model that looks at them.
        blocks: what blocks that cut windows were called with, tensors by their sizes.
        cuts: how parts of the model cut the images that went into them last.
    """

    def __init__(
        self,
        model: nn.Module,
        modules: Container[str] = (),
        *,
        keep_all: bool,
        here: Here | None = None,
        ended: Callable[[ForwardPass], None] = lambda _: None,
    ) -> None:
        super().__init__(model)
        self._ended = ended
        self.all: list[ForwardPass] = []
        self.let_go: dict[str, str] = {}
        self.here, self.elsewhere = here, dict[str, None]()
        self.blocks: dict[nn.Module, ArgumentSizes] = {}
        self.cuts: dict[nn.Module | None, Cut] = {}
        self._modules, self._keep_all = modules, keep_all
        self._call: Running | None = None
        # The call of the model that runs. `_call` may be of a method instead, in which each call of the model is a pass.
        self._announced: ForwardPass | None = None
        self.images: dict[nn.Module | None, Images] = {}

    @cached_property
    def _methods(self) -> set[CodeType]:
        """Code of the model's methods, asked for where a module is called and no call of the model is announced."""
        return code_of_methods(self.module)

    def is_recorded_here(self) -> bool:
        """Whether a module that is called now belongs to a forward that is recorded: one where the recorder was opened."""
        if torch._C._current_graph_task_id() != -1:  # as `in_backward`: a checkpoint makes it again, in whichever thread
            return False
        if self.here is not None and not self.here():
            if len(self.elsewhere) < _TOLD:
                self.elsewhere[str(Here())] = None
            return False
        return True

    def is_here(self) -> bool:
        """Whether what runs now runs in the thread and the task that these forwards are of."""
        return self.here is None or self.here()

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ForwardPass | None:
        """Begin a pass with a call of the model, unless it runs within another such call."""
        if not self.is_recorded_here():
            return None
        begun = None
        # `_call` is false where the one that was announced was interrupted, and nobody has told that it ended
        if self._announced is None or not self._call:
            begun = self._announced = self._begin_pass(Running(caller_of_hook(self.module), held=True), "forward")
            self.images.clear()
            begun.frames = frames_in(args, kwargs)
        if (images := images_in(args, kwargs)) is not None:
            self.images[None] = images
        return begun

    def end(self, state: ForwardPass, args: tuple[Any, ...], kwargs: dict[str, Any], changed: bool, output: Any) -> None:
        """Close the pass of a call of the model that has ended, whether it returned or raised."""
        state.closed, self._call, self._announced = True, None, None
        self.blocks.clear()
        self._ended(state)

    def current(self, name: str) -> ForwardPass | None:
        """The pass that a call of the module `name` belongs to, which may begin with it; None if it is not recorded here."""
        if not self.is_recorded_here():
            return None
        forward = self.all[-1] if self.all else None
        if forward is None or forward.closed or not self._call:  # seldom: inside of a call of the model there is one
            forward = self._running_pass(name)
        # what a stem has seen since the last call of attention are the images of this pass
        if self.images:
            forward.images.update(self.images)
            self.images.clear()
        return forward

    def gradients_of(self, name: str) -> Iterator[list[Gradient]]:
        """The gradients of the maps of a module, forward by forward, the last one first."""
        for forward in self.all[::-1]:
            yield [gradient for m in forward.maps_of(name) if (gradient := m._gradient) is not None]

    def close(self, finish: Callable[[AttentionMap], AttentionMap] = lambda m: m) -> None:
        """Let go of the frame that a forward is a call of, and of the model where maps are kept, finished now if they wait."""
        super().close()
        self._call = self._announced = None
        for forward in self.all:
            for name, m in forward.maps.items():
                forward.maps[name] = finish(m).settled()

    def _begin_pass(self, call: Running | None, called: str) -> ForwardPass:
        if not self._keep_all:
            self.let_go.update({name: last.called for last in self.all for name in last.maps})
            self.all.clear()
        self.all.append(ForwardPass(called, self._modules))
        self._call = call
        return self.all[-1]

    def _running_pass(self, name: str) -> ForwardPass:
        """The pass of a call that is not announced as one of the model; it may begin with this module."""
        last = self.all[-1] if self.all else None
        frame = self._outermost_method()
        # a loop by hand goes on until a module comes again; it cannot go on from a call whose frame is gone
        by_hand = frame is None and self._call is None
        if by_hand and last is not None and not last.closed and name not in last.maps:
            return last
        if frame is None:
            return self._begin_pass(None, "")
        return self._begin_pass(Running(frame, held=False), frame.f_code.co_name)

    def _outermost_method(self) -> FrameType | None:
        """The frame of the outermost method of the model on the stack, such as `forward_features`; None if none is called."""
        frame: FrameType | None = sys._getframe(1)
        found = None
        while frame is not None:
            found = frame if frame.f_code in self._methods else found
            frame = frame.f_back
        return found


def why_empty(model: nn.Module, passes: ForwardPasses, layers: list[str]) -> str:
    """Words of the error that says why there is no map, and what to type next."""
    if not passes.all and passes.elsewhere:
        return (
            f"a forward ran in {' and in '.join(passes.elsewhere)}, but this recorder was opened in "
            f"{passes.here} and records what runs there alone. Open it where the model is called: put `with "
            "AttentionRecorder(model) as rec:` into the function that the other thread or task runs."
        )
    if not passes.all and not layers:
        return (
            f"nothing in {type(model).__name__} is named like attention, so the first call of the model itself is "
            "watched: call model(...) inside the block, not one of its methods or parts, or name the modules, layers=[...]."
        )
    if not passes.all:
        return (
            f"no forward of the {type(model).__name__} has run inside the block: call it between `with "
            "AttentionRecorder(model) as rec:` and the end of the block, and the very object the recorder was made with. "
            "An export or a trace of it is none."
        )
    if not layers:
        return (
            f"a forward of {type(model).__name__} ran and was watched: none of its modules called "
            "scaled_dot_product_attention, or a softmax whose outcome weighs values. If there is a kernel of its own, name "
            "the module, AttentionRecorder(model, layers=[...]), and describe its map with @hookattn.recipe."
        )
    why = "A fast path, a compiled or a scripted part may have gone around them; layers=[...] names other modules."
    called = f"a forward ran, but it called none of {', '.join(layers[:4])}{', ...' * (len(layers) > 4)}."
    return f"{called} {name_missing(model) or why}"
