"""Gradients of attention maps with the fused kernel on: what backward brings to a module's output, carried on to its map."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge
from torch.utils import _pytree as pytree

from ..attention.sources import Dense, Source
from ..calls.call import Call
from ..calls.hooks import put_on
from ..calls.restore import is_reading
from ..conditions.checkpoints import checkpoint_around, fingerprint
from ..conditions.dispatch_modes import unseen_by_modes
from ..errors import HookattnError, NoGradientError, UnreadableError
from ..recipes.registry import qualified_name
from .arrangement import Arrangement
from .established import NameInErrors, TellWhy, arrange
from .lazy import Delivery, LazyArray
from .replay import run_under
from .sites import Variables


class Backwards:
    """The last backward that reached the modules of one forward: its number, or -1 if there was none."""

    def __init__(self) -> None:
        self.last = -1
        self._inside: dict[int, int] = {}

    def arrive(self, checkpoint: int) -> int:
        """Note the backward that runs now and give its number; that of a reentrant checkpoint counts as the one around it."""
        # Undocumented, torch 2.6 to 2.15: a number of its own for each backward, -1 outside of any. A reentrant checkpoint
        # calls backward within backward, which has another number.
        task = torch._C._current_graph_task_id()
        if checkpoint != -1:
            self._inside[task] = self._inside.get(checkpoint, checkpoint)
        self.last = self._inside.get(task, task)
        return self.last


class Gradient(LazyArray):
    """dL/dA: the gradient of what backward was last called on with respect to one map, (batch, head, query, key).

    It is sliced like the map it belongs to, and is what autograd gives for the map on the unfused path: the map of this call is
    taken for the variable, whatever it was computed from, and its gradient is what reaches it through the output of the module
    (a loss made of `m[...]` itself is not in it). Where the module calls `scaled_dot_product_attention`, dL/dA is
    dL/d(A v) v^T, and a row is read without the others. It is float32 (float64 for a float64 model) and part of no graph.

    Args:
        backwards: of the forward it belongs to.
        in_backward: whether it is computed during backward, so that the input can be let go.
    """

    def __init__(self, name: str, deliver: Delivery, backwards: Backwards, *, in_backward: bool) -> None:
        super().__init__(name, deliver)
        self._backwards, self._in_backward = backwards, in_backward
        self._call: Call | None = None
        self._whole: Tensor | None = None
        # what a backward has brought, by the place of the output among the leaves of what the module returned
        self._received: dict[int, Tensor] = {}
        self._backward, self._created_graph = -1, False
        self._lost, self._none = "", ""
        self._copied: HookattnError | None = None  # why there was none to be copied
        self._fingerprint: bytes | None = None

    @contextmanager
    def open(self) -> Iterator[Source]:
        """What the gradient is computed from, for as long as the block lasts.

        Raises:
            NoGradientError: no backward has reached this map.
            UnreadableError: one has, and what it brought cannot be carried on to the map.
        """
        missing = self._missing()
        if self._whole is not None and not missing:
            yield Dense(self._whole)
        elif missing or self._call is None:
            raise NoGradientError(missing)
        else:
            with TellWhy(self.name):
                slope = slope_of(self._call, self._received)
            yield slope

    def __repr__(self) -> str:
        state = "arrived" if self._received or self._whole is not None else "not arrived"
        return f"Gradient({self.name!r}, {state})"

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled, copied and saved as what has arrived, or why nothing has."""
        try:
            return _arrived, (self.name, self._deliver, self[...])
        except HookattnError as error:
            return _arrived, (self.name, self._deliver, None, str(error), type(error))

    def follow(self, call: Call, output: Any) -> None:
        """Put hooks on the output of a call, which take what every backward to come brings to it."""
        leaves = {i: t for i, t in enumerate(pytree.tree_leaves(output)) if isinstance(t, Tensor)}
        # a leaf of the graph is a parameter or an input that is handed on: no map is in it, and a hook on it would stay
        outputs = {i: t for i, t in leaves.items() if t.requires_grad and not t.is_leaf}
        self._none = "" if outputs else _NO_GRAPH if leaves else _NO_TENSOR
        recomputed_in = torch._C._current_graph_task_id()  # the backward in which a checkpoint makes the call again, or -1
        # A reentrant checkpoint runs its forward without a graph. What backward will bring comes to the outputs of the call
        # that it makes again, which is known by the fingerprint.
        if recomputed_in == -1 and not outputs and (around := checkpoint_around()) is not None:
            self._fingerprint = fingerprint(call.tensors, around)
        if not self._in_backward:
            self._call = call
        # Hooks live as long as the graph. They must not keep the map; with keep="maps" they are what keeps the call until then.
        me, kept = weakref.ref(self), call if self._in_backward else None

        def receive(place: int, grad: Tensor) -> None:
            if (gradient := me()) is None or is_reading():  # the module runs again, from this very tensor
                return
            with unseen_by_modes():
                gradient._receive(place, grad, kept, recomputed_in)

        for place, tensor in outputs.items():
            put_on(tensor.register_hook, partial(receive, place))

    def matches(self, made_again: bytes) -> bool:
        """Whether this is the gradient of a call in a reentrant checkpoint that has this fingerprint."""
        return self._fingerprint == made_again

    def refuse(self, reason: str) -> None:
        """Say why there will be no gradient, when it is read."""
        self._lost = f"{self.name!r}: {reason}"

    def _receive(self, place: int, grad: Tensor, call: Call | None, checkpoint: int) -> None:
        backward = self._backwards.arrive(checkpoint)
        if backward != self._backward:
            # Through the graph of an earlier backward, a later one reaches the map by roads that pass no output of the module.
            if self._created_graph:
                self.refuse(_SECOND_ORDER)
            self._backward, self._received = backward, {}  # of the last backward alone, not added up as in `.grad`
        self._created_graph = self._created_graph or torch.is_grad_enabled()
        self._received[place] = grad.detach()
        if call is not None:
            self._whole = None
            try:
                self._whole = self._deliver(slope_of(call.restamped(), self._received).values())
            except Exception as reason:  # kept for the reader, whatever it is: backward is the user's, and goes on
                self.refuse(f"its gradient could not be computed during backward: {reason}")

    def _missing(self) -> str:
        """Why there is no gradient, or nothing if there is one; raises if there is one that cannot be computed."""
        if self._copied is not None:
            raise type(self._copied)(str(self._copied))  # another each time: one that was raised keeps what was called
        if self._lost:
            raise UnreadableError(self._lost)
        if not self._received:
            return f"no gradient has reached {self.name!r}. {self._none or _NO_BACKWARD}"
        if self._backward != self._backwards.last:
            return f"the last backward did not reach {self.name!r}; what an earlier one brought is to be read before the next."
        return ""


def _arrived(
    name: str, deliver: Delivery, whole: Tensor | None, reason: str = "", kind: type[HookattnError] = UnreadableError
) -> Gradient:
    """A gradient that was saved, or why there was none."""
    gradient = Gradient(name, deliver, Backwards(), in_backward=True)
    gradient._whole = whole
    if whole is None:
        gradient._copied = kind(reason)
    else:
        gradient._received = {0: whole}
    return gradient


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
_CUT_OFF = (
    "no gradient comes from its output to its map, which the module forms without a graph (detach(), torch.no_grad(), or an "
    "autograd function of its own): it would seem to be zero."
)
_RANDOM = (
    "its forward draws random numbers though it is not in train mode, so it does another thing when it runs again, and there "
    "is no gradient to be had."
)


def _from_outside(outputs: list[Tensor], received: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs of a run, each once, and of what backward brought to them that which came from outside of the module.

    A module may return its map beside what it made of it. What reaches the map then includes what came through the other, which
    the run is going to carry back once more.
    """
    once = {id(output): (output, grad) for output, grad in zip(outputs, received)}
    ends, brought = [output for output, _ in once.values()], [grad for _, grad in once.values()]
    feeds = [[j for j, other in enumerate(ends) if i != j and _is_made_of(other, end)] for i, end in enumerate(ends)]
    for i in sorted(range(len(ends)), key=lambda i: len(feeds[i])):  # what feeds another comes after it
        if feeds[i]:
            others = torch.autograd.grad(
                [ends[j] for j in feeds[i]], ends[i], [brought[j] for j in feeds[i]], retain_graph=True
            )
            brought[i] = brought[i] - others[0]
    return ends, brought


def _is_made_of(output: Tensor, other: Tensor) -> bool:
    nothing = torch.zeros_like(output)
    return torch.autograd.grad(output, other, nothing, retain_graph=True, allow_unused=True)[0] is not None


def _run_with_variables(call: Call, received: Mapping[int, Tensor]) -> tuple[dict[int, Tensor], Variables, Arrangement]:
    """The tensors among the leaves of what a forward returns when it runs with the map for the variable."""
    device = call.tensors[0].device if call.tensors else torch.device("cpu")
    for as_called in (False, True):  # PyTorch's own attention returns its weights too, if they were used
        output, run = run_under(call, Variables(device, as_called=as_called))
        arrangement = arrange(call, run)
        if any(part.operand is not None for part in arrangement.parts):
            output, run = run_under(call, Variables(device, arrangement.parts, as_called=as_called))
        outputs = {place: t for place, t in enumerate(pytree.tree_leaves(output)) if isinstance(t, Tensor)}
        if outputs.keys() >= received.keys():
            return outputs, run, arrangement
    name = qualified_name(type(call.layer.module))
    raise UnreadableError(f"{name} does not return what it returned, so there is no gradient to be had.")


def _lead_to(outputs: list[Tensor], variables: list[Tensor]) -> bool:
    """Whether backward from outputs comes by one of the variables: what a module detaches would seem to have no influence."""
    sought, seen = {get_gradient_edge(variable).node for variable in variables}, set[Node]()
    nodes = [output.grad_fn for output in outputs]
    while nodes:
        node = nodes.pop()
        if node in sought:
            return True
        if node is not None and node not in seen:
            seen.add(node)
            nodes += [before for before, _ in node.next_functions]
    return False


def slope_of(call: Call, received: Mapping[int, Tensor]) -> Source:
    """Carry gradients of a module's outputs on to its map: run its forward again, with the map for the variable, and backward.

    Args:
        received: gradients of the outputs, by their place among the leaves of what the forward returns.

    Raises:
        UnreadableError: the module forms its map in a kernel of its own, drops out parts of it inside the fused kernel, cuts
            it off from the graph, does not return all that it returned, or draws random numbers in eval mode.
        StaleMapError: an input or a parameter has changed since the forward.
    """
    with call.resumed(), torch.enable_grad(), NameInErrors(call):
        outputs, run, arrangement = _run_with_variables(call, received)
        places = [place for place in received if outputs[place].requires_grad]  # the others are inputs that are handed on
        if any(outputs[place].shape != received[place].shape for place in places) or (run.draws and not call.modes.random):
            raise UnreadableError(_RANDOM)
        variables = run.variables(arrangement)
        if not _lead_to([t for t in outputs.values() if t.requires_grad], variables):
            raise UnreadableError(_CUT_OFF)
        ends, brought = _from_outside([outputs[place] for place in places], [received[place] for place in places])
        # materialize_grads: an output need not depend on every map, and zero is then its gradient
        return run.slope(arrangement, list(torch.autograd.grad(ends, variables, brought, materialize_grads=True)))
