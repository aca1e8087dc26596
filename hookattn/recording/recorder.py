"""AttentionRecorder: what touches a model, with `watching` and `edits`, between `with` and the end of the block."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from threading import get_ident
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..calls.call import Call, capture, recaptured
from ..calls.callsite import CallSite, Origins, call_site
from ..calls.hooks import Hook, another_pre_hook_follows, same_objects
from ..calls.layer import Target, target
from ..calls.restore import is_reading
from ..conditions.checkpoints import in_backward
from ..conditions.compiled import EAGER, INSIDE
from ..conditions.threads import Here
from ..errors import NoMapError, RecorderError
from ..image.geometry import Geometry, plain_facts, sizes_of
from ..image.images import images_in
from ..image.trunk import stems_of, trunk_of
from ..maps.attention_map import AttentionMap, Maps
from ..maps.gradient import Gradient
from ..maps.lazy import Delivery
from ..maps.reading import Captured, Lost
from ..recipes.places import block_of
from .detect import Watching
from .edits import Edit, Edits, rehook_before_others
from .follow import match_recomputed
from .keep_maps import Passing, passing
from .passes import ForwardPass, Forwards, why_empty
from .selection import Layer, Layers, choose, recordable, replaced

Keep = Literal["inputs", "maps"]
Passes = Literal["last", "all"]


class AttentionRecorder:
    """Record the attention maps of a model, at the speed of its fused kernel.

        with AttentionRecorder(model) as rec:
            logits = model(images)
        rec.maps["blocks.11.attn"][:, :, 0]

    Forward-pre-hooks keep what each attention module was called with; maps are computed from that when they are sliced.
    No forward is replaced and no flag is flipped; the hooks go when the block ends, the maps stay.

    Recorded is what runs in the thread, and in the asyncio task, that opened the block. Reading a map of a model that others
    run meanwhile is safe where the model is in eval mode and its attention has a recipe and keeps no cache.

    Args:
        model: any `nn.Module`. timm's attention classes are known, others are found by the name of their class. Where none is
            named like attention, the first forward is watched for the modules that form maps.
        layers: which attention modules: names, globs ("blocks.*.attn"), names of modules that hold them ("blocks.3"),
            positions (-1 is the last), a list of these, or a predicate of (name, module). None for all. A module that is
            not known as attention is recorded if it is called by its name.
        keep: "inputs" keeps what a module was called with (a reference, no copy) and computes maps when asked; "maps" computes
            them while the model runs and lets the input go.
        passes: "last" keeps the last forward only, "all" keeps each, as `rec.passes[i]`.
        device, dtype: where maps and gradients go and as what; None for where and as what they are computed.
        detach: True cuts maps off from the autograd graph; False leaves them in it.
        called_from: walk the stack at each call, for `m.called_from`.
        gradients: follow backward to the output of each module, for `m.gradient`.

    Raises:
        ModelError: the attention of the model forms no maps, or it is a DataParallel, scripted or exported one.
        LayerNotFoundError: `layers` names nothing.
        UnreadableError: `layers` names a module that forms no map.
        ValueError: `keep` or `passes` is none of the words above, or `dtype` is no floating one.
        RecorderError: it is made or opened inside compiled code.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Layers = None,
        *,
        keep: Keep = "inputs",
        passes: Passes = "last",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        detach: bool = True,
        called_from: bool = False,
        gradients: bool = False,
    ) -> None:
        if torch.compiler.is_dynamo_compiling():
            raise RecorderError(INSIDE)
        if keep not in ("inputs", "maps"):
            raise ValueError(f'keep={keep!r} is not known: keep="inputs" or keep="maps".')
        if passes not in ("last", "all"):
            raise ValueError(f'passes={passes!r} is not known: passes="last" or passes="all".')
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise ValueError(f"dtype={dtype!r} holds no probabilities: dtype=torch.float32, torch.float16, or None.")
        self.model = recordable(model)
        found = choose(self.model, layers)
        self.skipped: dict[str, str] = found.skipped
        self._chosen: dict[str, nn.Module] = {}
        self._keep, self._detach, self._all_passes = keep, detach, passes == "all"
        self._deliver = Delivery(dtype, None if device is None else torch.device(device))
        self._origins = Origins(self.model) if called_from else None
        self._gradients, self._edits = gradients, Edits(self.model)
        self._followed: dict[tuple[int, nn.Module], tuple[Gradient, Call, list[Any]]] = {}
        self._trunks: dict[str, nn.Module] = {}
        self._blocks: dict[str, nn.Module | None] = {}
        self._around: dict[nn.Module, Any] = {}
        self._watched = ExitStack()
        self._passing: Passing | None = None
        self._hooks: ExitStack | None = None
        self._forwards = Forwards(self.model, keep_all=passes == "all")
        for name, module in found.readable.items():
            self._choose(name, module)

    def __enter__(self) -> AttentionRecorder:
        if self._hooks is not None:
            raise RecorderError("this recorder is open already; make another one, or leave the block first.")
        with ExitStack() as stack:
            stack.enter_context(EAGER)
            self._forwards = Forwards(self.model, keep_all=self._all_passes, here=Here())
            self._hook(stack)
            self._hooks = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        hooks, self._hooks = self._hooks, None
        self._forwards.leave()
        self._followed.clear()
        self._edits.close()
        if hooks is not None:
            hooks.close()

    @property
    def layers(self) -> list[str]:
        """Names of the modules that are recorded."""
        return list(self._chosen)

    @property
    def maps(self) -> Maps:
        """The maps of the last forward, in the order the modules ran.

        Raises:
            NoMapError: no forward has run, or none that called an attention module.
        """
        if not self._forwards.all or not self._forwards.all[-1].maps:
            raise NoMapError(why_empty(self.model, self._forwards, self.layers))
        return Maps(self._forwards.all[-1].maps)

    @property
    def passes(self) -> list[Maps]:
        """The maps of each forward, the last one only unless the recorder was made with passes="all".

        Raises:
            NoMapError: no forward has run, or none that called an attention module.
        """
        filled = [Maps(forward.maps) for forward in self._forwards.all if forward.maps]
        if not filled:
            raise NoMapError(why_empty(self.model, self._forwards, self.layers))
        return filled

    def edit(self, edits: Mapping[Layer, Edit]) -> AbstractContextManager[None]:
        """Let the model go on with other maps than its own, for as long as the block lasts.

            with rec.edit({"blocks.3.attn": lambda a: a.index_fill(1, torch.tensor(2), 0.0)}):  # without head 2
                logits = model(images)

        The module runs fused as always; its output is then computed once more from the edited map, in the graph of the
        forward, and takes the place of its own. All other modules run fused. `rec.maps` shows what each module formed itself,
        before the edit; `m.gradient` is that with respect to the map that was used. Hooks of others inside the module run
        several times. Where activations are checkpointed, call backward before the block of the recorder ends.

        Args:
            edits: what to make of a map, by the layers it is done in (names and globs as in `layers`, positions among
                `rec.layers`): functions of a map (batch, heads, queries, keys), which they may write into, that return one of
                the same shape. Rows need not sum to 1. Several edits of one map follow each other.

        Raises:
            RecorderError: the recorder is not open.
            LayerNotFoundError, UnreadableError: as for `layers`.
            ValueError: in the forward, an edit returned something that is no map of the same shape.
        """
        if self._hooks is None:
            raise RecorderError("the recorder is not open: edit inside its block, `with AttentionRecorder(model) as rec:`.")
        return self._edits.open(edits, self.layers)

    def verify(self, tolerance: float | None = None) -> float:
        """Verify every map of the last forward, see `AttentionMap.verify`.

        Returns:
            The largest absolute difference of all.
        """
        return max(m.verify(tolerance) for m in self.maps.values())

    def __repr__(self) -> str:
        state = "open" if self._hooks is not None else "closed"
        recorded = len(self._forwards.all[-1].maps) if self._forwards.all else 0
        return (
            f"AttentionRecorder({type(self.model).__name__}, {len(self._chosen)} attention modules, {state}, "
            f"{recorded} maps recorded)"
        )

    def _choose(self, name: str, module: nn.Module) -> None:
        self._chosen[name] = module
        self._trunks[name], self._blocks[name] = trunk_of(self.model, name), block_of(self.model, name)

    def _hook(self, stack: ExitStack) -> None:
        """Put every hook on the stack that will take it off."""
        if self._keep == "maps" and self._detach:
            self._passing = stack.enter_context(passing(self.model))
        if self._chosen:
            self._hook_chosen(stack)
        else:
            self._watch(stack)
        stack.enter_context(self.model.register_forward_pre_hook(Hook(self._start), prepend=True, with_kwargs=True))
        stack.enter_context(self.model.register_forward_hook(Hook(self._stop), always_call=True))
        if self._origins is not None:
            for module in self.model.modules():
                stack.enter_context(module.register_forward_hook(Hook(self._note)))

    def _hook_chosen(self, stack: ExitStack) -> None:
        """The hooks of attention modules, of what images go into first and of blocks that cut windows."""
        for name, module in self._chosen.items():
            hook = self._recording(target(name, module))
            stack.enter_context(module.register_forward_pre_hook(hook, with_kwargs=True))
            if self._passing is not None:
                end = Hook(self._passing.end)
                stack.enter_context(module.register_forward_hook(end, prepend=True, always_call=True))
            if self._gradients:
                stack.enter_context(module.register_forward_hook(Hook(self._follow, takes=4), prepend=True, with_kwargs=True))
                rehook_before_others(module)
        for module, trunks in stems_of(self._trunks.values()).items():
            see = self._seeing(module, trunks)
            stack.enter_context(module.register_forward_pre_hook(see, with_kwargs=True))
        for block in dict.fromkeys(self._blocks.values()):
            if block is not None:
                stack.enter_context(block.register_forward_pre_hook(self._noting_around(block), with_kwargs=True))

    def _watch(self, stack: ExitStack) -> None:
        """Nothing is named like attention: watch the first forward for modules that form maps, and hook those."""
        names = {module: name or type(module).__name__ for name, module in self.model.named_modules()}
        stems = stems_of(trunk_of(self.model, name) for name in names.values())
        watching = stack.enter_context(ExitStack())

        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
            if (images := images_in(args, kwargs)) is not None:
                self._forwards.see_images(dict.fromkeys(stems.get(module, ()), images))
            return capture(target(names[module], module), args, kwargs, detach=self._detach), self._site(args, kwargs)

        def leave(module: nn.Module, seen: tuple[Call, CallSite | None], output: Any) -> None:
            self._choose(names[module], module)
            forward = self._forwards.current(names[module])
            name = forward.unused(names[module])
            m = forward.maps[name] = self._map(seen[0], name, forward, seen[1])
            if self._gradients:
                m.gradient.follow(seen[0], output)

        def end(returned: bool) -> None:
            if not returned:
                self._chosen.clear()  # there may be more where it did not get to
                return
            self._watched = watching  # hooks must not go while PyTorch goes through them
            if self._hooks is not None:
                self._hook_chosen(self._hooks)

        Watching(self.model, enter, leave, end).hook(watching)

    def _recording(self, chosen: Target) -> Hook:
        """The hook of one attention module."""

        def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if module is not chosen.module:
                return  # a copy of the model
            if self._forwards.concerns_us():
                forward = self._forwards.current(chosen.name)
                name = forward.unused(chosen.name)
                call = capture(chosen, args, kwargs, detach=self._detach)
                m = forward.maps[name] = self._captured(call, name, forward, self._site(args, kwargs))
                later = another_pre_hook_follows(module, me())
                if self._passing is not None and not later and not any(call.modes.training):
                    self._passing.keep(m, partial(forward.maps.__setitem__, name))
                elif self._keep == "maps":
                    forward.maps[name] = m.computed()
                if self._gradients:
                    self._followed[get_ident(), module] = m.gradient, call, [*args, *kwargs.values()]
                if later:
                    self._look_again(call, [*args, *kwargs.values()], name, forward)
            elif not is_reading():
                self._run_again(chosen, args, kwargs)

        hook = Hook(record)
        me = weakref.ref(hook)  # a closure that held itself would be a cycle
        return hook

    def _look_again(self, call: Call, given: list[Any], name: str, forward: ForwardPass) -> None:
        """Take what the module really received, once it has run, if a hook that came after ours changed it."""

        def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if not self._forwards.is_here():
                return
            handle.remove()
            if not same_objects([*args, *kwargs.values()], given):
                final, site = recaptured(call, args, kwargs, detach=self._detach), self._site(args, kwargs)
                forward.maps[name] = self._map(final, name, forward, site, forward.maps[name])

        handle = call.target.module.register_forward_hook(Hook(after, takes=4), with_kwargs=True, always_call=True)

    def _run_again(self, chosen: Target, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A checkpoint runs a module again in backward."""
        saves, followed = self._keep == "maps" and not self._detach, self._gradients and in_backward()
        if not saves and not followed:
            return
        call = capture(chosen, args, kwargs, detach=self._detach)
        if saves:
            self._map(call, chosen.name, ForwardPass(), None)  # the same as in the forward
        if followed:
            forwards = ([m for name, m in forward.maps.items() if _is_of(name, chosen)] for forward in self._forwards.all[::-1])
            gradient = match_recomputed(([m.gradient for m in maps] for maps in forwards), call)
            if gradient is not None:
                self._followed[get_ident(), chosen.module] = gradient, call, [*args, *kwargs.values()]

    def _follow(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """The hook at the end of an attention module, before hooks of others see its output."""
        if is_reading() or (get_ident(), module) not in self._followed:
            return
        gradient, call, seen = self._followed.pop((get_ident(), module))
        if not same_objects([*args, *kwargs.values()], seen):
            call = recaptured(call, args, kwargs, detach=self._detach)
        gradient.follow(call, output)

    def _map(
        self, call: Call, name: str, forward: ForwardPass, site: CallSite | None, before: AttentionMap | None = None
    ) -> AttentionMap:
        captured = self._captured(call, name, forward, site, before)
        return captured if self._keep == "inputs" else captured.computed()

    def _captured(
        self, call: Call, name: str, forward: ForwardPass, site: CallSite | None, before: AttentionMap | None = None
    ) -> AttentionMap:
        chosen = call.target.name
        images = forward.images.get(self._trunks[chosen], forward.images.get(None))
        around = None if (block := self._blocks[chosen]) is None else self._around.get(block)
        facts = {} if block is None else plain_facts(block)
        geometry = Geometry(self.model, chosen, images, sizes_of(call.args, call.kwargs), around, facts)
        gradient = before.gradient if self._gradients and before is not None else None
        if self._gradients and gradient is None:
            gradient = Gradient(name, self._deliver, forward.backwards, in_backward=self._keep == "maps")
        return AttentionMap(name, Captured(call), geometry, self._deliver, site, gradient)

    def _site(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> CallSite | None:
        if self._origins is None:
            return None
        return call_site(next(t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)), self._origins)

    def _note(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._origins is not None and self._forwards.is_here():
            self._origins.note(module, args, output)

    def _seeing(self, stem: nn.Module, trunks: list[nn.Module]) -> Hook:
        """The hook of a stem: the pictures that the next maps of these trunks are of."""

        def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            images = images_in(args, kwargs)
            if module is stem and images is not None and self._forwards.concerns_us():
                self._forwards.see_images(dict.fromkeys(trunks, images))

        return Hook(see)

    def _noting_around(self, block: nn.Module) -> Hook:
        """The hook of a block that cuts windows: what it cuts."""

        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if module is block and self._forwards.concerns_us():
                self._around[block] = sizes_of(args, kwargs)

        return Hook(note)

    def _start(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module is self.model and self._forwards.concerns_us():
            self._watched.close()
            self._forwards.start()
            if (images := images_in(args, kwargs)) is not None:
                self._forwards.see_images({None: images})

    def _stop(self, module: nn.Module, *_: Any) -> None:
        if module is self.model and self._forwards.concerns_us():
            self._forwards.stop()
            self._around.clear()
            self._tell_what_was_replaced()

    def _tell_what_was_replaced(self) -> None:
        """A map that is missing since another module stands where the one with our hooks stood."""
        maps = self._forwards.all[-1].maps if self._forwards.all else {}
        for name in [name for name in replaced(self.model, self._chosen) if name not in maps]:
            reason = f"{name!r} was replaced by another module inside the block; open the block after that."
            maps[name] = AttentionMap(name, Lost(name, reason), Geometry(self.model, name), self._deliver)


def _is_of(name: str, chosen: Target) -> bool:
    """Whether a map is one of a module's."""
    return name == chosen.name or name.startswith(f"{chosen.name}#")
