"""A forward as the list of aten operations it is, which can be run again with something else in it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ...calls.restore import restoring
from ...errors import UnreadableError

aten = torch.ops.aten
_HALF = (torch.float16, torch.bfloat16)
_DROPOUT = {f for space in (torch, F) for name, f in vars(space).items() if "dropout" in name and callable(f)}
# Autograd lets nobody write into what these return, and stops at a detached tensor, which has an influence all the same.
_AS_VIEWS: dict[Any, Callable[..., Any]] = {
    aten.unbind.int: lambda x, dim=0: [x.select(dim, i) for i in range(x.shape[dim])],
    aten.split.Tensor: lambda x, n, dim=0: [x.narrow(dim, i, min(n, x.shape[dim] - i)) for i in range(0, x.shape[dim], n)],
    aten.split_with_sizes.default: lambda x, ns, dim=0: [x.narrow(dim, sum(ns[:i]), n) for i, n in enumerate(ns)],
    aten.detach.default: lambda x: x,
}


class _Functions(TorchFunctionMode):
    """Looks into each function of PyTorch that a forward calls, dropout left out.

    Between the functions no other mode is on, so that a forward can make tensor subclasses; and while this one is, PyTorch's
    multi-head attention takes no fast path.
    """

    def __init__(self, operations: Operations) -> None:
        super().__init__()
        self.operations = operations

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _DROPOUT:
            return args[0] if args else kwargs["input"]
        if func is F.multi_head_attention_forward:
            args, kwargs = (), {**inspect.signature(func).bind(*args, **kwargs).arguments, "dropout_p": 0.0}
        if func is F.scaled_dot_product_attention:
            args = (*args[:4], *(0.0 for _ in args[4:5]), *args[5:])
            kwargs = {name: 0.0 if name == "dropout_p" else value for name, value in kwargs.items()}
        with self.operations:
            return func(*args, **kwargs)


class Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Hands every aten operation of a forward to `step`, in float32 or better, with fused attention taken apart.

    What the forward did not compute itself (parameters, buffers) is copied before it is used: nothing of it is written into.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0
        self.own: dict[int, Tensor] = {}  # by id, of tensors that `alive` keeps alive
        self.alive: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        args, kwargs = pytree.tree_map(self._ours, (args, kwargs or {}))
        if func.overloadpacket.__name__.startswith("_scaled_dot_product_"):
            return self._take_apart(func, args, kwargs)
        with self:  # what is taken apart holds operations that are themselves made of others
            out = func.decompose(*args, **kwargs)
        if out is not NotImplemented:
            return out
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise UnreadableError(f"its forward draws random numbers ({func})")
        out = func(*args, **kwargs)
        for t in tensors_in(out):
            self.keep(t, t)
        self.step(func, args, kwargs, out)
        self.count += 1
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

    def _ours(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self.own[id(value)] if id(value) in self.own else self.foreign(value)
        return torch.float32 if value in _HALF else value

    def keep(self, seen: Tensor, own: Tensor) -> Tensor:
        self.alive += [seen, own]
        self.own[id(seen)] = self.own[id(own)] = own
        return own

    def foreign(self, t: Tensor) -> Tensor:
        """What is used in place of a tensor that the forward did not compute."""
        return self.keep(t, exact(t))

    def step(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        raise NotImplementedError

    def run(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        """What the forward returns on these arguments, which it may write into; the module is left as it was.

        Raises:
            UnreadableError: it cannot be run so.
        """
        try:
            with torch.no_grad(), restoring(module), _Functions(self):
                out = module.forward(*args, **kwargs)
        except UnreadableError:
            raise
        except Exception as error:
            raise UnreadableError(f"its forward cannot be taken apart: {type(error).__name__}: {error}"[:300]) from error
        return [self.own.get(id(t), t) for t in tensors_in(out) if t.is_floating_point()]


def tensors_in(tree: Any) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(tree) if isinstance(t, Tensor)]


def exact(t: Tensor) -> Tensor:
    """A copy, in float32 if it is of less."""
    return t.detach().float() if t.dtype in _HALF else t.detach().clone()


def own_arguments(args: tuple[Any, ...], kwargs: dict[str, Any], copied: Callable[[Tensor], Tensor]) -> tuple[Any, Any]:
    """The arguments with each tensor copied, once however often it is given.

    Raises:
        UnreadableError: one of them is no plain tensor, or a cache that a forward changes in ways that cannot be seen.
    """
    for value in pytree.tree_leaves((args, kwargs)):
        if callable(getattr(value, "update", None)):
            raise UnreadableError(f"it was called with a {type(value).__name__}, which its forward changes")
        if isinstance(value, Tensor) and (value.is_nested or value.is_quantized or value.layout is not torch.strided):
            raise UnreadableError(f"it was called with a nested, quantised or sparse tensor ({value.layout})")
    copies = {id(t): copied(t) for t in tensors_in((args, kwargs))}
    ours: tuple[Any, Any] = pytree.tree_map_only(Tensor, lambda t: copies[id(t)], (args, kwargs))
    return ours


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


class Tape(Operations):  # type: ignore[no-untyped-call]
    """A forward taken down at a generic point: parameters and arguments are moved a little.

    So nothing that derivatives show is a coincidence of values, such as weights that begin at zero or windows that are alike.
    """

    def __init__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.steps: list[Step] = []
        self.tensors: list[Tensor] = []
        self.slots: dict[int, Slot] = {}
        self.untouched: dict[Slot, Tensor] = {}  # of what the forward did not compute and may write into
        self.live: set[int] = set()  # storages
        self.mutates = False
        self.random = torch.Generator().manual_seed(0)
        args, kwargs = own_arguments(args, kwargs, self._moved)
        given = list({id(t): self.keep(t, t) for t in tensors_in((args, kwargs))}.values())
        self.untouched = {self._slot(t): t.clone() for t in given}
        self.inputs = [self._slot(t) for t in given if t.is_floating_point()]
        self.live = {storage_of(t) for t in given if t.is_floating_point() and t.numel()}
        self.outputs = [self._slot(t) for t in self.run(module, args, kwargs)]

    def of(self, slot: Slot) -> Tensor:
        return self.tensors[slot.number]

    def _moved(self, t: Tensor) -> Tensor:
        t = exact(t)
        if not t.is_floating_point():
            return t
        less, more = (torch.rand(t.shape, generator=self.random).to(t) for _ in range(2))
        return t * (1 - 0.01 * less) + 0.01 * (more - 0.5)  # infinite or large parts of a mask stay such

    def foreign(self, t: Tensor) -> Tensor:
        if isinstance(t, nn.Parameter):
            return self.keep(t, self._moved(t))
        own = super().foreign(t)
        self.untouched[self._slot(own)] = own.clone()
        return own

    def _slot(self, t: Tensor) -> Slot:
        if id(t) not in self.slots:
            self.slots[id(t)] = Slot(len(self.tensors))
            self.tensors.append(self.keep(t, t))
        return self.slots[id(t)]

    def _is_live(self, value: Any) -> bool:
        return isinstance(value, Tensor) and value.numel() > 0 and storage_of(value) in self.live

    def step(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        self.mutates |= func._schema.is_mutable
        live = list(map(self._is_live, args))
        if any(map(self._is_live, pytree.tree_leaves((args, kwargs)))):
            self.live |= {storage_of(t) for t in tensors_in(out) if t.numel()}
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
    ) -> Run:
        """Run it again, with gradients, as far as it depends on what is put in.

        Args:
            given: tensors to put in place of others.
            cut: steps of which the result is made a leaf.
            hold: steps of which the result is made a constant.
            catch: steps of which the arguments are kept, as they are at that moment.
        """
        # Where a forward writes into tensors, what the tape holds is what was written last: all is run again.
        run = Run({slot: t.clone() for slot, t in self.untouched.items()} if self.mutates else {})
        run.values.update(given or {})
        with torch.enable_grad():
            for n, step in enumerate(self.steps):
                changed = self.mutates or not run.values.keys().isdisjoint(step.slots())
                args, kwargs = pytree.tree_map_only(Slot, lambda s: run.values.get(s, self.of(s)), (step.args, step.kwargs))
                if n in catch:
                    run.caught[n] = [a.clone() if isinstance(a, Tensor) else a for a in args]
                if changed and n not in cut and n not in hold:
                    out = pytree.tree_leaves(_call(step.func, args, kwargs))
                    run.values.update({slot: t for slot, t in zip(step.outs, out) if slot is not None})
                elif changed or n in cut:
                    [slot] = step.outs
                    assert slot is not None
                    result = (_call(step.func, args, kwargs) if self.mutates else self.of(slot)).detach()
                    if n in cut:
                        run.leaves[n] = result.requires_grad_()
                    run.values[slot] = result.clone()
        return run


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
