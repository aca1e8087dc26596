"""Compiled models that stay compiled: operators in their graphs hand to hooks what a module is given and projects."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import count
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule

from ..errors import UnreadableError

Args = tuple[Any, ...]
Kwargs = dict[str, Any]


class GraphsWithHooks:
    """A backend of torch.compile: Inductor, with the options that a model was compiled with.

    PyTorch keeps graphs by their backend, so one of these is used for graphs that have the operators in them: the model's own
    graphs stay what they are, and both are found again. CUDA graphs, which replay kernels and no Python, are left out.

    Args:
        inductor: the backend of the model's own graphs.
        hears: whether hooks are told of linear layers, too.
    """

    def __init__(self, inductor: Any, hears: bool) -> None:
        self._inductor, self._hears = copy.copy(inductor), hears
        self._inductor.config = {**inductor.config, "triton.cudagraphs": False}

    def __call__(self, graph: GraphModule, inputs: Any, **options: Any) -> Any:
        """Compile a graph."""
        if self._hears:
            _put_ears(graph)
        return self._inductor(graph, inputs, **options)


def compiled_with(modules: Iterable[nn.Module]) -> Any:
    """The backend that these modules were compiled with, Inductor; None where none is compiled, or not all with the same."""
    # Undocumented, torch 2.6 to 2.15: what torch.compile makes of a module has `dynamo_ctx`, and Module.compile sets the other.
    compiled = [m for m in modules if "dynamo_ctx" in m.__dict__ or "_compiled_call_impl" in m.__dict__]
    found = [_backend_of(m) for m in compiled if m.__dict__.get("_compiled_call_impl", m) is not None]
    # Undocumented: the backend's class. That of torch 2.6 hides behind other names, and its graphs do not outlive a hook.
    if not found or not all(isinstance(each, torch._TorchCompileInductorWrapper) for each in found):
        return None
    return found[0] if all(each == found[0] for each in found) else None


def _backend_of(module: nn.Module) -> Any:
    context = module.__dict__.get("dynamo_ctx")
    if context is None:
        backend = inspect.getclosurevars(module.__dict__["_compiled_call_impl"]).nonlocals.get("callback")
    else:
        backend = getattr(context, "callback", None)
    while (inner := getattr(backend, "_torchdynamo_orig_backend", None)) is not None:
        backend = inner
    return backend


_backends: WeakKeyDictionary[nn.Module, list[tuple[Any, GraphsWithHooks]]] = WeakKeyDictionary()
# PyTorch makes 8 graphs of a function, with all backends and for all sizes of images, and then no more, or it raises.
_CHOICES = 3


def backend_for(model: nn.Module, inductor: Any, layers: Iterable[str], hears: bool) -> GraphsWithHooks | None:
    """The one backend for graphs of a model that call hooks of these layers, and no others; None if it has enough of them."""
    of_model = _backends.setdefault(model, [])
    wanted = inductor, frozenset(layers), hears
    for made_for, backend in of_model:
        if made_for == wanted:
            return backend
    if len(of_model) == _CHOICES:
        return None
    of_model.append((wanted, GraphsWithHooks(inductor, hears)))
    return of_model[-1][1]


# The operators


@dataclass(frozen=True)
class Given:
    """What a graph has at hand where it calls a hook.

    Attributes:
        described: the arguments, as Python would have them written, with `tensor()` for each tensor.
        tensors: these, in that order.
        weights: of linear layers that the graph runs later on, of which the hook is told then.
        numbers: of the tensors that it runs these with.
    """

    described: str
    tensors: Sequence[Tensor]
    weights: Sequence[Tensor]
    numbers: Sequence[int]

    def copied(self) -> Given:
        """The same with copies, which the graph does not write into; what was one tensor is one."""
        copies = {id(each): each.clone() for each in self.tensors}
        return replace(self, tensors=[copies[id(each)] for each in self.tensors])

    def arguments(self, whole: bool = False) -> tuple[Args, Kwargs]:
        """Of the module, with None for what operators are not given; or, if they are to be whole, an UnreadableError."""
        found: tuple[Args, Kwargs] = _maker(self.described)(iter(self.tensors).__next__, _refuse if whole else _leave_out)
        return found


class LayerOutput(NamedTuple):
    """What a linear layer has put out in a graph, or a call of its function with these parameters.

    Attributes:
        number: of the tensor that it was run with, among those that the hook was given.
    """

    weight: Tensor
    bias: Tensor | None
    output: Tensor
    number: int


OnCall = Callable[[Given], object]
OnOutput = Callable[[LayerOutput], object]
_hooks: dict[int, tuple[OnCall, OnOutput | None]] = {}
_count = count()
_library: list[torch.library.Library] = []  # is filled with the first that is needed
# What operators say they write into: graphs would do without them otherwise, and in any order, since nothing comes out of them.
_order = torch.empty(0, device="cpu")


def ticket_for(call: OnCall, hear: OnOutput | None = None) -> Tensor:
    """What operators are given to call a hook: a number, in a tensor, so that modules of a kind share a graph."""
    global _order
    with torch.inference_mode(False):  # for graphs that run outside of it, too, where its tensors are not to be written into
        ticket = torch.tensor(number := next(_count), device="cpu")
        if not _library:
            _order = torch.zeros(1, device="cpu")
    if not _library:
        library: Any = torch.library.Library("hookattn", "FRAGMENT")  # type: ignore[no-untyped-call]
        for name, (takes, operator) in _OPERATORS.items():
            library.define(f"{name}(Tensor(a!) order, Tensor ticket, {takes}) -> ()")
            library.impl(name, operator, "CompositeExplicitAutograd")
            torch.library.register_fake(f"hookattn::{name}", lambda *_: None, lib=library)
        _library.append(library)
    _hooks[number] = call, hear
    return ticket


def give_back(ticket: Tensor) -> None:
    """Let operators with this ticket do nothing."""
    _hooks.pop(int(ticket), None)


def put_operator(ticket: Tensor, args: Args, kwargs: Kwargs) -> None:
    """Put the operator for a hook into the graph that is being compiled; runs nowhere else."""
    given: list[Tensor] = []
    arguments, autocast = _described((args, kwargs), given), ""
    # Graphs have in them what autocast does, and run with it off.
    if given and torch.is_autocast_enabled(device := given[0].device.type):
        autocast = f"{device} {torch.get_autocast_dtype(device)}"
    torch.ops.hookattn.call_hook(_order, ticket, given, arguments, autocast, [], [])


def _described(value: Any, given: list[Tensor]) -> str:
    """What arguments are, as Python would have it written, with `tensor()` for each of those that are put into the list."""
    if isinstance(value, Tensor):
        given.append(value)
        return "tensor()"
    kind = type(value)  # and not a class derived from it, which may be written in a way of its own
    if value is None or kind in (bool, int, float, str):
        return repr(value)
    if kind in (tuple, torch.Size):
        return "(" + "".join([_described(each, given) + "," for each in value]) + ")"
    if kind is list:
        return "[" + "".join([_described(each, given) + "," for each in value]) + "]"
    if kind is dict:
        return "{" + "".join([_described(key, given) + ":" + _described(value[key], given) + "," for key in value]) + "}"
    return f"unknown({kind.__name__!r})"


def _call_hook(
    order: Tensor,
    ticket: Tensor,
    given: list[Tensor],
    arguments: str,
    autocast: str,
    weights: list[Tensor],
    numbers: list[int],
) -> None:
    if (hook := _hooks.get(int(ticket))) is None:
        return
    call, _ = hook
    if not autocast:
        call(Given(arguments, given, weights, numbers))
        return
    device, _dot, dtype = autocast.partition(" torch.")
    with torch.autocast(device, getattr(torch, dtype)):
        call(Given(arguments, given, weights, numbers))


def _hear(order: Tensor, ticket: Tensor, weight: Tensor, bias: Tensor | None, output: Tensor, number: int) -> None:
    _, hear = _hooks.get(int(ticket), (None, None))
    if hear is not None:
        hear(LayerOutput(weight, bias, output, number))


_OPERATORS = {
    "call_hook": ("Tensor[] given, str arguments, str autocast, Tensor[] weights, int[] numbers", _call_hook),
    "hear": ("Tensor weight, Tensor? bias, Tensor output, int number", _hear),
}


def _put_ears(module: GraphModule) -> None:
    """Put operators into a graph that hand on what linear layers make of the very tensors that a hook is given."""
    graph, call_hook = module.graph, torch.ops.hookattn.call_hook
    at = {node: number for number, node in enumerate(graph.nodes)}
    hooks = [node for node in at if node.target in (call_hook, call_hook.default)]
    for hook in hooks:
        order, ticket, given, arguments, autocast = hook.args[:5]
        # up to the next call of the module, which may be given the same in another place
        end = min([at[each] for each in hooks if each.args[1] is ticket and at[each] > at[hook]], default=len(at))
        numbers = {x: given.index(x) for x in given}
        heard = [(node, *found, numbers[x]) for x in numbers for node in x.users if (found := _linear(node, x)) is not None]
        # parameters that are no inputs, as where weights are frozen, stand where they are used for the first time
        heard = [each for each in heard if at[hook] < at[each[0]] < end and at[each[1]] < at[hook]]
        hook.args = order, ticket, given, arguments, autocast, [each[1] for each in heard], [each[3] for each in heard]
        for node, weight, bias, number in heard:
            with graph.inserting_after(node):
                graph.call_function(torch.ops.hookattn.hear.default, (order, ticket, weight, bias, node, number))
    module.recompile()


def _linear(node: Any, x: Any) -> tuple[Any, Any] | None:
    """Weight and bias of a linear layer that is run with x; None where a node is something else, or makes them itself."""
    if node.target is not F.linear:
        return None
    of = dict(zip(("input", "weight", "bias"), node.args)) | node.kwargs
    weight, bias = of["weight"], of.get("bias")
    are_inputs = all(each.op in ("placeholder", "get_attr") for each in (weight, bias) if each is not None)
    return (weight, bias) if of["input"] is x and are_inputs else None


def _refuse(kind: str) -> None:
    raise UnreadableError(
        f"it was called with an argument of type {kind}, which a compiled graph does not hand on: record it eagerly, "
        'under torch.compiler.set_stance("force_eager") around the block of the recorder.'
    )


def _leave_out(_kind: str) -> None:
    return None


@cache
def _maker(arguments: str) -> Callable[[Callable[[], Tensor], Callable[[str], None]], Any]:
    """What makes arguments, as they are described, of two functions: one gives one tensor after the other, one the rest."""
    made: Callable[..., Any] = eval(f"lambda tensor, unknown: {arguments}", {"inf": math.inf, "nan": math.nan})
    return made
