"""Run a module's own forward again, watching or replacing the map it forms.

`replayed` is the recipe of every module that has none: it runs the forward and takes queries, keys, mask and scale from the
`scaled_dot_product_attention` it reaches, or the scores from its softmax. `inject` is the same run with a given map in
place of the one that would have been formed.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..attention.sources import Source
from ..calls.arguments import copy_structure, is_cache
from ..calls.call import Call
from ..calls.restore import restoring
from ..conditions.function_modes import lowest
from ..errors import UnreadableError
from .axes import class_of
from .intercept import Intercept, Sites
from .sites import Inject, Watch

S = TypeVar("S", bound=Sites)


def replayed(module: nn.Module, *args: Any, **kwargs: Any) -> Source:
    """Run a module's own forward on these arguments and take from it what its map is computed from.

    A module that forms several maps of one shape has their heads dealt out in turn: head h of map i is head
    h * maps + i, as differential attention orders them when it is not fused.

    Raises:
        UnreadableError: the forward forms no softmax map over (queries, keys), or several that do not fit together.
    """
    args, kwargs = copy_arguments(module, args, kwargs)
    watch = Watch(module, (a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)))
    # `forward`, not the module: hooks on the module itself have changed the arguments already, and ours would record this run
    with restoring(module), lowest(Intercept([watch])):
        module.forward(*args, **kwargs)
    return watch.source()


def inject(call: Call, attention: Tensor) -> tuple[Any, Any]:
    """Run a captured call's forward twice: as it is, and with `attention` in place of the map it forms.

    Dropout of the map is off in both runs, since the map is the one before dropout; all other randomness is the same. Returned
    are the module's own output and the one with the map put in.

    Raises:
        UnreadableError: the forward forms no map that another could be put in place of.
    """
    with call.resumed():
        own, watch = run_under(call, Watch(call.layer.module))
        return own, run_under(call, Inject(watch, attention))[0]


def run_with_map(call: Call, attention: Tensor) -> Any:
    """Run a captured call's forward with `attention` in place of the map it forms, and all dropout as it was.

    The output is in the graph of the call and of the map. Errors are those of `inject`.
    """
    with call.resumed():
        with torch.no_grad():  # nothing of this run is used but where maps are formed
            watch = run_under(call, Watch(call.layer.module, as_called=True))[1]
        return run_under(call, Inject(watch, attention, as_called=True))[0]


def run_under(call: Call, sites: S) -> tuple[Any, S]:
    """Run a call's forward while its sites are seen or filled; what it returns, and the sites."""
    module = call.layer.module
    with restoring(module), lowest(Intercept([sites])):
        call.restore_random_streams()
        args, kwargs = copy_arguments(module, call.args, call.kwargs)
        return module.forward(*args, **kwargs), sites


def copy_arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """Copies of arguments, for a run that may write into them or fill a cache among them.

    Raises:
        UnreadableError: one of them is changed by a forward, and cannot be copied: a cache that is a module, or has slots.
    """

    def copied(value: Any) -> Any:
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        if isinstance(value, Tensor):
            return value.clone()
        other = copy_structure(value) if is_cache(value) else value
        if other is value and callable(getattr(value, "update", None)):
            raise UnreadableError(
                f"{class_of(module)} was called with a {type(value).__name__}, which its forward changes, so it cannot be run "
                'again. Call the model without it (use_cache=False), record with keep="maps" in eval mode, or describe the map '
                "with @hookattn.recipe."
            )
        return other

    both: tuple[Any, Any] = pytree.tree_map(copied, (args, kwargs))
    return both
