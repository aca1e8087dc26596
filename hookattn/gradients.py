"""Gradients of attention maps with the fused kernel on: what backward brings to a module's output, carried on to its map."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .calls import Call
from .errors import NoGradientError, StaleMapError, UnreadableError
from .functional import Formed, Outer, Slope
from .indexing import split_index
from .replay import SDPA, MapMode, input_and_dim, interleaved, leaving_no_trace, over_keys, own_arguments, unfolded, who

_SAMPLES = 4096


class Gradient:
    """dL/dA: the gradient of what backward was last called on with respect to one map, (batch, head, query, key).

    It is sliced like the map it belongs to, and is what autograd gives for the map on the unfused path: the map of this call is
    taken for the variable, whatever it was computed from. Where the module calls `scaled_dot_product_attention`, dL/dA is
    dL/d(A v) v^T, and a row is read without the others. It is float32 (float64 for a float64 model) and part of no graph.

    Args:
        name: name of the map.
        deliver: what brings slices to the device and dtype asked for.
        at_once: whether it is computed during backward, so that the input can be let go.
    """

    def __init__(self, name: str, deliver: Callable[[Tensor], Tensor], *, at_once: bool) -> None:
        self.name, self._deliver, self._at_once = name, deliver, at_once
        self._call: Call | None = None
        self._whole: Tensor | None = None
        self._received: dict[int, Tensor] = {}
        self._backward, self._lost = -1, ""
        self._sample: Tensor | None = None

    def __getitem__(self, index: Any) -> Tensor:
        if self._whole is not None:
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
        outputs = {i: t for i, t in enumerate(pytree.tree_leaves(output)) if isinstance(t, Tensor) and t.requires_grad}
        self._sample = None if outputs else _sample(call)
        if not self._at_once:
            self._call = call
        me, kept = weakref.ref(self), call if self._at_once else None  # what it takes to compute lives as long as the graph

        def receive(place: int, grad: Tensor) -> None:
            if (gradient := me()) is not None:
                gradient._receive(place, grad, kept)

        for place, tensor in outputs.items():
            tensor.register_hook(partial(receive, place))  # type: ignore[no-untyped-call]

    def waits_for(self, call: Call) -> bool:
        """Whether this is the gradient of a call that was made without a graph, and is made again now."""
        sample = self._sample
        return sample is not None and torch.equal(sample, _sample(call))

    def _receive(self, place: int, grad: Tensor, call: Call | None) -> None:
        backward = torch._C._current_graph_task_id()
        if backward != self._backward:
            self._backward, self._received = backward, {}
        self._received[place] = grad.detach()
        if call is not None:
            self._whole, self._lost = None, ""
            try:
                self._whole = self._deliver(slope_of(call.during_backward(), self._received).gradient())
            except (UnreadableError, StaleMapError) as reason:  # backward goes on
                self._lost = f"the gradient of {self.name!r} could not be computed during backward: {reason}"

    def _slope(self) -> Slope:
        if self._lost:
            raise UnreadableError(self._lost)
        if not self._received or self._call is None:
            raise NoGradientError(self._why_none())
        return slope_of(self._call, self._received)

    def _why_none(self) -> str:
        if self._sample is not None:
            return (
                f"the output of {self.name!r} was computed without a graph: call the model without torch.no_grad(), let the "
                "images require grad (images.requires_grad_()) if parameters are frozen, and call backward inside the block if "
                "activations are checkpointed."
            )
        return (
            f"no backward has reached {self.name!r}: call it on something that depends on the output of the model, such as "
            "logits[:, c].sum().backward()."
        )


def _sample(call: Call) -> Tensor:
    """Some values of x, by which a call that is made again is known."""
    values = call.x.detach().reshape(-1)
    return values[:: max(1, values.numel() // _SAMPLES)].clone()


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
        with leaving_no_trace(module), _Variables(module, len(call.x)) as run:
            call.restore_random_streams()
            args, kwargs = own_arguments(module, call.args, call.kwargs)
            outputs = pytree.tree_leaves(module.forward(*args, **kwargs))
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
    slope: Callable[[Tensor], Slope]


class _Variables(MapMode):
    """Takes what SDPA and softmax put out for the variables that the output is a function of."""

    def __init__(self, module: nn.Module, batch: int) -> None:
        super().__init__(module)
        self.batch = batch
        self.fused_sites: list[_Site] = []
        self.softmax_sites: list[_Site] = []

    def fused(self, **kwargs: Any) -> Tensor:
        if kwargs.get("dropout_p"):
            raise UnreadableError(
                f"{who(self.module)} drops out parts of its map inside the fused kernel, which does not tell which. For "
                "gradients of the map, set the dropout of attention to 0 (attn_drop_rate=0), or call the model in eval mode."
            )
        out: Tensor = SDPA(**kwargs)
        return self._site(self.fused_sites, out, partial(self._outer, kwargs["value"].detach()))

    def softmax(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        out: Tensor = func(*args, **kwargs)
        dim = input_and_dim(*args, **kwargs)[1]
        return self._site(self.softmax_sites, out, lambda grad: Formed(over_keys(self.module, self.batch, grad, dim)))

    def _site(self, sites: list[_Site], out: Tensor, slope: Callable[[Tensor], Slope]) -> Tensor:
        """Note a site; what comes after it may write into what it is given."""
        sites.append(_Site(out if out.requires_grad else out.requires_grad_(), slope))
        return out.clone()

    def _outer(self, value: Tensor, grad: Tensor) -> Outer:
        grad, value = unfolded(self.module, grad, self.batch), unfolded(self.module, value, self.batch)
        return Outer(grad, value.repeat_interleave(grad.shape[1] // value.shape[1], dim=1))
