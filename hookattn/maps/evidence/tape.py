"""A forward as the list of aten operations it is, which can be run again with something else in it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ...calls.arguments import tensors_held_by
from ...calls.restore import restoring
from ...conditions.function_modes import lowest
from ...errors import UnreadableError
from ..intercept import Intercept
from ..sites import tensors_in
from .seen import Functions, Seen
from .values import HALF, Numbers, copying, exact, is_bounded, own_arguments

aten = torch.ops.aten
# Autograd lets nobody write into what these return, and stops at a detached tensor, which has an influence all the same.
_AS_VIEWS: dict[Any, Callable[..., Any]] = {
    aten.unbind.int: lambda x, dim=0: [x.select(dim, i) for i in range(x.shape[dim])],
    aten.split.Tensor: lambda x, n, dim=0: [x.narrow(dim, i, min(n, x.shape[dim] - i)) for i in range(0, x.shape[dim], n)],
    aten.split_with_sizes.default: lambda x, ns, dim=0: [x.narrow(dim, sum(ns[:i]), n) for i, n in enumerate(ns)],
    aten.detach.default: lambda x: x,
}


@dataclass(frozen=True)
class Slot:
    """Where in a tape a tensor stands."""

    number: int


@dataclass
class Step:
    """One operation, with slots for tensors; `live` tells which positional arguments depend on the arguments of the module."""

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outs: list[Slot | None]
    live: list[bool]

    def slots(self) -> set[Slot]:
        return {a for a in pytree.tree_leaves((self.args, self.kwargs)) if isinstance(a, Slot)}


@dataclass
class Run:
    """A tape that was run again: what is other than it was, what was made a leaf, the arguments of steps that were caught."""

    values: dict[Slot, Tensor]
    leaves: dict[int, Tensor] = field(default_factory=dict)
    caught: dict[int, list[Any]] = field(default_factory=dict)


class Tape(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A forward taken down at a generic point, every aten operation of it: parameters and arguments are other numbers.

    So nothing that derivatives show is a coincidence of values, such as weights that begin at zero or windows that are alike,
    and nothing is hidden by them, such as by a gate that is closed. It runs in float32 or better, with fused attention taken
    apart and without dropout. What the forward did not compute itself (parameters, buffers) is copied before it is used:
    nothing of it is written into.

    Raises:
        UnreadableError: the forward cannot be run so.
    """

    def __init__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], numbers: Numbers, *, as_called: bool = False
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.steps: list[Step] = []
        self.tensors: list[Tensor] = []
        self.slots: dict[int, Slot] = {}
        self.own: dict[int, Tensor] = {}  # by id, of tensors that `alive` keeps alive
        self.alive: list[Tensor] = []
        self.untouched: dict[Slot, Tensor] = {}  # of what the forward did not compute and may write into
        self.live: set[int] = set()  # storages of what depends on the arguments
        self.drawn: set[int] = set()  # and of what depends on random numbers
        self.mutates = False
        self.seen = Seen(self.steps, as_called=as_called)
        self.numbers, self.random = numbers, torch.Generator().manual_seed(0)
        copied = copying(args, kwargs, self.random, numbers)
        args, kwargs, given = own_arguments(args, kwargs, copied)
        given = [self.keep(t, t) for t in given]
        self.untouched = {self._slot(t): t.clone() for t in given}
        self.inputs = [self._slot(t) for t in given if t.is_floating_point()]
        self.live = {storage_of(t) for t in given if t.is_floating_point() and t.numel()}
        self.outputs = [self._slot(t) for t in self._run(module, args, kwargs)]

    @property
    def is_finite(self) -> bool:
        """Whether numbers came out."""
        return all(bool(self.of(slot).isfinite().all()) for slot in self.outputs)

    def made_in(self, t: Tensor) -> tuple[Slot, int]:
        """Where a tensor stands, and the last step that has made it and nothing else, -1 if there is none."""
        slot = self._slot(self.own.get(id(t), t))
        return slot, max((n for n, step in enumerate(self.steps) if step.outs == [slot]), default=-1)

    def of(self, slot: Slot) -> Tensor:
        """A tensor, as it was last."""
        return self.tensors[slot.number]

    def _run(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        """What the forward returns on these arguments, which it may write into; the module is left as it was."""
        try:
            with torch.no_grad(), restoring(module), lowest(Intercept([self.seen])), lowest(Functions(self, self._in_full)):
                out = module.forward(*args, **kwargs)
        except UnreadableError:
            raise
        except Exception as error:
            raise UnreadableError(
                f"its forward cannot be taken apart: {type(error).__name__}: {str(error).partition(chr(10))[0]}"[:300]
            ) from error
        return [self.own.get(id(t), t) for t in tensors_held_by(out) if t.is_floating_point()]

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        args, kwargs = pytree.tree_map(self._ours, (args, kwargs or {}))
        if func.overloadpacket.__name__.startswith("_scaled_dot_product_"):
            return self._take_apart(func, args, kwargs)
        with self:  # what is taken apart holds operations that are themselves made of others
            out = func.decompose(*args, **kwargs)
        if out is not NotImplemented:
            return out
        out = func(*args, **kwargs)
        for t in tensors_in(out):
            self.keep(t, t)
        if torch.Tag.nondeterministic_seeded in func.tags:  # what was drawn is drawn, however often it is run again
            return self._constant(func, args, out)
        self._note(func, args, kwargs, out)
        return out

    def _constant(self, func: Any, args: tuple[Any, ...], out: Any) -> Any:
        for t in tensors_in(out):
            self.drawn.add(storage_of(t))
            drawn = self._foreign(t.clone())
            if func._schema.is_mutable:
                self._note(aten.copy_.default, (args[0], drawn), {}, out)
            else:
                self.untouched[self._slot(t)] = drawn
        return out

    def _take_apart(self, fused: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        """What fused attention returns, by the operations it stands for."""
        given = dict(zip([a.name for a in fused._schema.arguments], args)) | kwargs
        q, k, v = (given[name] for name in ("query", "key", "value"))
        options = {"scale": given.get("scale"), "enable_gqa": q.dim() > 3 and q.shape[-3] != k.shape[-3]}
        mask = given.get("attn_mask", given.get("attn_bias"))
        with self:
            math = aten._scaled_dot_product_attention_math.default
            out = math.decompose(q, k, v, mask, 0.0, given.get("is_causal", False), **options)[0]
        return (out, *[None] * (len(fused._schema.returns) - 1))

    def _in_full(self, t: Tensor) -> Tensor:
        own: Tensor = self._ours(t) if t.dtype in HALF else t
        return own

    def _ours(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self.own[id(value)] if id(value) in self.own else self._foreign(value)
        return torch.float32 if value in HALF else value

    def keep(self, seen: Tensor, own: Tensor) -> Tensor:
        """Use a tensor of our own for one that is met in the forward, which is kept alive so that its id stays its own."""
        self.alive += [seen, own]
        self.own[id(seen)] = self.own[id(own)] = own
        return own

    def _foreign(self, t: Tensor) -> Tensor:
        """What is used in place of a tensor that the forward did not compute."""
        if isinstance(t, nn.Parameter) or not is_bounded(t):
            return self.keep(t, self.numbers.parameter(t, self.random))
        own = self.keep(t, exact(t))
        self.untouched[self._slot(own)] = own.clone()
        return own

    def _slot(self, t: Tensor) -> Slot:
        if id(t) not in self.slots:
            self.slots[id(t)] = Slot(len(self.tensors))
            self.tensors.append(self.keep(t, t))
        return self.slots[id(t)]

    def _is_live(self, value: Any) -> bool:
        return isinstance(value, Tensor) and value.numel() > 0 and storage_of(value) in self.live

    def _note(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        self.mutates |= func._schema.is_mutable
        live = list(map(self._is_live, args))
        given, made = ({storage_of(t) for t in tensors_in(tree) if t.numel()} for tree in ((args, kwargs), out))
        for storages in (self.live, self.drawn):
            if not storages.isdisjoint(given):
                storages |= made
        outs = [self._slot(t) if isinstance(t, Tensor) else None for t in pytree.tree_leaves(out)]
        args, kwargs = pytree.tree_map_only(Tensor, self._slot, (args, kwargs))
        self.steps.append(Step(func, args, kwargs, outs, live))

    def rerun(
        self,
        given: Mapping[Slot, Tensor] | None = None,
        *,
        cut: Collection[int] = (),
        hold: Collection[int] = (),
        catch: Collection[int] = (),
        exactly: bool = False,
        put: Mapping[int, Tensor] | None = None,
    ) -> Run:
        """Run it again, with gradients, as far as it depends on what is put in.

        Args:
            given: tensors to put in place of others.
            cut: steps of which the result is made a leaf.
            hold: steps of which the result is made a constant.
            catch: steps of which the arguments are kept, as they are at that moment.
            exactly: whether values are wanted that are the same to the last bit, and no derivatives.
            put: steps of which the result is another one.
        """
        # Where a forward writes into tensors, what the tape holds is what was written last: all is run again.
        run = Run({slot: t.clone() for slot, t in self.untouched.items()} if self.mutates else {})
        run.values.update(given or {})
        call = _call_exactly if exactly else _call
        with torch.set_grad_enabled(not exactly):
            for n, step in enumerate(self.steps):
                changed = self.mutates or not run.values.keys().isdisjoint(step.slots())
                args, kwargs = pytree.tree_map_only(Slot, lambda s: run.values.get(s, self.of(s)), (step.args, step.kwargs))
                if n in catch:
                    run.caught[n] = [a.clone() if isinstance(a, Tensor) else a for a in args]
                if put is not None and n in put:
                    slot = step.outs[0]
                    assert slot is not None
                    run.values[slot] = put[n].clone()
                elif changed and n not in cut and n not in hold:
                    out = pytree.tree_leaves(call(step.func, args, kwargs))
                    run.values.update({slot: t for slot, t in zip(step.outs, out) if slot is not None})
                elif changed or n in cut:
                    slots = [slot for slot in step.outs if slot is not None]
                    fresh = pytree.tree_leaves(_call(step.func, args, kwargs)) if self.mutates else map(self.of, slots)
                    results = [t.detach() for t in fresh if isinstance(t, Tensor)]
                    if n in cut:
                        run.leaves[n] = results[0].requires_grad_()
                    run.values.update({slot: t.clone() for slot, t in zip(slots, results)})
        return run


def _call_exactly(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return func(*args, **kwargs)


def _call(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An operation, such that its derivative tells what depends on what."""
    if "out" in kwargs:  # autograd has no derivative of what is written into a given tensor
        plain = getattr(func.overloadpacket, func._overloadname.removesuffix("out").rstrip("_") or "default")
        return kwargs["out"].copy_(plain(*args, **{k: v for k, v in kwargs.items() if k != "out"}))
    out = _AS_VIEWS.get(func, func)(*args, **kwargs)
    if "_norm" in str(func) and isinstance(out, tuple) and out[0].shape == args[0].shape:
        return (out[0].detach() + args[0] - args[0].detach(), *out[1:])  # statistics tie all tokens together, faintly
    return out


def storage_of(t: Tensor) -> int:
    return t.untyped_storage().data_ptr()
