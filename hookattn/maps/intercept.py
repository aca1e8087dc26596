"""The one mode that sees or replaces what a forward forms its map of, while it runs."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Collection
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..calls.restore import is_reading
from ..conditions.function_modes import SDPA, OwnMode
from ..conditions.meta import check_values

Run = Callable[..., Any]
# By name, since one function has many: of the module `torch`, of a tensor, of an operator, of aten.
_SOFTMAX = {"softmax", "special_softmax", "_softmax", "_safe_softmax"}
_MULTIPLY = {"matmul", "bmm", "mm", "mv", "dot", "einsum", "baddbmm", "addbmm", "addmm", "tensordot", "inner", "linear"}
_MULTIPLY |= {"mul", "multiply", "__matmul__", "__rmatmul__", "__mul__", "__rmul__"}
_CONVOLUTIONS = {F.conv1d, F.conv2d, F.conv3d}
_KINDS = {
    **dict.fromkeys(_SOFTMAX, "softmax"),
    **dict.fromkeys(_MULTIPLY, "multiply"),
    **dict.fromkeys(("dropout", "dropout_", "native_dropout"), "drop"),
    **dict.fromkeys(("layer_norm", "rms_norm"), "normalise"),
}
_SDPA_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")


class Sites:
    """Base of what is done at the places where a forward may form a map; by itself it lets everything run as it is.

    Attributes:
        as_called: whether PyTorch's own multi-head attention gives the weights that it was asked for.
    """

    as_called = True

    def fused(self, run: Run, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call of `scaled_dot_product_attention`; `run` is the function itself, or what others make of it."""
        return run(*args, **kwargs)

    def softmax(self, run: Run, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call of a softmax, whichever of PyTorch's names it was called by."""
        return run(*args, **kwargs)

    def multiply(self, run: Run, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call of a function that multiplies two tensors, as a matrix product or entry by entry."""
        return run(*args, **kwargs)

    def drop(self, run: Run, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call of a function that drops something out."""
        return run(*args, **kwargs)

    def normalise(self, run: Run, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call of a norm over the last axes."""
        return run(*args, **kwargs)

    def follow(self, func: Run, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """Told of every function of torch that was called, these among them, with its arguments and what came out."""

    def finish(self, given: Any, output: Any) -> None:
        """Told when the forward has run, while random streams are where it has left them, what it was given and has put out."""


class Intercept(OwnMode):
    """The mode under which a forward runs to be seen or changed: hands what it calls of torch to sites, the last one outermost.

    They may come and go while the mode is on.
    """

    def __init__(self, sites: Collection[Sites]) -> None:
        super().__init__()
        self.sites = sites
        # A map that is read while a forward runs is no part of it: a mode made outside of any reading sees none.
        self._reads = is_reading()

    def __torch_function__(
        self, func: Run, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        # with keep="maps" the mode stays on between forwards, where there is mostly nothing to see
        if self.over or not self.sites or (not self._reads and is_reading()) or torch.compiler.is_compiling():
            return func(*args, **kwargs)
        if func is F.multi_head_attention_forward:
            return self._see_inside(func, args, kwargs)
        run, kind = func, _kind_of(func)
        if self._reads and (kind == "multiply" or func in _CONVOLUTIONS):  # nothing is raised in the user's own forward
            check_values(*[t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)])
        if kind is not None:
            for sites in self.sites:
                run = _through(getattr(sites, kind), run)
        out = run(*args, **kwargs)
        for sites in self.sites:
            sites.follow(func, args, kwargs, out)
        return out

    def _see_inside(self, func: Run, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run PyTorch's own multi-head attention, which is one opaque call to a mode, line by line under this one."""
        named = inspect.signature(func).bind(*args, **kwargs).arguments
        # Asked for no weights it goes through SDPA, as documented.
        named["need_weights"] = all(sites.as_called for sites in self.sites) and named.get("need_weights", True)
        with self:  # on again: PyTorch switches a mode off while it handles a call
            return _body(func)(**named)


def _kind_of(func: Run) -> str | None:
    """Which method of sites a function is handed to."""
    if func is SDPA:
        return "fused"
    name = getattr(func, "__name__", "").partition(".")[0]
    return _KINDS.get(name)


def _through(handle: Callable[[Run, tuple[Any, ...], dict[str, Any]], Any], run: Run) -> Run:
    def through(*args: Any, **kwargs: Any) -> Any:
        return handle(run, args, kwargs)

    through.__name__ = getattr(run, "__name__", "")  # by which others know it
    return through


def sdpa_arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call of `scaled_dot_product_attention` by name, however they were given."""
    # by hand, since a function of C++ has no signature to be inspected
    return {**dict(zip(_SDPA_ARGUMENTS, args)), **kwargs}


def scores_and_axis(input: Tensor, dim: int | None = -1, *_: Any, **__: Any) -> tuple[Tensor, int]:
    """Find in the arguments of a softmax, by any of its names, what it is taken of and over which axis, counted from 0."""
    if dim is None:  # deprecated, and still what `F.softmax` does without one
        return input, 0 if input.dim() in (0, 1, 3) else 1
    return input, dim % max(1, input.dim())


@lru_cache
def _body(func: Callable[..., Any]) -> Callable[..., Any]:
    """A Python function of `torch.nn.functional` without the lines that hand it to a mode as one opaque call."""
    # Undocumented, torch 2.6 to 2.15: these lines are `if has_torch_function(...): return handle_torch_function(...)`. The same
    # code runs in a copy of its module's globals where the first is always false; nothing of PyTorch's is changed.
    assert isinstance(func, types.FunctionType)
    scope = {**func.__globals__, "has_torch_function": lambda _: False}
    body = types.FunctionType(func.__code__, scope, func.__name__, func.__defaults__, func.__closure__)
    body.__kwdefaults__ = func.__kwdefaults__
    return body
