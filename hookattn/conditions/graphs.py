"""Compiled models that stay compiled: an operator in their graphs calls a hook with what its module is given."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Iterable
from functools import cache, partial
from itertools import count
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..errors import UnreadableError

Args = tuple[Any, ...]
Kwargs = dict[str, Any]


class GraphsWithHooks:
    """A backend of torch.compile: Inductor, with the options that a model was compiled with.

    PyTorch keeps graphs by their backend, so one of these is used for graphs that have the operators in them: the model's own
    graphs stay what they are, and both are found again. CUDA graphs, which replay kernels and no Python, are left out.

    Args:
        inductor: the backend of the model's own graphs.
    """

    def __init__(self, inductor: Any) -> None:
        self._inductor = copy.copy(inductor)
        self._inductor.config = {**inductor.config, "triton.cudagraphs": False}

    def __call__(self, graph: Any, inputs: Any, **options: Any) -> Any:
        """Compile a graph."""
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


def backend_for(model: nn.Module, inductor: Any, layers: Iterable[str]) -> GraphsWithHooks | None:
    """The one backend for graphs of a model that call hooks of these layers, and no others; None if it has enough of them."""
    of_model = _backends.setdefault(model, [])
    wanted = inductor, frozenset(layers)
    for inductor_and_layers, backend in of_model:
        if inductor_and_layers == wanted:
            return backend
    if len(of_model) == _CHOICES:
        return None
    of_model.append((wanted, GraphsWithHooks(inductor)))
    return of_model[-1][1]


# The operator

Arguments = Callable[..., tuple[Args, Kwargs]]
"""Makes the arguments of a module, with None for what operators are not given, or `whole=True` and an UnreadableError; and
with `copied=True` of copies."""
_hooks: dict[int, Callable[[Arguments], object]] = {}
_count = count()
_library: list[torch.library.Library] = []  # is filled with the first that is needed
# What operators say they write into: graphs would do without them otherwise, and in any order, since nothing comes out of them.
_order = torch.empty(0, device="cpu")


def ticket_for(hook: Callable[[Arguments], object]) -> Tensor:
    """What an operator is given to call a hook: a number, in a tensor, so that modules of a kind share a graph."""
    global _order
    with torch.inference_mode(False):  # for graphs that run outside of it, too, where its tensors are not to be written into
        ticket = torch.tensor(number := next(_count), device="cpu")
        if not _library:
            _order = torch.zeros(1, device="cpu")
    if not _library:
        library: Any = torch.library.Library("hookattn", "FRAGMENT")  # type: ignore[no-untyped-call]
        library.define("call_hook(Tensor(a!) order, Tensor ticket, Tensor[] given, str arguments, str autocast) -> ()")
        library.impl("call_hook", _call_hook, "CompositeExplicitAutograd")
        torch.library.register_fake("hookattn::call_hook", lambda *_: None, lib=library)
        _library.append(library)
    _hooks[number] = hook
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
    torch.ops.hookattn.call_hook(_order, ticket, given, arguments, autocast)


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


def _call_hook(order: Tensor, ticket: Tensor, given: list[Tensor], arguments: str, autocast: str) -> None:
    if (hook := _hooks.get(int(ticket))) is None:
        return
    if not autocast:
        hook(partial(_made, arguments, given))
        return
    device, _dot, dtype = autocast.partition(" torch.")
    with torch.autocast(device, getattr(torch, dtype)):
        hook(partial(_made, arguments, given))


def _made(arguments: str, given: list[Tensor], copied: bool = False, whole: bool = False) -> tuple[Args, Kwargs]:
    if copied:  # once, so that what was one tensor is one
        copies = {id(each): each.clone() for each in given}
        given = [copies[id(each)] for each in given]
    found: tuple[Args, Kwargs] = _maker(arguments)(iter(given).__next__, _refuse if whole else _leave_out)
    return found


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
