"""Run a module's own forward again, watching or replacing the map it forms.

`replayed` reads every module that has no recipe: it runs the forward and takes from it queries, keys, mask and scale, scores,
or whatever else its map stands in, where evidence has found it. `run_with_map` is the same run with a given map in place of
the one that would have been formed.
"""

from __future__ import annotations

from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..attention.sources import Source
from ..calls.arguments import copy_structure, is_cache
from ..calls.call import Call
from ..calls.restore import restoring
from ..calls.staleness import Structure
from ..conditions.function_modes import lowest
from ..conditions.transforms import are_wrapped
from ..errors import UnreadableError
from ..recipes.registry import find_recipe, qualified_name
from .arrangement import Arrangement
from .established import NameInErrors, arrange, arrange_by_evidence
from .evidence.establish import form_of
from .intercept import Intercept, Sites
from .sites import Inject, Watch, code_of

S = TypeVar("S", bound=Sites)
_MOST = 64  # sizes of arguments that are remembered of a module
_TOLD: WeakKeyDictionary[nn.Module, tuple[Structure, dict[Any, str]]] = WeakKeyDictionary()


def replayed(call: Call) -> Source:
    """Run a call's forward again and take from it what its map is computed from; the modes of the call are on already.

    Raises:
        UnreadableError: evidence does not tell which map the forward forms, or of which axes; what was found is told.
    """
    with NameInErrors(call):
        watch = run_under(call, Watch())[1]
        return source_of_watched(call, watch, arrange(call, watch))


def replayed_by_evidence(call: Call) -> Source:
    """As `replayed`, with no regard to what a recipe tells of axes."""
    with NameInErrors(call):
        watch = run_under(call, Watch())[1]
        return source_of_watched(call, watch, arrange_by_evidence(call, watch))


def why_unreadable(call: Call) -> str:
    """Why no map of a call can be read, as evidence of its module and such arguments has it; nothing if one can.

    Told once for all such calls, by running the first again, whatever has become of its input; once one can be read, no more.
    """
    module = call.layer.module
    if find_recipe(module) is not None:
        return ""
    structure, told = _TOLD.get(module, (None, {}))
    if structure != call.layer.structure:  # it has become another module
        _, told = _TOLD[module] = call.layer.structure, {}
    grad, autocast, training, *_ = call.modes
    dtypes = tuple([t.dtype for t in call.tensors])
    form = form_of(call.args, call.kwargs), dtypes, grad, autocast, tuple(training)
    if form in told:
        return ""
    key = form, tuple([code_of(t) for t in call.tensors if t.dtype is torch.bool])  # masks may choose the tokens
    if key not in told:
        while len(told) >= _MOST:
            told.pop(next(iter(told)), None)
        try:
            with call.in_its_modes():
                arrange(call, run_under(call, Watch())[1])
        except UnreadableError as reason:
            if are_wrapped((*call.tensors, *call.state)):
                return str(reason)
            told[key] = str(reason).removeprefix(f"{call.layer.name!r}: ")
        except Exception:  # such as an input that is gone: told when the map is read
            return ""
        else:
            told[form] = ""
            return ""
    return f"{call.layer.name!r}: {told[key]}"


def source_of_watched(call: Call, watch: Watch, arrangement: Arrangement) -> Source:
    """What the map of a call that was watched is computed from; it runs once more where that was not noted."""
    by_hand = any(part.operand is not None for part in arrangement.parts)
    if by_hand or watch.is_overwritten():
        watch = run_under(call, Watch(arrangement.parts, as_called=watch.as_called, copies=True))[1]
    return watch.source(arrangement)


def run_with_map(call: Call, attention: Tensor) -> Any:
    """Run a captured call's forward with `attention` in place of the map it forms, and all dropout as it was.

    The output is in the graph of the call and of the map.

    Raises:
        UnreadableError: the forward forms no map that another could be put in place of.
    """
    with call.resumed():
        with torch.no_grad():  # nothing of this run is used but where maps are formed
            watch = run_under(call, Watch(as_called=True))[1]
            arrangement = arrange(call, watch)
        return run_under(call, Inject(watch, arrangement, attention, as_called=True))[0]


def run_under(call: Call, sites: S, *outer: Sites) -> tuple[Any, S]:
    """Run a call's forward while its sites are seen or filled; what it returns, and the sites.

    Others, outside of these, see what they make of it.
    """
    module = call.layer.module
    with restoring(module):
        call.restore_random_streams()
        args, kwargs = copy_arguments(module, call.args, call.kwargs)
        with lowest(Intercept([sites, *outer])):
            # `forward`, not the module: hooks on the module itself have changed the arguments already, and ours would record it
            output = module.forward(*args, **kwargs)
            sites.finish((args, kwargs), output)
        return output, sites


def copy_arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """Copies of arguments, for a run that may write into them or fill a cache among them.

    Raises:
        UnreadableError: one of them is changed by a forward, and cannot be copied: a cache that is a module, or has slots.
    """

    copies: dict[int, Tensor] = {}  # one of each: some forwards ask whether queries and keys are made of one tensor

    def copied(value: Any) -> Any:
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        if isinstance(value, Tensor):
            if id(value) not in copies:
                copies[id(value)] = value.clone()
            return copies[id(value)]
        other = copy_structure(value, torch.clone) if is_cache(value) else value
        if other is value and callable(getattr(value, "update", None)):
            raise UnreadableError(
                f"{qualified_name(type(module))} was called with a {type(value).__name__}, which its forward changes, so it "
                'cannot be run again. Call the model without it (use_cache=False), record with keep="maps" in eval mode, or '
                "describe the map with @hookattn.recipe."
            )
        return other

    both: tuple[Any, Any] = pytree.tree_map(copied, (args, kwargs), is_leaf=is_cache)
    return both
