"""Gradients of attention maps with the fused kernel on: what backward brings to a module's output, carried on to its map."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .calls import Call
from .checkpoints import checkpoint_around
from .errors import NoGradientError, StaleMapError, UnreadableError
from .folding import interleaved, over_keys, unfolded, who
from .functional import Formed, Outer, Slope
from .indexing import split_index
from .modes import SDPA, MapMode, input_and_dim, sdpa_arguments
from .replay import run_under

_FEW = 256


class Backwards:
    """The last backward that reached the modules of one forward.

    Attributes:
        last: its number; -1 if there was none.
    """

    def __init__(self) -> None:
        self.last = -1
        self._inside: dict[int, int] = {}

    def arrive(self, checkpoint: int) -> int:
        """Note the backward that runs now and give its number; that of a reentrant checkpoint counts as the one around it."""
        task = torch._C._current_graph_task_id()
        if checkpoint != -1:
            self._inside[task] = self._inside.get(checkpoint, checkpoint)
        self.last = self._inside.get(task, task)
        return self.last


class Gradient:
    """dL/dA: the gradient of what backward was last called on with respect to one map, (batch, head, query, key).

    It is sliced like the map it belongs to, and is what autograd gives for the map on the unfused path: the map of this call is
    taken for the variable, whatever it was computed from, and its gradient is what reaches it through the output of the module
    (a loss made of `m[...]` itself is not in it). Where the module calls `scaled_dot_product_attention`, dL/dA is
    dL/d(A v) v^T, and a row is read without the others. It is float32 (float64 for a float64 model) and part of no graph.

    Args:
        name: name of the map.
        deliver: what brings slices to the device and dtype asked for.
        backwards: of the forward it belongs to.
        at_once: whether it is computed during backward, so that the input can be let go.
    """

    def __init__(self, name: str, deliver: Callable[[Tensor], Tensor], backwards: Backwards, *, at_once: bool) -> None:
        self.name, self._deliver, self._backwards, self._at_once = name, deliver, backwards, at_once
        self._call: Call | None = None
        self._whole: Tensor | None = None
        self._received: dict[int, Tensor] = {}
        self._backward, self._created_graph = -1, False
        self._lost, self._none = "", ""
        self._fingerprint: bytes | None = None

    def __getitem__(self, index: Any) -> Tensor:
        if self._whole is not None and not self._missing():
            return self._whole[index]
        slope = self._slope()
        picks, rest = split_index(index, slope.shape)
        return self._deliver(slope.narrow(*picks).gradient()[rest])

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(batch, heads, queries, keys)."""
        return self._slope().shape if self._whole is None else Formed(self._whole).shape

    def __repr__(self) -> str:
        state = "arrived" if self._received or self._whole is not None else "not arrived"
        return f"Gradient({self.name!r}, {state})"

    def follow(self, call: Call, output: Any) -> None:
        """Take what every backward to come brings to the output of a call."""
        leaves = {i: t for i, t in enumerate(pytree.tree_leaves(output)) if isinstance(t, Tensor)}
        outputs = {i: t for i, t in leaves.items() if t.requires_grad}
        self._none = "" if outputs else _NO_GRAPH if leaves else _NO_TENSOR
        checkpoint = torch._C._current_graph_task_id()
        if checkpoint == -1 and not outputs and (around := checkpoint_around()) is not None:
            self._fingerprint = fingerprint(call, around)
        if not self._at_once:
            self._call = call
        me, kept = weakref.ref(self), call if self._at_once else None  # what it takes to compute lives as long as the graph

        def receive(place: int, grad: Tensor) -> None:
            if (gradient := me()) is not None:
                gradient._receive(place, grad, kept, checkpoint)

        for place, tensor in outputs.items():
            tensor.register_hook(partial(receive, place))  # type: ignore[no-untyped-call]

    def waits_for(self, made_again: bytes) -> bool:
        """Whether this is the gradient of a call that was made without a graph and has this fingerprint."""
        return self._fingerprint == made_again

    def refuse(self, reason: str) -> None:
        """Say why there will be no gradient."""
        self._lost = f"{self.name!r}: {reason}"

    def _receive(self, place: int, grad: Tensor, call: Call | None, checkpoint: int) -> None:
        backward = self._backwards.arrive(checkpoint)
        if backward != self._backward:
            if self._created_graph:
                self.refuse(_SECOND_ORDER)
            self._backward, self._received = backward, {}
        self._created_graph = self._created_graph or torch.is_grad_enabled()
        self._received[place] = grad.detach()
        if call is not None:
            self._whole = None
            try:
                self._whole = self._deliver(slope_of(call.renewed(), self._received).gradient())
            except (UnreadableError, StaleMapError) as reason:  # backward goes on
                self.refuse(f"its gradient could not be computed during backward: {reason}")

    def _slope(self) -> Slope:
        missing = self._missing()
        if missing or self._call is None:
            raise NoGradientError(missing)
        return slope_of(self._call, self._received)

    def _missing(self) -> str:
        """Why there is no gradient, or nothing if there is one.

        Raises:
            UnreadableError: there is one that cannot be computed.
        """
        if self._lost:
            raise UnreadableError(self._lost)
        if not self._received:
            return f"no gradient has reached {self.name!r}. {self._none or _NO_BACKWARD}"
        if self._backward != self._backwards.last:
            return f"the last backward did not reach {self.name!r}; what an earlier one brought is to be read before the next."
        return ""


_NO_BACKWARD = (
    "Call backward on something that depends on the output of the model, such as logits[:, c].sum().backward(). (Nothing "
    "arrives where the module returns a view that is written into later.)"
)
_NO_GRAPH = (
    "Its output was computed without a graph: call the model without torch.no_grad(), let the images require grad "
    "(images.requires_grad_()) if parameters are frozen, and call backward inside the block if activations are checkpointed."
)
_NO_TENSOR = "It returned no tensor, tuple, list or dict of tensors, which could be followed."
_SECOND_ORDER = (
    "an earlier backward was called with create_graph=True, and what a later one brings through that graph cannot be seen. "
    "Read the gradient before it, or record another forward."
)
_AMBIGUOUS = (
    "it was called with the same input more than once in one reentrant checkpoint, and which call backward has come to cannot "
    "be told. Checkpoint with use_reentrant=False."
)


def fingerprint(call: Call, checkpoint: int) -> bytes:
    """A checkpoint and some values of what a call in it was made with, by which it is known when it is made again."""
    values = call.tensors[0].detach().reshape(-1) if call.tensors else torch.empty(0)
    few = values[:: max(1, values.numel() // _FEW - 1 | 1)].contiguous()
    return str((checkpoint, *values.shape)).encode() + bytes(few.view(torch.uint8).tolist())


def made_again(forwards: Iterable[Iterable[Gradient]], call: Call) -> Gradient | None:
    """The gradient of the call that a checkpoint makes again, out of those of one module; None if it is none of them.

    Args:
        forwards: the gradients of each forward, the last one first: a checkpoint of before may have had the same number.
        call: as it is made again.
    """
    if (around := checkpoint_around()) is None:
        return None
    again = fingerprint(call, around)
    waiting = next((found for each in forwards if (found := [g for g in each if g.waits_for(again)])), [])
    if len(waiting) == 1:
        return waiting[0]
    for gradient in waiting:
        gradient.refuse(_AMBIGUOUS)
    return None


def slope_of(call: Call, received: Mapping[int, Tensor]) -> Slope:
    """What the gradient of a map is made of: the forward of the module is run again from its map on, and then backward.

    Args:
        call: the captured call.
        received: gradients of its outputs, by their place among the leaves of what the forward returns.

    Raises:
        UnreadableError: the module forms its map in a kernel of its own, drops out parts of it inside the fused kernel, or does
            not return all that it returned.
        StaleMapError: an input or a parameter has changed since the forward.
    """
    module = call.target.module
    with call.resumed(), torch.enable_grad():
        output, run = run_under(call, _Variables(module, len(call.x)))
        outputs = pytree.tree_leaves(output)
        sites = run.fused_sites or run.softmax_sites
        if not sites or not all(isinstance(outputs[place], Tensor) for place in received):
            raise UnreadableError(
                f"{call.target.name!r}: {who(module)} forms no map by scaled_dot_product_attention or softmax that all of its "
                "output depends on, so there is no gradient to be had."
            )
        ends = [outputs[place] for place in received]
        grads = torch.autograd.grad(ends, [site.out for site in sites], list(received.values()), materialize_grads=True)
    slope: Slope = interleaved([site.slope(grad) for site, grad in zip(sites, grads)], module)
    return slope


class _Site(NamedTuple):
    """One place where a forward forms a map: what came out of it, and what makes dL/dA of dL/d(that)."""

    out: Tensor
    slope: Callable[[Tensor], Slope]  # holds nothing that holds the sites: tensors must not wait for the garbage collector


class _Variables(MapMode):
    """Takes what SDPA and softmax put out for the variables that the output is a function of."""

    def __init__(self, module: nn.Module, batch: int) -> None:
        super().__init__(module)
        self.batch = batch
        self.fused_sites: list[_Site] = []
        self.softmax_sites: list[_Site] = []

    def fused(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        if sdpa_arguments(args, kwargs).get("dropout_p"):
            raise UnreadableError(
                f"{who(self.module)} drops out parts of its map inside the fused kernel, which does not tell which. For "
                "gradients of the map, set the dropout of attention to 0 (attn_drop_rate=0), or call the model in eval mode."
            )
        out: Tensor = SDPA(*args, **kwargs)
        value = sdpa_arguments(args, kwargs)["value"].detach()
        return self._site(self.fused_sites, out, partial(_outer, self.module, self.batch, value))

    def softmax(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        out: Tensor = func(*args, **kwargs)
        dim = input_and_dim(*args, **kwargs)[1]
        return self._site(self.softmax_sites, out, partial(_formed, self.module, self.batch, dim))

    def _site(self, sites: list[_Site], out: Tensor, slope: Callable[[Tensor], Slope]) -> Tensor:
        """Note a site; what comes after it may write into what it is given."""
        sites.append(_Site(out if out.requires_grad else out.requires_grad_(), slope))
        return out.clone()


def _outer(module: nn.Module, batch: int, value: Tensor, grad: Tensor) -> Outer:
    grad, value = unfolded(module, grad, batch), unfolded(module, value, batch)
    return Outer(grad, value.repeat_interleave(grad.shape[1] // value.shape[1], dim=1))


def _formed(module: nn.Module, batch: int, dim: int, grad: Tensor) -> Formed:
    return Formed(over_keys(module, batch, grad, dim))
