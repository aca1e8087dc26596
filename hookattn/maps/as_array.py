"""What torch, numpy and others do with a map as if it were a tensor: it is read first, or the error says how to read it."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .transfer import copy_to_cpu


def _reading(apply: Callable[..., Any]) -> Callable[..., Any]:
    """An operator as a method that reads what it is given first."""

    def read_and_apply(*operands: Any) -> Any:
        return apply(*(each[...] if isinstance(each, AsArray) else each for each in operands))

    return read_and_apply


class AsArray:
    """Base of what is computed when it is sliced: functions, operators and protocols of others read the whole of it first.

        torch.mean(m, 1); torch.stack(list(rec.maps.values())); x @ m; m * 2
        m.numpy(); np.asarray(m); torch.as_tensor(m); torch.from_dlpack(m)

    Each time it is computed anew: `a = m[...]` once is cheaper. Methods of tensors it has none, so that what is computed is
    seen: `m.mean(1)` is an AttributeError that names `m[...].mean(1)`.
    """

    def __getitem__(self, index: Any) -> Tensor:
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        """The device that slices lie on."""
        raise NotImplementedError

    def __len__(self) -> int:
        raise NotImplementedError

    # Python looks operators up on the class; those with a tensor on the left come by __torch_function__. == stays identity.
    __add__, __radd__ = _reading(operator.add), _reading(operator.add)
    __sub__, __rsub__ = _reading(operator.sub), _reading(lambda m, x: x - m)
    __mul__, __rmul__ = _reading(operator.mul), _reading(operator.mul)
    __truediv__, __pow__, __matmul__ = _reading(operator.truediv), _reading(operator.pow), _reading(operator.matmul)
    __lt__, __le__, __gt__, __ge__ = map(_reading, (operator.lt, operator.le, operator.gt, operator.ge))
    __neg__, __abs__ = _reading(operator.neg), _reading(abs)

    def __iter__(self) -> Iterator[Tensor]:
        """Compute one item of the batch after the other."""
        return (self[i] for i in range(len(self)))

    def __contains__(self, value: Any) -> bool:
        return value in self[...]

    def __bool__(self) -> bool:
        return True  # it is there, whatever its length: nothing is computed to tell

    def numpy(self) -> npt.NDArray[Any]:
        """Compute the whole of it as an array of numpy, from whatever device; bfloat16, which numpy has not, as float32."""
        whole = copy_to_cpu(self[...])
        array: npt.NDArray[Any] = (whole.float() if whole.dtype == torch.bfloat16 else whole).numpy()
        return array

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> npt.NDArray[Any]:
        if copy is False:
            raise ValueError("it is computed when it is read, so there is nothing to share: leave copy=False out.")
        return np.asarray(self.numpy(), dtype)

    def __dlpack__(self, **options: Any) -> Any:
        return self[...].__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return torch.empty(0, device=self.device).__dlpack_device__()

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Called by torch for each of its functions that is given one of these, alone or in a list: read it, go on."""
        if any(isinstance(each, AsArray) for each in pytree.tree_leaves((kwargs or {}).get("out"))):
            raise TypeError(f"nothing is written into {cls.__name__}: give a tensor as out=, such as m[...].")
        args, kwargs = pytree.tree_map_only(AsArray, lambda m: m[...], (args, kwargs or {}))
        return function(*args, **kwargs)

    if not TYPE_CHECKING:  # which would take every attribute for one that is there

        def __getattr__(self, name: str) -> Any:
            if name.startswith("_") or not hasattr(Tensor, name) or hasattr(type(self), name):
                return object.__getattribute__(self, name)  # raises what it would raise without this method
            call = "(...)" if callable(getattr(Tensor, name)) else ""
            raise AttributeError(
                f"{type(self).__name__} has no {name!r}, since it is computed when it is sliced: read it first, "
                f"m[...].{name}{call}"
            )
