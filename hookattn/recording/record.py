"""The hooks that keep what each attention module was called with, and make a map of it."""

from __future__ import annotations

from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..calls.call import Call, capture, recaptured
from ..calls.callsite import CallSite, Origins, call_site
from ..calls.hooks import Args, Around, Kwargs
from ..calls.layer import Layer
from ..calls.restore import reading
from ..conditions.checkpoints import in_backward
from ..conditions.graphs import Given, LayerOutput
from ..image.geometry import Geometry, measure_arguments
from ..image.snapshot import read_settings
from ..image.trunk import stems_of
from ..maps.attention_map import AttentionMap
from ..maps.established import deferring, reason_of
from ..maps.gradient import Gradient
from ..maps.reading import Captured, Lost
from ..maps.sites import Watch
from ..recipes.registry import find_recipe
from .edits import edit_before_others, is_edited
from .follow import match_recomputed
from .hear import Awaited
from .keep_maps import AwaitedMap, KeepMaps
from .lent_maps import await_reduction, is_described, read_after_call
from .passes import ForwardPass, ForwardPasses
from .stay_compiled import check_call
from .stems import Block, Stem
from .wanted import Wanted


@dataclass(frozen=True, eq=False)
class Recording:
    """Hooks layers and makes maps of their calls, for as long as a block lasts.

    `origins` is None where nobody asks for callers, `keep_maps` and `in_graphs` where modules, graphs make no maps.
    """

    model: nn.Module
    wanted: Wanted
    passes: ForwardPasses
    origins: Origins | None
    keep_maps: KeepMaps | None
    in_graphs: KeepMaps | None

    def hook(self, layers: list[Layer], stack: ExitStack) -> list[Around]:
        """Put hooks on layers, on what images go into first and on blocks that cut windows; they come off with the stack."""
        arounds: list[Around] = [_RecordedLayer(layer, self) for layer in layers]
        trunks = [layer.trunk for layer in layers if layer.trunk is not None]
        arounds += [Stem(stem, of, self.passes) for stem, of in stems_of(trunks).items()]
        blocks = dict.fromkeys(layer.block for layer in layers if layer.block is not None)
        arounds += [Block(block, self.passes) for block in blocks]
        for around in arounds:
            stack.callback(around.close)
            # most recorded calls need no second hook; one is put on when a first call does
            around.hook(
                ends=isinstance(around, _RecordedLayer)
                and (self.wanted.gradients or self.wanted.verify or self.keep_maps is not None)
            )
            edit_before_others(around.module)  # of another recorder: what we follow is to be what the model goes on with
        return arounds

    def record_ended(self, call: Call, site: CallSite | None, output: Any) -> None:
        """Record a call that has ended, of a layer that was detected in it and had no hooks yet."""
        if (forward := self.passes.current(call.layer.name)) is None:
            return
        name = forward.next_name(call.layer.name)
        gradient = self.gradient_of(name, forward)
        m = self.map_of(call, name, forward, site, gradient)
        forward.maps[name] = self.compare(self.compute(m), call, output)
        if gradient is not None:
            gradient.follow(call, output)

    def compute(self, m: AttentionMap) -> AttentionMap:
        """The map computed now, inside the user's forward, if maps are to be kept, or what a function makes of it.

        One whose axes would have to be established first stays as it is, and is computed at the end of the block.
        """
        if not self.wanted.maps:
            return m
        # in a graph it is computed whatever it costs: a checkpoint that runs the forward again must find it do the same
        if (reduction := self.wanted.reduction) is not None:
            return reduction.in_forward(m) if self.wanted.detach else reduction(m)
        with deferring() if self.wanted.detach else nullcontext():
            return m.computed()

    def compare(self, m: AttentionMap, call: Call, output: Any) -> AttentionMap:
        """The map of a call that has just ended, compared with what its module really put out, if that is wanted."""
        # what an edit has put out is not what the map makes: such a map is compared with a second run when somebody asks
        if not self.wanted.verify or is_edited(call.layer.module):
            return m
        return (m.computed() if m.is_pending else m).compared_with(call, output)

    def map_of(
        self, call: Call, name: str, forward: ForwardPass, site: CallSite | None, gradient: Gradient | None
    ) -> AttentionMap:
        """Make the map of a call, which is not computed yet, with what is known of its place in the image."""
        layer = call.layer
        trunk, seen = layer.trunk, forward.images
        images = seen[trunk] if trunk in seen else seen.get(None)
        sizes, cut = measure_arguments(call.args, call.kwargs), self.passes.cuts.get(trunk)
        if layer.block is None:
            geometry = Geometry(self.model, layer.name, layer.module, images, sizes, cut=cut, frames=forward.frames)
        else:
            around, settings = self.passes.blocks.get(layer.block), read_settings(layer.block)
            of_block = layer.block, around, settings
            geometry = Geometry(self.model, layer.name, layer.module, images, sizes, *of_block, cut, forward.frames)
        return AttentionMap(name, Captured(call), geometry, self.wanted.deliver, site, gradient)

    def lost(self, layer: Layer, name: str, error: Exception) -> AttentionMap:
        """The map of a call that could not be recorded."""
        geometry = Geometry(self.model, layer.name, layer.module)
        return AttentionMap(name, Lost(name, reason_of(error)), geometry, self.wanted.deliver)

    def gradient_of(self, name: str, forward: ForwardPass) -> Gradient | None:
        """Make the gradient of a map, which no backward has brought yet; None where none is wanted."""
        if not self.wanted.gradients:
            return None
        # with keep="maps" inputs are let go, so a gradient is computed when backward brings it
        return Gradient(name, self.wanted.deliver, forward.backwards, in_backward=self.wanted.maps)

    def site_of(self, args: Args, kwargs: Kwargs) -> CallSite | None:
        """Where a module is called from and which module made its input; None where that is not asked for."""
        if self.origins is None:
            return None
        return call_site(next(t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)), self.origins)


class _Begun(NamedTuple):
    """A call of a layer that is to be looked at again when it ends.

    Attributes:
        gradient: to be told of its output.
        m: its map, and the forward it belongs to; None for a call that a checkpoint makes again.
        awaited: its map, or what a function makes of it, if that is made while the module runs.
        watch: what is noted of it, for a map that a function reduces then.
    """

    call: Call
    gradient: Gradient | None
    m: tuple[AttentionMap, ForwardPass] | None = None
    awaited: Awaited | None = None
    watch: Watch | None = None


class _RecordedLayer(Around):
    """The hooks that record an attention module."""

    def __init__(self, layer: Layer, recording: Recording) -> None:
        super().__init__(layer.module)
        self._layer, self._recording = layer, recording
        wanted = recording.wanted
        # A map that is made while the module runs is made before anybody can write to parameters; one whose axes have to be
        # established first may be made later.
        at_once = wanted.maps and wanted.detach and not (wanted.gradients or wanted.verify)
        self._sampled = not at_once or find_recipe(layer.module) is None

    def begin(self, args: Args, kwargs: Kwargs) -> _Begun | None:
        """Record a call in a forward of this recorder; follow any other, such as one that a checkpoint makes again."""
        forward = self._recording.passes.current(self._layer.name)
        if forward is None:
            return self._follow_recomputed(args, kwargs)
        name = forward.next_name(self._layer.name)
        try:
            return self._record(name, forward, args, kwargs)
        except Exception as error:  # arguments of a kind that nobody thought of: told when the map is read
            forward.maps[name] = self._recording.lost(self._layer, name, error)
            return None

    def begin_in_graph(self, given: Given) -> None:
        """Record a call in a compiled graph: of copies, since the graph writes into the memory of what it has used."""
        recording = self._recording
        if reading.get() or (forward := recording.passes.current(self._layer.name)) is None:
            return
        name = forward.next_name(self._layer.name)
        try:
            if recording.in_graphs is not None:
                recording.in_graphs.listener.forget_in_graph(self.module)
            check_call(self)
            # a map that is made at once needs none, but a function of the user's may keep what it is given
            copied = self._sampled or recording.wanted.reduction is not None or given.weights
            given = given.copied() if copied else given
            self._record(name, forward, *given.arguments(whole=True), given)
        except Exception as error:
            forward.maps[name] = recording.lost(self._layer, name, error)

    def hear_in_graph(self, output: LayerOutput) -> None:
        """Make the map of a call in a compiled graph, if it waits for this layer."""
        if (in_graphs := self._recording.in_graphs) is not None:
            in_graphs.listener.hear_in_graph(self.module, output)

    def has_failed(self, error: Exception, state: _Begun | None = None) -> None:
        """Say why there is no map when it is read."""
        if state is not None and state.m is not None:
            m, forward = state.m
            forward.maps[m.name] = m.lost(error)

    def end(self, state: _Begun, args: Args, kwargs: Kwargs, changed: bool, output: Any) -> None:
        """Finish the map of a call: of what the module really received, and with what backward will bring to its output."""
        call, gradient, recorded, awaited, _ = state
        recording = self._recording
        if recording.wanted.reduction is not None:
            self._end_reducing(state, args, kwargs, changed, output)
            return
        if recording.keep_maps is not None and isinstance(awaited, AwaitedMap):
            recording.keep_maps.end(awaited, (args, kwargs), output)
        if changed:
            call = recaptured(call, args, kwargs, detach=recording.wanted.detach)
            if recorded is not None:
                self._put_again(call, *recorded)
        if recording.wanted.verify and recorded is not None and output is not None and not self.is_preceded():
            m, forward = recorded
            forward.maps[m.name] = recording.compare(forward.maps[m.name], call, output)
        if gradient is not None:
            gradient.follow(call, output)

    def _record(self, name: str, forward: ForwardPass, args: Args, kwargs: Kwargs, given: Given | None = None) -> _Begun | None:
        recording, wanted = self._recording, self._recording.wanted
        keep_maps = recording.keep_maps if given is None else recording.in_graphs
        changes = self.is_followed()
        call = capture(self._layer, args, kwargs, detach=wanted.detach, sampled=self._sampled)
        gradient = recording.gradient_of(name, forward) if wanted.gradients else None
        site = None if recording.origins is None else recording.site_of(args, kwargs)
        m = forward.maps[name] = recording.map_of(call, name, forward, site, gradient)
        if wanted.reduction is not None:
            return self._begin_reducing(m, forward, given)
        awaited = None
        # What cannot wait for the module is computed before it runs: in train mode its projections draw other random numbers
        # than a recipe's, and hooks that come later may change what it is called with.
        watched = True not in call.modes.training or find_recipe(self.module) is None
        if keep_maps is not None and not changes and watched:
            awaited = keep_maps.begin(call, m, partial(forward.maps.__setitem__, name), given)
        elif wanted.maps:
            forward.maps[name] = recording.compute(m)
        if gradient is None and awaited is None and not (changes or wanted.verify):  # the usual call: nothing is held on to
            return None
        return _Begun(call, gradient, (m, forward), awaited)

    def _begin_reducing(self, m: AttentionMap, forward: ForwardPass, given: Given | None = None) -> _Begun | None:
        """Reduce a map before its module runs, or look at its call again when it ends: once, of what the module received."""
        call, recording, changes = m.call, self._recording, self.is_followed()
        keep_maps = recording.keep_maps if given is None else recording.in_graphs
        reduction, watch, awaited = recording.wanted.reduction, None, None
        if keep_maps is not None and reduction is not None and not changes:
            if not is_described(call):
                watch = keep_maps.watch() if given is None else None
            elif True not in call.modes.training:  # else its projections draw other random numbers than a recipe's
                awaited = await_reduction(m, forward.maps, reduction, keep_maps.listener, given)
        if changes or watch is not None or awaited is not None:
            return _Begun(call, None, (m, forward), awaited, watch)
        if forward.maps[m.name] is m:  # it needs nothing that is still to come
            forward.maps[m.name] = recording.compute(m)
        return None

    def _end_reducing(self, state: _Begun, args: Args, kwargs: Kwargs, changed: bool, output: Any) -> None:
        assert state.m is not None
        (m, forward), recording = state.m, self._recording
        if recording.keep_maps is not None and state.watch is not None:
            recording.keep_maps.leave(state.watch, (args, kwargs), output)
        if output is None or forward.maps.get(m.name) is not m:  # it raised; or somebody has asked meanwhile
            return
        if changed:
            call = recaptured(state.call, args, kwargs, detach=recording.wanted.detach)
            m = recording.map_of(call, m.name, forward, m._called_from, None)
        m = forward.maps[m.name] = read_after_call(m, state.watch)
        forward.maps[m.name] = recording.compute(m)

    def _put_again(self, call: Call, m: AttentionMap, forward: ForwardPass) -> None:
        """Put the map of what the module received in place of the one of what our hook saw before others changed it."""
        again = self._recording.map_of(call, m.name, forward, m._called_from, m._gradient)
        forward.maps[m.name] = self._recording.compute(again)

    def _follow_recomputed(self, args: Args, kwargs: Kwargs) -> _Begun | None:
        """Follow a call that is not recorded, for checkpoints: save what forward and backward both must, find its gradient."""
        recording, wanted = self._recording, self._recording.wanted
        saves, follows = wanted.maps and not wanted.detach, wanted.gradients and in_backward()
        if not saves and not follows:
            return None
        call = capture(self._layer, args, kwargs, detach=wanted.detach)
        # A checkpoint holds what is saved now against what was, by number and shape. With keep="maps", detach=False the map was
        # computed in the forward too, so it is computed again and thrown away; likewise in forwards of other threads, which are
        # not recorded: when backward runs their checkpoints again, in any thread, it cannot be told whose they are.
        if saves and wanted.reduction is not None:
            again = ForwardPass()
            again.maps[self._layer.name] = m = recording.map_of(call, self._layer.name, again, None, None)
            return self._begin_reducing(m, again)
        if saves:
            recording.map_of(call, self._layer.name, ForwardPass(), None, None).computed()
        if not follows:
            return None
        gradient = match_recomputed(recording.passes.gradients_of(self._layer.name), call)
        return None if gradient is None else _Begun(call, gradient)
