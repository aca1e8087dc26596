"""What a forward forms its map of, seen or replaced while it runs: modes that `scaled_dot_product_attention` and softmax go
through."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..attention.sources import QK, Dense, Outer, Scores, Source, exact_dtype, exactly
from ..errors import UnreadableError
from ..recipes.registry import find_form
from .axes import check_softmax_axis, class_of, folded, interleave_heads, unfolded

SDPA = F.scaled_dot_product_attention
SOFTMAX = {torch.softmax, Tensor.softmax, F.softmax, torch.special.softmax}
FORM_A_MAP = {SDPA, *SOFTMAX, F.multi_head_attention_forward}
_SDPA_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")


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
        self.packed: int | None = None  # heads that PyTorch's attention, which runs now, counts as images

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is SDPA:
            return self.fused(args, kwargs)
        if func in SOFTMAX:
            return self.softmax(func, args, kwargs)
        if func is F.multi_head_attention_forward:  # asked for no weights, it goes through SDPA
            named = inspect.signature(func).bind(*args, **kwargs).arguments
            named["need_weights"] = self.as_called and named.get("need_weights", True)
            self.packed = named["num_heads"]
            try:
                with self:
                    return _body(func)(**named)
            finally:
                self.packed = None
        return func(*args, **kwargs)

    def fused(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        raise NotImplementedError

    def softmax(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        raise NotImplementedError


class Watch(MapMode):
    """Notes what every SDPA call and every softmax is made of, and lets them run: without dropout of the map, or as called.

    Args:
        module: whose forward runs.
        given: the tensors it is called with; the first tells how many images there are.
        as_called: see `MapMode`.
    """

    def __init__(self, module: nn.Module, given: Iterable[Tensor] = (), *, as_called: bool = False) -> None:
        super().__init__(module, as_called=as_called)
        self.batch = next((len(t) for t in given if t.dim()), None)
        self.fused_sites: list[_Site] = []
        self.softmax_sites: list[_Site] = []

    @property
    def sites(self) -> list[_Site]:
        """SDPA calls, or the softmaxes of a module that makes none."""
        return self.fused_sites or self.softmax_sites

    def source(self) -> Source:
        """What the map is made of, once the forward has run; see `replayed`.

        Raises:
            UnreadableError: see `replayed`.
        """
        if not self.sites:
            raise UnreadableError(
                f"{class_of(self.module)} called neither scaled_dot_product_attention nor softmax: it forms no softmax map. If "
                "it has a kernel of its own, describe the map with @hookattn.recipe."
            )
        source: Source = interleave_heads([site.source() for site in self.sites], self.module)
        return source

    def fused(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        named = sdpa_arguments(args, kwargs)
        out = SDPA(*args, **kwargs) if self.as_called else SDPA(**{**named, "dropout_p": 0.0})
        self.fused_sites.append(_Site(out.dtype, partial(_as_qk, self.module, self.batch, **named)))
        return out

    def softmax(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        out: Tensor = func(*args, **kwargs)
        scores, dim = input_and_dim(*args, **kwargs)
        scores = scores if self.packed is None else scores.reshape(-1, self.packed, *scores.shape[-2:])
        self.softmax_sites.append(_Site(out.dtype, partial(_as_scores, self.module, self.batch, scores, dim)))
        return out


class Inject(MapMode):
    """Puts a map where the sites of a watched run formed theirs."""

    def __init__(self, watch: Watch, attention: Tensor, *, as_called: bool = False) -> None:
        super().__init__(watch.module, as_called=as_called)
        if not watch.sites:
            raise UnreadableError(
                f"{class_of(watch.module)} called neither scaled_dot_product_attention nor softmax: there is nothing in its "
                "forward to put a map into."
            )
        self.into_fused = bool(watch.fused_sites)
        maps = (attention[:, i :: len(watch.sites)] for i in range(len(watch.sites)))
        self.left = iter([(site.dtype, part) for site, part in zip(watch.sites, maps)])

    def fused(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        kwargs = sdpa_arguments(args, kwargs)
        dtype, attention = next(self.left)
        value, shape = kwargs["value"], (*kwargs["query"].shape[:-1], kwargs["key"].shape[-2])
        attention = folded(self.module, attention, shape)
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
        return folded(self.module, attention, tuple(out.shape)).to(dtype)


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
    return Scores(check_softmax_axis(module, batch, scores, dim))


def sdpa_arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `scaled_dot_product_attention` by name."""
    return {**dict(zip(_SDPA_ARGUMENTS, args)), **kwargs}


def input_and_dim(input: Tensor, dim: int = -1, *_: Any, **__: Any) -> tuple[Tensor, int]:
    return input, dim


@lru_cache
def _body(func: Callable[..., Any]) -> Callable[..., Any]:
    """A Python function of `torch.nn.functional` without the lines that hand it to a mode as one opaque call."""
    assert isinstance(func, types.FunctionType)
    scope = {**func.__globals__, "has_torch_function": lambda _: False}
    body = types.FunctionType(func.__code__, scope, func.__name__, func.__defaults__, func.__closure__)
    body.__kwdefaults__ = func.__kwdefaults__
    return body


class Variables(MapMode):
    """Takes what SDPA and softmax put out for the variables that the output is a function of."""

    def __init__(self, module: nn.Module, batch: int) -> None:
        super().__init__(module)
        self.batch = batch
        self.fused_sites: list[_Variable] = []
        self.softmax_sites: list[_Variable] = []

    def fused(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        if sdpa_arguments(args, kwargs).get("dropout_p"):
            raise UnreadableError(
                f"{class_of(self.module)} drops out parts of its map inside the fused kernel, which does not tell which. For "
                "gradients of the map, set the dropout of attention to 0 (attn_drop_rate=0), or call the model in eval mode."
            )
        out: Tensor = SDPA(*args, **kwargs)
        value = sdpa_arguments(args, kwargs)["value"].detach()
        return self._site(self.fused_sites, out, partial(_outer, self.module, self.batch, value))

    def softmax(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        out: Tensor = func(*args, **kwargs)
        dim = input_and_dim(*args, **kwargs)[1]
        return self._site(self.softmax_sites, out, partial(_formed_slope, self.module, self.batch, dim))

    def _site(self, sites: list[_Variable], out: Tensor, slope: Callable[[Tensor], Source]) -> Tensor:
        """Note a site; what comes after it may write into what it is given."""
        sites.append(_Variable(out if out.requires_grad else out.requires_grad_(), slope))
        return out.clone()


class _Variable(NamedTuple):
    """One place where a forward forms a map: what came out of it, and what makes dL/dA of dL/d(that)."""

    out: Tensor
    slope: Callable[[Tensor], Source]  # holds nothing that holds the sites: tensors must not wait for the garbage collector


def _outer(module: nn.Module, batch: int, value: Tensor, grad: Tensor) -> Outer:
    grad, value = unfolded(module, grad, batch), unfolded(module, value, batch)
    return Outer(grad, value.repeat_interleave(grad.shape[1] // value.shape[1], dim=1))


def _formed_slope(module: nn.Module, batch: int, dim: int, grad: Tensor) -> Dense:
    return Dense(check_softmax_axis(module, batch, grad, dim).to(exact_dtype(grad.dtype)))
