"""Run a module's own forward again, watching or replacing the map it forms.

`replayed` is the recipe of every module that has none: it runs the forward and takes queries, keys, mask and scale from the
`scaled_dot_product_attention` it reaches, or the scores from its softmax. `inject` is the same run with a given map in
place of the one that would have been formed.
"""

from __future__ import annotations

import copy
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import lru_cache, partial
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from .calls import INTERNAL, Call
from .errors import UnreadableError
from .functional import QK, Scores, Source, exactly
from .recipes import find_form

Mode = TypeVar("Mode", bound="MapMode")
SDPA = F.scaled_dot_product_attention
SOFTMAX = {torch.softmax, Tensor.softmax, F.softmax, torch.special.softmax}
_SDPA_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")


def replayed(module: nn.Module, *args: Any, **kwargs: Any) -> Source:
    """The map a module forms on these arguments, taken from a run of its own forward.

    A module that forms several maps of one shape has their heads dealt out in turn: head h of map i is head
    h * maps + i, as differential attention orders them when it is not fused.

    Raises:
        UnreadableError: the forward forms no softmax map over (queries, keys), or several that do not fit together.
    """
    args, kwargs = own_arguments(module, args, kwargs)
    x = next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)
    with leaving_no_trace(module), Watch(module, None if x is None else len(x)) as watch:
        module.forward(*args, **kwargs)
    if not watch.sites:
        raise UnreadableError(
            f"{who(module)} called neither scaled_dot_product_attention nor softmax: it forms no softmax map. If it has "
            "a kernel of its own, describe the map with @hookattn.recipe."
        )
    source: Source = interleaved([site.source() for site in watch.sites], module)
    return source


def inject(call: Call, attention: Tensor) -> tuple[Any, Any]:
    """Run a captured call's forward twice: as it is, and with `attention` in place of the map it forms.

    Dropout of the map is off in both runs, since the map is the one before dropout; all other randomness is the same.

    Args:
        call: the captured call.
        attention: (batch, heads, queries, keys).

    Returns:
        The module's own output and the output with the map put in.

    Raises:
        UnreadableError: the forward forms no map that another could be put in place of.
    """
    with call.resumed():
        own, watch = run_under(call, Watch(call.target.module))
        return own, run_under(call, Inject(watch, attention))[0]


def replaced(call: Call, attention: Tensor) -> Any:
    """Run a captured call's forward with `attention` in place of the map it forms, and all dropout as it was.

    Args:
        call: the captured call.
        attention: (batch, heads, queries, keys).

    Returns:
        The module's output, in the graph of the call and of the map.

    Raises:
        UnreadableError: the forward forms no map that another could be put in place of.
    """
    with call.resumed():
        with torch.no_grad():
            watch = run_under(call, Watch(call.target.module, as_called=True))[1]
        return run_under(call, Inject(watch, attention, as_called=True))[0]


def run_under(call: Call, mode: Mode) -> tuple[Any, Mode]:
    """What a call's forward returns under a mode, and the mode."""
    module = call.target.module
    with leaving_no_trace(module), mode:
        call.restore_random_streams()
        args, kwargs = own_arguments(module, call.args, call.kwargs)
        return module.forward(*args, **kwargs), mode


def own_arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """Copies of arguments, for a run that may write into them.

    Raises:
        UnreadableError: one of them, such as a cache of keys and values, is changed by a forward in ways that cannot be seen.
    """
    for value in pytree.tree_leaves((args, kwargs)):
        if callable(getattr(value, "update", None)):
            raise UnreadableError(
                f"{who(module)} was called with a {type(value).__name__}, which its forward changes, so it cannot be run "
                "again. Call the model without it (use_cache=False), or describe the map with @hookattn.recipe."
            )
    copied: tuple[Any, Any] = pytree.tree_map_only(Tensor, Tensor.clone, (args, kwargs))
    return copied


@contextmanager
def leaving_no_trace(module: nn.Module) -> Iterator[None]:
    """Random streams, buffers, caches and attributes of a module are afterwards what they were before."""
    inner = list(module.modules())
    devices = {t.device for t in module.parameters() if t.device.type == "cuda"}
    attributes = [_contents(m) for m in inner]
    buffers = [dict(m._buffers) for m in inner]
    with torch.random.fork_rng(devices=list(devices)):
        try:
            for m in inner:
                m._buffers.update({name: b.clone() for name, b in m._buffers.items() if b is not None})
            yield
        finally:
            for m, own, kept in zip(inner, attributes, buffers):
                _put_back(m, own)
                _refill(m._buffers, kept)


def _contents(module: nn.Module) -> dict[str, tuple[Any, Any]]:
    """Attributes of a module's own, each with a shallow copy of what it holds if it is a dict, a list or a set."""
    own = {name: value for name, value in vars(module).items() if name not in INTERNAL}
    return {n: (v, copy.copy(v) if isinstance(v, (dict, list, set)) else None) for n, v in own.items()}


def _put_back(module: nn.Module, attributes: dict[str, tuple[Any, Any]]) -> None:
    for name in [name for name in vars(module) if name not in INTERNAL and name not in attributes]:
        del vars(module)[name]
    for name, (value, contents) in attributes.items():
        vars(module)[name] = value
        if isinstance(value, list):
            value[:] = contents
        elif contents is not None:
            _refill(value, contents)


def _refill(held: Any, contents: Any) -> None:
    """Make a dict or a set hold what it held; never empty on the way, since another thread may be looking."""
    for extra in [key for key in list(held) if key not in contents]:
        held.discard(extra) if isinstance(held, set) else held.pop(extra)
    held.update(contents)


@dataclass(frozen=True, eq=False)
class _Site:
    """One place where a forward forms a map, as it was seen in a run."""

    dtype: torch.dtype
    source: Callable[[], Source]


class MapMode(TorchFunctionMode):
    """Hands SDPA and softmax calls to the two methods; sees inside PyTorch's own multi-head attention as well.

    Args:
        module: whose forward runs.
        as_called: whether it is to return all that it would: dropout of the map is on, weights that were asked for are given.
    """

    def __init__(self, module: nn.Module, *, as_called: bool = False) -> None:
        super().__init__()
        self.module, self.as_called = module, as_called

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is SDPA:
            return self.fused(**dict(zip(_SDPA_ARGUMENTS, args)), **kwargs)
        if func in SOFTMAX:
            return self.softmax(func, args, kwargs)
        if func is F.multi_head_attention_forward:  # asked for no weights, it goes through SDPA
            with self:
                weights = self.as_called and kwargs.get("need_weights", True)
                return _body(func)(*args, **{**kwargs, "need_weights": weights})
        return func(*args, **kwargs)

    def fused(self, **kwargs: Any) -> Tensor:
        raise NotImplementedError

    def softmax(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        raise NotImplementedError


class Watch(MapMode):
    """Notes what every SDPA call and every softmax is made of, and lets them run without dropout of the map."""

    def __init__(self, module: nn.Module, batch: int | None = None, *, as_called: bool = False) -> None:
        super().__init__(module, as_called=as_called)
        self.batch = batch
        self.fused_sites: list[_Site] = []
        self.softmax_sites: list[_Site] = []

    @property
    def sites(self) -> list[_Site]:
        """SDPA calls, or the softmaxes of a module that makes none."""
        return self.fused_sites or self.softmax_sites

    def fused(self, **kwargs: Any) -> Tensor:
        out = SDPA(**{**kwargs, "dropout_p": 0.0})
        self.fused_sites.append(_Site(out.dtype, partial(_as_qk, self.module, self.batch, **kwargs)))
        return out

    def softmax(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        out: Tensor = func(*args, **kwargs)
        self.softmax_sites.append(
            _Site(out.dtype, partial(_as_scores, self.module, self.batch, *input_and_dim(*args, **kwargs)))
        )
        return out


class Inject(MapMode):
    """Puts a map where the sites of a watched run formed theirs."""

    def __init__(self, watch: Watch, attention: Tensor, *, as_called: bool = False) -> None:
        super().__init__(watch.module, as_called=as_called)
        if not watch.sites:
            raise UnreadableError(
                f"{who(watch.module)} called neither scaled_dot_product_attention nor softmax: there is nothing in its forward "
                "to put a map into."
            )
        self.into_fused = bool(watch.fused_sites)
        maps = (attention[:, i :: len(watch.sites)] for i in range(len(watch.sites)))
        self.left = iter([(site.dtype, part) for site, part in zip(watch.sites, maps)])

    def fused(self, **kwargs: Any) -> Tensor:
        dtype, attention = next(self.left)
        value, shape = kwargs["value"], (*kwargs["query"].shape[:-1], kwargs["key"].shape[-2])
        attention = _folded(self.module, attention, shape)
        if attention.dim() == 4:
            value = value.repeat_interleave(attention.shape[1] // value.shape[1], dim=1)
        attention = F.dropout(attention, kwargs.get("dropout_p", 0.0) if self.as_called else 0.0)
        with exactly(value.device):
            out: Tensor = (attention @ value.to(attention.dtype)).to(dtype)
            return out

    def softmax(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        out: Tensor = func(*args, **kwargs)
        if self.into_fused:
            return out
        dtype, attention = next(self.left)
        return _folded(self.module, attention, tuple(out.shape)).to(dtype)


def _as_qk(
    module: nn.Module,
    batch: int | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> QK:
    """The arguments of a `scaled_dot_product_attention` as queries and keys."""
    q, k = unfolded(module, query, batch), unfolded(module, key, batch)
    if attn_mask is not None and find_form(module) is not None:
        attn_mask = unfolded(module, attn_mask.expand(*query.shape[:-1], key.shape[-2]), batch)
    elif attn_mask is not None and attn_mask.dim() == query.dim() == 3:
        attn_mask = attn_mask.unsqueeze(1)
    additive = attn_mask is not None and attn_mask.dtype != torch.bool
    return QK(
        q,
        k.repeat_interleave(q.shape[1] // k.shape[1], dim=1),
        scale=scale,
        bias=attn_mask if additive else None,
        mask=None if additive else attn_mask,
        is_causal=is_causal,
    )


def _as_scores(module: nn.Module, batch: int | None, scores: Tensor, dim: int) -> Scores:
    """The input of a softmax as scores."""
    return Scores(over_keys(module, batch, scores, dim))


def over_keys(module: nn.Module, batch: int | None, scores: Tensor, dim: int) -> Tensor:
    """(images * windows, heads, queries, keys) of what a module takes a softmax of, or has taken it of.

    Raises:
        UnreadableError: the axis it is taken over, or the one of the heads, is another one.
    """
    if dim not in (-1, scores.dim() - 1):
        raise UnreadableError(
            f"{who(module)} takes its softmax over axis {dim} of {tuple(scores.shape)}, not over keys; describe its map "
            "with @hookattn.recipe."
        )
    elsewhere = scores.dim() == 4 and scores.shape[1] != _heads(module) == scores.shape[2]
    if elsewhere and find_form(module) is None:
        raise _no_heads(module, scores)
    return unfolded(module, scores, batch)


def unfolded(module: nn.Module, tensor: Tensor, batch: int | None = None) -> Tensor:
    """(images * windows, heads, ...) of what a module has computed, by its form; (batch, ...) has one head."""
    heads = _heads(module)
    form = _form(module, tensor.dim())
    if form is not None:
        sizes = {"h": heads} if heads is not None and "(b h)" in form else {}
        return rearrange(tensor, f"{form} -> {_canonical(form)}", **sizes)
    if tensor.dim() == 4 and (heads is None or tensor.shape[1] % heads == 0 or heads % max(1, tensor.shape[1]) == 0):
        return tensor
    if tensor.dim() == 3 and heads in (None, 1) and batch in (None, tensor.shape[0]):
        return tensor.unsqueeze(1)
    raise _no_heads(module, tensor)


def _no_heads(module: nn.Module, tensor: Tensor) -> UnreadableError:
    return UnreadableError(
        f"{who(module)} computes its map on {tensor.dim()} axes, {tuple(tensor.shape)}, which are not (batch, head, ...); "
        "describe its map with @hookattn.recipe."
    )


def _folded(module: nn.Module, attention: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A map (images * windows, heads, queries, keys) laid out as the module has it."""
    form = _form(module, len(shape))
    if form is None:
        return attention.reshape(shape)
    axes = form.replace("(b h)", "bh").split()
    sizes = {"w": shape[axes.index("w")]} if "w" in axes else {}
    return rearrange(attention, f"{_canonical(form)} -> {form}", **sizes)


def _form(module: nn.Module, rank: int) -> str | None:
    """The filed form of a module's map, if it has so many axes."""
    form = find_form(module)
    return form if form is not None and len(form.replace("(b h)", "bh").split()) == rank else None


def _canonical(form: str) -> str:
    """The axes of a map as its reader has them, out of the same letters as a form."""
    return f"{'(b w)' if 'w' in form else 'b'} {'h' if 'h' in form else '1'} q k"


def _heads(module: nn.Module) -> int | None:
    """How many heads a module says it has."""
    told = (getattr(module, name, None) for name in ("num_heads", "heads", "num_attention_heads"))
    return next((n for n in told if isinstance(n, int)), None)


def input_and_dim(input: Tensor, dim: int = -1, *_: Any, **__: Any) -> tuple[Tensor, int]:
    return input, dim


def interleaved(maps: Sequence[Any], module: nn.Module) -> Any:
    """Several maps of one shape, or several gradients, as one, heads in turn."""
    if len(maps) == 1:
        return maps[0]
    if len({(type(m), m.shape, getattr(m, "is_causal", None)) for m in maps}) > 1:
        raise UnreadableError(
            f"{who(module)} forms {len(maps)} maps of shapes {', '.join(str(m.shape) for m in maps)}; name the attention "
            "modules inside it with layers=, or describe one map with @hookattn.recipe."
        )
    whole = [m.narrow() for m in maps]  # biases and masks are expanded to the heads

    def turn(name: str) -> Any:
        values = [getattr(m, name) for m in whole]
        if name == "bias":
            return tuple([torch.stack(biases, dim=2).flatten(1, 2) for biases in zip(*values)])
        return torch.stack(values, dim=2).flatten(1, 2) if isinstance(values[0], Tensor) else values[0]

    return replace(whole[0], **{field.name: turn(field.name) for field in fields(whole[0])})


def who(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


@lru_cache
def _body(func: Callable[..., Any]) -> Callable[..., Any]:
    """A Python function of `torch.nn.functional` without the lines that hand it to a mode as one opaque call."""
    assert isinstance(func, types.FunctionType)
    scope = {**func.__globals__, "has_torch_function": lambda _: False}
    body = types.FunctionType(func.__code__, scope, func.__name__, func.__defaults__, func.__closure__)
    body.__kwdefaults__ = func.__kwdefaults__
    return body
