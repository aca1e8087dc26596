"""Where a forward forms its map: watched, filled with another map, or taken for a variable to differentiate by."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attention.sources import QK, Dense, Outer, Scores, Source, exact_dtype, without_autocast
from ..errors import UnreadableError
from ..recipes.registry import find_axes
from .axes import check_softmax_axis, class_of, fold_axes, interleave_heads, unfold_axes
from .intercept import Run, Sites, input_and_dim, sdpa_arguments


class Site(NamedTuple):
    """One place where a forward forms a map, as it was seen in a run.

    Attributes:
        source: makes the source of the map, or that of dL/dA of dL/d(out).
        dtype: of what came out there.
        out: what came out, where something is differentiated by it.
    """

    # a partial of a plain function, no method or closure: it would hold the sites that hold it, and tensors in such a circle
    # wait for the garbage collector
    source: Callable[..., Source]
    dtype: torch.dtype
    out: Tensor | None = None


class _Noted(Sites):
    """Base of sites that are noted in the order they are met in; `batch` is the number of images, if that is known."""

    def __init__(self, module: nn.Module, batch: int | None) -> None:
        self.module, self.batch = module, batch
        self.fused_sites: list[Site] = []
        self.softmax_sites: list[Site] = []

    @property
    def sites(self) -> list[Site]:
        """The sites that form the module's map: its SDPA calls, or its softmaxes if it makes none."""
        # a softmax beside SDPA weighs something else: branches, experts, channels
        return self.fused_sites or self.softmax_sites


class Watch(_Noted):
    """Notes what every SDPA call and every softmax is made of, and lets them run: without dropout of the map, or as called.

    Args:
        given: the tensors that the module is called with; the first tells how many images there are.
        as_called: whether it is to return all that it would: dropout of the map is on, weights that were asked for are given.
    """

    def __init__(self, module: nn.Module, given: Iterable[Tensor] = (), *, as_called: bool = False) -> None:
        super().__init__(module, next((len(t) for t in given if t.dim()), None))
        self.as_called = as_called

    def source(self) -> Source:
        """What the map is computed from, once the forward has run; see `replayed`."""
        if not self.sites:
            raise UnreadableError(
                f"{class_of(self.module)} called neither scaled_dot_product_attention nor softmax: it forms no softmax map. "
                "If it has a kernel of its own, describe the map with @hookattn.recipe."
            )
        source: Source = interleave_heads([site.source() for site in self.sites], self.module)
        return source

    def fused(self, run: Run, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        named = sdpa_arguments(args, kwargs)
        # maps are those before dropout, so two runs are to be compared without it
        dropped = named.get("dropout_p") and not self.as_called
        out: Tensor = run(**{**named, "dropout_p": 0.0}) if dropped else run(*args, **kwargs)
        self.fused_sites.append(Site(partial(_as_qk, self.module, self.batch, **named), out.dtype))
        return out

    def softmax(self, run: Run, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        out: Tensor = run(*args, **kwargs)
        scores, dim = input_and_dim(*args, **kwargs)
        scores = scores if self.packed is None else scores.reshape(-1, self.packed, *scores.shape[-2:])
        self.softmax_sites.append(Site(partial(_as_scores, self.module, self.batch, scores, dim), out.dtype))
        return out


class Inject(Sites):
    """Puts a map where the sites of a watched run formed theirs.

    That run was of the same call. The map is dropped out as the module would if `as_called`.
    """

    def __init__(self, watch: Watch, attention: Tensor, *, as_called: bool = False) -> None:
        self.module, self.as_called = watch.module, as_called
        if not watch.sites:
            raise UnreadableError(
                f"{class_of(watch.module)} called neither scaled_dot_product_attention nor softmax: there is nothing in its "
                "forward to put a map into."
            )
        self.into_fused = bool(watch.fused_sites)  # decided by the run that was watched: this one is to fill the same sites
        maps = (attention[:, i :: len(watch.sites)] for i in range(len(watch.sites)))
        self.left = iter([(site.dtype, part) for site, part in zip(watch.sites, maps)])

    def fused(self, run: Run, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        kwargs = sdpa_arguments(args, kwargs)
        dtype, attention = next(self.left)
        value, shape = kwargs["value"], (*kwargs["query"].shape[:-1], kwargs["key"].shape[-2])
        attention = fold_axes(self.module, attention, shape)
        if attention.dim() == 4:  # groups of heads may share values, which SDPA spreads by itself
            value = value.repeat_interleave(attention.shape[1] // value.shape[1], dim=1)
        attention = F.dropout(attention, kwargs.get("dropout_p", 0.0) if self.as_called else 0.0)
        with without_autocast(value.device):
            out: Tensor = (attention @ value.to(attention.dtype)).to(dtype)
            return out

    def softmax(self, run: Run, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        out: Tensor = run(*args, **kwargs)
        if self.into_fused:
            return out
        dtype, attention = next(self.left)
        return fold_axes(self.module, attention, tuple(out.shape)).to(dtype)


class Variables(_Noted):
    """Makes what SDPA and softmax put out the variables that the module's output is differentiated by."""

    as_called = False  # through SDPA, where PyTorch's own attention has the choice: a row is then had without the others

    @property
    def variables(self) -> list[Tensor]:
        """What came out at each site, to be differentiated by."""
        return [site.out for site in self.sites if site.out is not None]

    def fused(self, run: Run, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        named = sdpa_arguments(args, kwargs)
        if named.get("dropout_p"):
            raise UnreadableError(
                f"{class_of(self.module)} drops out parts of its map inside the fused kernel, which does not tell which. For "
                "gradients of the map, set the dropout of attention to 0 (attn_drop_rate=0), or call the model in eval mode."
            )
        source = partial(_as_outer, self.module, self.batch, named["value"].detach())
        return _note_variable(self.fused_sites, source, run(*args, **kwargs))

    def softmax(self, run: Run, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        source = partial(_as_dense, self.module, self.batch, input_and_dim(*args, **kwargs)[1])
        return _note_variable(self.softmax_sites, source, run(*args, **kwargs))


def _note_variable(sites: list[Site], source: Callable[[Tensor], Source], out: Tensor) -> Tensor:
    """Note a site and give the forward a copy to go on with, into which it may write."""
    sites.append(Site(source, out.dtype, out if out.requires_grad else out.requires_grad_()))
    return out.clone()


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
    """Queries and keys out of the arguments of `scaled_dot_product_attention`."""
    q, k = unfold_axes(module, query, batch), unfold_axes(module, key, batch)
    if attn_mask is not None and find_axes(module) is not None:
        attn_mask = unfold_axes(module, attn_mask.expand(*query.shape[:-1], key.shape[-2]), batch)
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
    """Scores out of what a softmax is taken of."""
    return Scores(check_softmax_axis(module, batch, scores, dim))


def _as_outer(module: nn.Module, batch: int | None, value: Tensor, grad: Tensor) -> Outer:
    """The gradient of a map out of that of what a fused call put out: dL/dA = dL/d(A v) v^T."""
    grad, value = unfold_axes(module, grad, batch), unfold_axes(module, value, batch)
    return Outer(grad, value.repeat_interleave(grad.shape[1] // value.shape[1], dim=1))


def _as_dense(module: nn.Module, batch: int | None, dim: int, grad: Tensor) -> Dense:
    """The gradient of a map out of that of what a softmax put out, which is the map."""
    return Dense(check_softmax_axis(module, batch, grad, dim).to(exact_dtype(grad.dtype)))
