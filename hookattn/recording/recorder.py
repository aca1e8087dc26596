"""AttentionRecorder: what a user opens around a model, and reads maps from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from types import TracebackType
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..calls.call import Call, capture
from ..calls.callsite import CallSite, Origins
from ..calls.copies import copied_without_hooks
from ..calls.hooks import Args, Kwargs
from ..calls.layer import Layer, look_up
from ..conditions.compiled import COMPILED, INSIDE
from ..conditions.modules import walk
from ..conditions.threads import Here
from ..conditions.wrappers import recordable
from ..errors import NoMapError, RecorderError, explained
from ..image.geometry import Geometry
from ..image.images import images_in
from ..image.tokens import Query
from ..image.trunk import find_trunks, stems_of, trunk_of
from ..maps.attention_map import AttentionMap
from ..maps.comparison import Difference
from ..maps.lazy import Delivery
from ..maps.reading import Lost
from ..recipes.places import find_block, find_blocks
from .detect import Detection
from .edits import Edit, Edits
from .keep_maps import KeepMaps
from .maps import Maps, name_model
from .passes import ForwardPass, ForwardPasses, why_empty
from .record import Recording
from .reduce import Keep, Reducing, reduction_of
from .saving import Saving
from .selection import Layers, choose, find_replaced, find_unnamed
from .stay_compiled import find_backend, join_graphs
from .stems import note_outputs
from .wanted import Wanted

Forwards = Literal["last", "all"]


class AttentionRecorder(Saving, Reducing):
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
            named like attention, the first forward is watched for the modules that form maps. One that was compiled runs on
            graphs that call the hooks, compiled once, or eagerly where that cannot be, of which it is warned.
        layers: which attention modules: names, globs ("blocks.*.attn", "blocks.3.*"), positions (-1 is the last), a list of
            these, or a predicate of (name, module). None for all. A name is that very module, known as attention or not.
        keep: "inputs" keeps what a module was called with (a reference, in a compiled graph a copy) and computes maps when
            asked; "maps" computes them while the model runs and lets the input go; a function of a map, which is called with
            each while the model runs, keeps what it returns, as `rec.reduced`, and lets input and map go.
        passes: "last" keeps the last forward only, "all" keeps each, as `rec.passes[i]`.
        device, dtype: where maps and gradients go and as what; None for where and as what they are computed.
        detach: True cuts maps off from the autograd graph; False leaves them in it.
        called_from: walk the stack at each call, for `m.called_from`.
        gradients: follow backward to the output of each module, for `m.gradient`.
        verify: compare each map, while the model runs, with the output that its module really put out, for `m.verify()`. It
            runs each module a few more times, with hooks of others below it and function modes.

    Raises:
        ModelError: the attention of the model forms no maps, or it is a DataParallel, scripted or exported one.
        LayerNotFoundError: `layers` names nothing.
        UnreadableError: `layers` names a module that forms no map.
        ValueError: `keep` or `passes` is none of the above, or does not go with the rest, or `dtype` is no floating one.
        RecorderError: it is made or opened inside compiled code.
    """

    explore: ClassVar[Callable[..., Any]]  # put here by the face of the package: figures/page.py stands above this room
    show: ClassVar[Callable[..., Any]]

    def __init__(
        self,
        model: nn.Module,
        layers: Layers = None,
        *,
        keep: Keep = "inputs",
        passes: Forwards = "last",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        detach: bool = True,
        called_from: bool = False,
        gradients: bool = False,
        verify: bool = False,
    ) -> None:
        if torch.compiler.is_dynamo_compiling():
            raise RecorderError(INSIDE)
        self._reduction = reduction_of(keep, passes=passes, gradients=gradients, verify=verify)
        if passes not in ("last", "all"):
            raise ValueError(f'passes={passes!r} is not known: passes="last" or passes="all".')
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise ValueError(f"dtype={dtype!r} holds no probabilities: dtype=torch.float32, torch.float16, or None.")
        named = recordable(model)
        self.model, self._all_modules = named[""], [model, *named.values()]
        found = choose(named, layers)
        self._skipped = found.skipped
        self._modules = dict(found.readable)
        deliver = Delivery(dtype, None if device is None else torch.device(device))
        self._wanted = Wanted(keep != "inputs", self._reduction, detach, gradients, verify, deliver)
        self._keep_all, self._called_from = passes == "all", called_from
        self._passes = ForwardPasses(self.model, self._modules, keep_all=self._keep_all)
        self._edits = Edits(self.model)
        self._hooks: ExitStack | None = None

    def __enter__(self) -> AttentionRecorder:
        if self._hooks is not None:
            raise RecorderError("this recorder is open already; make another one, or leave the block first.")
        # If one of these raises, the stack takes off what is on; only a recorder that has come to the end of them is open.
        with ExitStack() as stack:
            stack.enter_context(COMPILED)
            stack.enter_context(copied_without_hooks(self.model))
            ended = partial(_record_replaced_layers, self.model, self._modules, self._wanted.deliver)
            self._passes = ForwardPasses(self.model, self._modules, keep_all=self._keep_all, here=Here(), ended=ended)
            self._hook(stack)
            self._hooks = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        hooks, self._hooks = self._hooks, None  # closed from now on, also if something below raises
        self._edits.close()
        if hooks is not None:
            hooks.close()

    @property
    def layers(self) -> list[str]:
        """Names of the modules that are recorded."""
        return list(self._modules)

    @property
    def maps(self) -> Maps:
        """The maps of the last forward that can be read, in the order the modules ran; `skipped` names the others.

        Raises:
            NoMapError: no forward has run, or none that called an attention module.
        """
        self._check_kept()
        return self._maps_of(self._last_forward())

    @property
    def skipped(self) -> dict[str, str]:
        """Names of modules that form no map which could be read, each with the reason; of the last forward, what it showed.

        A map between channels, a linear attention or points that are sampled may be found in the forward only, and are not
        among `maps` then. A forward of a class that has no recipe is run again for that, the first time. Modules that are not
        recorded, since nothing names them attention, and may form a map by their code are named with the `layers=` for it.
        """
        ran = self._maps_of(self._passes.all[-1]).skipped if self._passes.all else {}
        recorded = {name: None for forward in self._passes.all for name in forward.maps}
        unnamed = {n: why for n, why in find_unnamed(walk(self.model)).items() if n not in self._modules and n not in recorded}
        return {**self._skipped, **ran, **unnamed}

    @property
    def passes(self) -> list[Maps]:
        """The maps of each forward, the last one only unless the recorder was made with passes="all".

        Raises:
            NoMapError: no forward has run, or none that called an attention module.
        """
        self._check_kept()
        filled = [self._maps_of(forward) for forward in self._passes.all if forward.maps]
        if not filled:
            raise NoMapError(why_empty(self.model, self._passes, self.layers))
        return filled

    def rows(self, query: Query = "cls") -> dict[str, Tensor]:
        """What a query attends to in every layer of the last forward, by name, such as the class token for token pruning.

            rows = rec.rows("cls")["blocks.11.attn"]  # (images, heads, keys)

        See `AttentionMap.rows` for what a query may be.

        Raises:
            NoMapError: as for `maps`.
            TokenError: a layer has no such query; `layers=` leaves it out.
        """
        return self.maps.rows(query)

    def edit(self, edits: Mapping[str | int, Edit]) -> AbstractContextManager[None]:
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

    def verify(self, tolerance: float | None = None) -> Difference:
        """Verify every map of the last forward, see `AttentionMap.verify`.

        Returns:
            The largest absolute difference of all.
        """
        if not (maps := self.maps):
            raise NoMapError(f"no map that was recorded can be read. {explained(maps.skipped.values())}")
        return max(m.verify(tolerance) for m in maps.values())

    def __repr__(self) -> str:
        state = "open" if self._hooks is not None else "closed"
        last = self._passes.all[-1] if self._passes.all else ForwardPass()
        of = f" of {last.called}" if last.called else ""
        return (
            f"AttentionRecorder({type(self.model).__name__}, {len(self._modules)} attention modules, {state}, "
            f"{len(last.maps)} maps{of} recorded)"
        )

    def _maps_of(self, forward: ForwardPass) -> Maps:
        return Maps(forward.maps, forward.called, self._passes.let_go, name_model(self.model))

    def _hook(self, stack: ExitStack) -> None:
        """Put all hooks on the model, to come off with the stack."""
        # Order matters. The hooks of the model go on last and outermost: a pass begins before a stem sees its image, and ends
        # after the last layer, also where the model is one and the same module as the layer.
        backend = find_backend(self._all_modules, self._modules, self._wanted, self._called_from)
        keep_maps = None
        if self._wanted.maps and self._wanted.detach:
            keep_maps = KeepMaps(self.model, stack.enter_context(ExitStack()))  # to which it adds while modules run
        origins = Origins(self.model) if self._called_from else None
        recording = Recording(
            self.model, self._wanted, self._passes, origins, *((keep_maps, None) if backend is None else (None, keep_maps))
        )
        hooked = recording.hook(self._look_up(), stack) if self._modules else []
        if not self._modules:
            self._detect(recording, stack)
        stack.callback(self._passes.close, self._wanted.finish)
        self._passes.hook(outermost=True)
        if backend is not None:
            join_graphs([*hooked, self._passes], backend)
        if origins is not None:
            note_outputs(self.model, origins, self._passes, stack)

    def _look_up(self) -> list[Layer]:
        trunks, blocks = find_trunks(self.model, self._modules), find_blocks(self.model, self._modules)
        return [look_up(name, module, trunks[name], blocks[name]) for name, module in self._modules.items()]

    def _detect(self, recording: Recording, stack: ExitStack) -> None:
        """Watch the first forward for modules that form maps, and hook those; for models with nothing named like attention."""
        names = {module: name or type(module).__name__ for name, module in self.model.named_modules()}
        stems = stems_of(find_trunks(self.model, names.values()).values())

        def enter(module: nn.Module, args: Args, kwargs: Kwargs) -> Any:
            if (images := images_in(args, kwargs)) is not None:
                self._passes.images.update(dict.fromkeys(stems.get(module, ()), images))
            call = capture(look_up(names[module], module), args, kwargs, detach=self._wanted.detach)
            return call, recording.site_of(args, kwargs)

        def leave(module: nn.Module, noted: tuple[Call, CallSite | None], output: Any) -> None:
            self._modules[names[module]] = module
            call, site = noted
            layer = call.layer._replace(trunk=trunk_of(self.model, names[module]), block=find_block(self.model, names[module]))
            recording.record_ended(call._replace(layer=layer), site, output)

        def end(returned: bool) -> None:
            if not returned:
                self._modules.clear()  # there may be more where it did not get to
            elif self._hooks is not None:
                recording.hook(self._look_up(), self._hooks)

        Detection(self.model, enter, leave, end).hook(stack)


def _record_replaced_layers(model: nn.Module, modules: dict[str, nn.Module], deliver: Delivery, ended: ForwardPass) -> None:
    """Put a lost map, with the reason, where a layer was replaced inside the block by a module without our hooks."""
    missing = {name: module for name, module in modules.items() if name not in ended.maps}
    for name in list(find_replaced(model, missing)):
        reason = f"{name!r} was replaced by another module inside the block; open the block after that."
        ended.maps[name] = AttentionMap(name, Lost(name, reason), Geometry(model, name, modules[name]), deliver)
