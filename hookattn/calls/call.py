"""A captured call: what an attention module was called with, under which modes, and whether all of it is still there."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack
from contextvars import Token
from operator import itemgetter
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..conditions.autocast import Autocast, autocast_now
from ..conditions.changes import stamps
from ..conditions.function_modes import modes_in_force, modes_resumed
from ..conditions.samples import NOT_LOOKED_AT, Doubts, Values
from ..conditions.sharding import gathers, is_freed, is_spread
from ..conditions.training import RandomStreams, random_streams
from ..conditions.transforms import is_left_behind
from ..errors import StaleMapError, UnreadableError
from .arguments import keep_arguments, tensors_in
from .layer import Held, Layer, look_up, name_changes, stamps_of, values_of
from .restore import copied, in_place, reading, training_flags
from .staleness import structure_of

_BARE = frozenset({Tensor, nn.Parameter})
_TRAINING = itemgetter("training")
_is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor  # undocumented, torch 2.6 to 2.15: of a torch.func transform


class Modes(NamedTuple):
    """Settings that a call was made under, on which its outcome depends besides its arguments.

    Attributes:
        grad: whether operations are recorded for autograd.
        autocast: of the device of the first argument.
        training: the training flags of the module and all below it.
        random: where the random streams were, if one of them is in train mode.
        functions: function modes of the user's.
        sdpa: what `F.scaled_dot_product_attention` was.
    """

    grad: bool
    autocast: Autocast | None
    training: list[bool]
    random: RandomStreams | None
    functions: tuple[TorchFunctionMode, ...]
    sdpa: object


class Call(NamedTuple):
    """One call of one attention module, as it is kept until its map is read.

    Attributes:
        layer: the module and where it stands.
        args, kwargs: what `forward` received. Tensors are the module's own, cut off from the graph unless asked otherwise.
        tensors: those among the arguments.
        names: of the parameters and buffers the call reads.
        state: these parameters and buffers.
        held: what the caches and the moving buffers of the module held, each with the dict and the key it hangs at.
        stamps: what tells a change, see `stamps_of`.
    """

    layer: Layer
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    modes: Modes
    tensors: tuple[Tensor, ...]
    names: tuple[str, ...]
    state: tuple[Tensor, ...]
    held: Held
    stamps: tuple[Any, ...]

    @property
    def x(self) -> Tensor:
        """The first argument of the module's `forward`, or the first tensor among the arguments where that is none.

        Raises:
            UnreadableError: there is no tensor among them.
        """
        first = next(iter(inspect.signature(self.layer.module.forward).parameters), "")
        x = self.args[0] if self.args else self.kwargs.get(first)
        if isinstance(x, Tensor):
            return x
        if not self.tensors:
            raise UnreadableError(f"{self.layer.name!r} was called without a tensor; what it was called with is m.call.")
        return self.tensors[0]

    def resumed(self) -> AbstractContextManager[None]:
        """Set everything as it was in the call, to read its map, and set it back when the block ends.

        Raises:
            StaleMapError: an argument or a parameter has changed since the call; where a device tells it, when the block ends.
        """
        # What a device tells is looked at when the block ends: so a map is made while the device still runs the model.
        return _Resumed(self, self.check_soon())

    def is_in_its_modes(self) -> bool:
        """Whether all is set as it was in the call, so that nothing has to be set to read its map."""
        return next(self._to_be_set(), None) is None

    def in_its_modes(self) -> AbstractContextManager[None]:
        """As `resumed`, without a look at what has changed since: for a call that is about to run or has just run."""
        return _Resumed(self)

    def _to_be_set(self) -> Iterator[AbstractContextManager[Any]]:
        """What is not as it was in the call, one after the other, the later ones asked for when the earlier are set."""
        modes, layer = self.modes, self.layer
        if torch.is_grad_enabled() is not modes.grad:
            yield torch.enable_grad() if modes.grad else torch.no_grad()  # `set_grad_enabled` would set it right now
        if modes.autocast is not None and (modes.autocast.enabled or torch._C._is_any_autocast_enabled()):
            device, enabled, dtype, cached = modes.autocast
            # Autocast keeps the parameters it has cast for whoever comes next, in or out of this block: one that was cast
            # without grad has no graph, and the forward that is going on outside would train nothing through it.
            cached = cached and modes.grad
            yield torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=cached)
        if modes.functions or torch._C._len_torch_function_stack():
            yield modes_resumed(modes.functions)
        if [*map(_TRAINING, layer.attributes)] != modes.training:
            yield training_flags(layer.inner, modes.training)
        if not layer.is_as_it_was():
            yield in_place(layer.slots)
        if self.held is not layer.caches or layer.mutable_now(in_eval=True) is not layer.caches:
            # copies of copies: what runs may fill a cache, and a map may be read more than once
            yield in_place([(holder, key, copied(value)) for holder, key, value in self.held])

    def restore_random_streams(self) -> None:
        """Set the random streams to where they were when the call began, if it was in train mode; dropout is then the same."""
        if self.modes.random is not None:
            self.modes.random.restore()

    def check_fresh(self) -> None:
        """Raise StaleMapError if what the map would be computed from has changed, UnreadableError if it is not to be had."""
        if self._is_plainly_fresh():
            return
        self.check_at_hand()  # before stamps, which look at values: those of a freed parameter must not be looked at
        with torch._C.DisableTorchFunction():
            now = stamps_of(self.layer, self.tensors, self.state, self.held, self.stamps[2][1] is not NOT_LOOKED_AT)
        if now != self.stamps:
            names = [f"argument {i}" if i else "x" for i in range(len(self.tensors))]
            changed = name_changes([*names, *map(repr, self.names)], self.stamps, now)
            self._raise_stale(f"{', '.join(changed[:4])} changed in place after the forward")
        if F.scaled_dot_product_attention is not self.modes.sdpa:
            self._raise_stale("torch.nn.functional.scaled_dot_product_attention was replaced after the forward")
        if self.layer.has_changed(self.held):
            self._raise_stale("a layer, a forward or a number inside the module was replaced after the forward")

    def check_soon(self) -> Doubts | None:
        """As `check_fresh`, but nobody waits for a device: what is not known yet is given back."""
        _, given, (_, seen), *_ = self.stamps
        if seen is None and Values not in map(type, given):  # no values that lie on a device
            self.check_fresh()
            return None
        with Doubts() as doubts:
            self.check_fresh()
        return doubts

    def _is_plainly_fresh(self) -> bool:
        """Whether nothing has changed and all is at hand; False where that takes a closer look."""
        layer, read = self.layer, (*self.tensors, *self.state)
        if not {*map(type, read)} <= _BARE:
            return False
        # Memory is looked at only of tensors that lie where they lay: what was given back to the system lies nowhere.
        if torch._C._len_torch_function_stack() or any(map(_is_wrapped, read)) or stamps(read, layer.steps) != self.stamps[0]:
            return False
        if self.held is not layer.caches or [*map(type, layer.inner)] != layer.classes or gathers(layer.classes):
            return False
        sampled = self.stamps[2][1] is not NOT_LOOKED_AT
        is_same = values_of(layer, self.tensors, self.stamps[0], self.held, sampled) == self.stamps[1:]
        return is_same and F.scaled_dot_product_attention is self.modes.sdpa and not layer.has_changed(self.held)

    def restamped(self) -> Call:
        """The call with parameters and structure as they are now, for reading it right after its forward or in backward.

        By then FSDP has written the parameters anew, and the forward may have counted its calls, neither of which makes the
        map another one; the user has had no say in between. Arguments are still compared with what they were.
        """
        (read, *rest), layer, given = self.stamps, self.layer, len(self.tensors)
        if layer.has_changed(self.held):
            layer = layer._replace(structure=structure_of(layer.inner, self.held))
        now = [[*before[:given], *after] for before, after in zip(read, stamps(self.state, layer.steps))]
        return self._replace(stamps=(tuple(now), *rest), layer=layer)

    def check_at_hand(self) -> None:
        """Raise StaleMapError or UnreadableError if values that the call reads are gone or elsewhere; looks at none of them."""
        read = (*self.tensors, *self.state)
        if self.held is not self.layer.caches:
            read = (*read, *tensors_in([value for _, _, value in self.held]))
        who = f"{self.layer.name!r} ({type(self.layer.module).__name__})"
        if any(map(_is_wrapped, read)) and any(map(is_left_behind, read)):
            raise UnreadableError(
                f"{who} ran under torch.vmap, and what it was called with is gone with it. Open the recorder inside "
                "what is mapped, and return from there what is read: m[...]."
            )
        # [1:], since the attention module itself may gather: we read from inside its call, or find its parameters freed
        if is_spread(self.layer.inner[1:], read):
            raise UnreadableError(
                f"what {who} reads is spread over several processes while it runs, and reading would wait for the others. Give "
                "FSDP the attention module or its block, not the layers inside; tensor-parallel attention is not read."
            )
        if any(map(is_freed, read)):
            self._raise_stale("its parameters are sharded again, as FSDP does when the forward has left them")

    def _raise_stale(self, what: str) -> None:
        raise StaleMapError(
            f"the map of {self.layer.name!r} ({type(self.layer.module).__name__}) is stale: {what}. Read it before that "
            'happens, or record with AttentionRecorder(model, keep="maps").'
        )


class _Resumed:
    """A block in which everything is as it was in a call; nothing is set that is so already."""

    # A class, since this is around each reading and a generator costs several times as much.

    def __init__(self, call: Call, doubts: Doubts | None = None) -> None:
        self._call, self._doubts = call, doubts
        self._set: ExitStack | None = None
        self._before: Token[bool] | None = None

    def __enter__(self) -> None:
        self._before = reading.set(True)  # first on, last off: hooks of ours see no forward in between
        try:
            for each in self._call._to_be_set():
                self._set = self._set or ExitStack()
                self._set.enter_context(each)
        except BaseException:
            self.__exit__(None, None, None)
            raise

    def __exit__(self, *error: Any) -> None:
        try:
            if self._set is not None:
                self._set.__exit__(*error)
        finally:
            assert self._before is not None
            reading.reset(self._before)
        if self._doubts is not None and error[0] is None and self._doubts.have_come_true():
            self._call.check_fresh()


def capture(layer: Layer, args: tuple[Any, ...], kwargs: dict[str, Any], *, detach: bool, sampled: bool = True) -> Call:
    """Keep a call that is about to be made: its arguments, without a copy, and what it takes to resume it later.

    Args:
        layer: that is called.
        args, kwargs: what with.
        detach: cut arguments off from the graph.
        sampled: look at values of parameters where it takes a kernel, too: not for a call that is read while it is made.
    """
    # The path of every recorded call: no operator of torch is called and no tensor made, but to detach or in train mode.
    (args, kwargs), tensors = keep_arguments(args, kwargs, detach=detach)
    if not layer.is_as_it_was():  # somebody has swapped tensors, wrapped layers or set numbers of the module
        layer = look_up(*layer[:4])
    training = [*map(_TRAINING, layer.attributes)]
    in_eval = True not in training
    names, state = (layer.all_state, layer.all_tensors) if in_eval else layer.state_in_training()
    held = layer.mutable_now(in_eval=in_eval)
    functions: tuple[TorchFunctionMode, ...] = ()
    if not torch._C._len_torch_function_stack():  # undocumented, torch 2.6 to 2.15
        stamped = stamps_of(layer, tensors, state, held, sampled)
    else:
        with torch._C.DisableTorchFunction():  # modes of the user's see nothing of it
            stamped = stamps_of(layer, tensors, state, held, sampled)
        functions = modes_in_force()
    autocast = random = None
    if tensors:
        # `is_cpu`, since `device.type` makes an object and a string each time
        autocast = autocast_now("cpu" if (x := tensors[0]).is_cpu else x.device.type)
        random = None if in_eval else random_streams(x.device)
    grad, sdpa = torch.is_grad_enabled() and not detach, F.scaled_dot_product_attention
    modes = Modes(grad, autocast, training, random, functions, sdpa)
    return Call(layer, args, kwargs, modes, tensors, names, state, held, stamped)


def recaptured(call: Call, args: tuple[Any, ...], kwargs: dict[str, Any], *, detach: bool) -> Call:
    """A call kept anew with the arguments that hooks after ours have made of them, in the modes that it began in."""
    # by now the module has run: random streams have moved on, and are to be those from before
    return capture(call.layer, args, kwargs, detach=detach)._replace(modes=call.modes)
