"""Whether a map is the one that its module's output came from: it is put into the forward, and the output has to stay."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.modules.conv import _ConvNd
from torch.utils import _pytree as pytree

from ..calls.call import Call
from ..errors import UnfaithfulMapError, UnreadableError
from .established import TellWhy, arrange
from .formed import Fused
from .replay import run_under
from .sites import Inject, Watch

# Relative to the largest output. Maps that are right were seen to move it by up to 5e-13 in float64, 3e-6 in float32.
_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 6e-2}
_NOISIEST = 0.05  # of the largest output: where rounding moves it further, nothing is told by it
_FORWARD, _SECOND_RUN = "the output of the forward", "a second run of the module"


class Difference(float):
    """How far the output of a module moves when a map is put in place of its own: the largest absolute difference.

    Attributes:
        against: which output it was compared with, "the output of the forward" or "a second run of the module".
        noise: how far rounding of the map alone moves it; looked for where it moved too far for its dtype, else 0.
    """

    against: str
    noise: float

    def __new__(cls, value: float, against: str, noise: float = 0.0) -> Difference:
        difference = super().__new__(cls, value)
        difference.against, difference.noise = against, noise
        return difference

    def __getnewargs__(self) -> tuple[Any, ...]:
        return float(self), self.against, self.noise

    def __repr__(self) -> str:  # of floats, `str` is `repr`
        noise = f", where rounding alone moves it by {self.noise:.2g}" if self.noise else ""
        return f"{float(self):.2g} against {self.against}{noise}"


class Comparison(NamedTuple):
    """Outputs of a module with its own map and with a given one in its place.

    Attributes:
        against: see `Difference`.
        moved: for each output, how far it moved, its largest value, and the tolerance of its dtype.
        noise: see `Difference`.
        of: a number for each row of the map that was put in, by which another map is known.
    """

    against: str
    moved: tuple[tuple[float, float, float], ...]
    noise: float
    of: Tensor

    def judged(self, name: str, tolerance: float | None) -> Difference:
        """How far the outputs moved.

        Raises:
            UnfaithfulMapError: further than is allowed.
        """
        worst = 0.0
        for difference, largest, usual in self.moved:
            allowed = (usual if tolerance is None else tolerance) * max(1.0, largest)
            if tolerance is None and self.noise <= _NOISIEST * largest:
                allowed = max(allowed, 3 * self.noise)
            if not difference <= allowed:  # and not `>`, which a NaN would pass
                raise UnfaithfulMapError(
                    f"the map of {name!r} is not the one its output came from: put in its place, the output moves by "
                    f"{difference:.2g} against {self.against}, more than {allowed:.2g}. Check the recipe with "
                    "hookattn.testing.check_recipe."
                )
            worst = max(worst, difference)
        return Difference(worst, self.against, self.noise)

    def check_same(self, name: str, attention: Tensor) -> None:
        """Compare the map that was put in with one that was read later.

        Raises:
            UnfaithfulMapError: it is another one.
        """
        difference = largest_difference(_number_rows(attention), self.of)
        if not difference <= 10 * _TOLERANCE.get(attention.dtype, 0.0):
            raise UnfaithfulMapError(
                f"the map of {name!r} that is read now is not the one its output came from: it moved by {difference:.2g} since "
                "the forward, by something outside of the module. Read it before, or record with AttentionRecorder(model, "
                'keep="maps").'
            )


def compare_runs(call: Call, attention: Tensor) -> Comparison:
    """Run a captured call's forward twice, as it is and with a map in place of its own, and compare what comes out.

    Dropout of the map is off in both runs, since the map is the one before dropout; all other randomness is the same.

    Raises:
        UnreadableError: the forward forms no map that another could be put in place of.
    """
    with call.resumed(), TellWhy(call.layer.name):
        own, watch = run_under(call, Watch())
        return _compared(call, watch, attention, own, _SECOND_RUN, as_called=False)


def compare_with_output(call: Call, attention: Tensor, output: Any) -> Comparison:
    """Run the forward of a call that has just ended, restamped, with a map in its place, and compare with what had come out.

    Where the fused kernel dropped out parts of the map, it does not tell which, and two runs are compared instead.
    """
    with call.resumed():
        watch = run_under(call, Watch(as_called=True))[1]
        drops = any(isinstance(site, Fused) and site.dropout_p for site in watch.softmaxes)
        if not drops:
            return _compared(call, watch, attention, output, _FORWARD, as_called=True)
    return compare_runs(call, attention)


def _compared(call: Call, watch: Watch, attention: Tensor, own: Any, against: str, *, as_called: bool) -> Comparison:
    arrangement, of_map = arrange(call, watch), attention.dtype
    attention = attention.to(torch.promote_types(of_map, torch.float32))  # one that was kept may be coarser than it was used

    def run_with(attention: Tensor) -> list[Tensor]:
        return list(_floats(run_under(call, Inject(watch, arrangement, attention, as_called=as_called))[0]))

    injected = run_with(attention)
    moved = tuple([_moved(*outputs, of_map) for outputs in zip(_floats(own), injected, strict=True)])
    if not moved:
        raise UnreadableError(f"{call.layer.name!r}: it puts out no tensor of real numbers that could be compared.")
    noise = 0.0
    if not all(difference <= usual * max(1.0, largest) for difference, largest, usual in moved):
        # an output that is rounded coarsely, as int8 activations are, may stand at a step that rounding of the map goes over
        steps = _steps([*injected, attention], may_be_tf32=_may_be_tf32(call, attention))
        rounded = [run_with(attention * (1 + step * _alternating(attention))) for step in steps]
        noise = max(largest_difference(a, b) for other in rounded for a, b in zip(injected, other))
    return Comparison(against, moved, noise, _number_rows(attention))


def _number_rows(attention: Tensor) -> Tensor:
    """A number for each row, of what it gives to which key."""
    keys = torch.arange(attention.shape[-1], device=attention.device, dtype=attention.dtype)
    return (attention.detach() * keys.cos()).sum(-1)  # no matrix product, which autocast would round


def _moved(own: Tensor, injected: Tensor, of_map: torch.dtype) -> tuple[float, float, float]:
    tolerance = max(_TOLERANCE.get(own.dtype, 0.0), _TOLERANCE.get(of_map, 0.0))
    largest = float(own.detach().abs().nan_to_num(0.0).max()) if own.numel() else 0.0
    return largest_difference(own, injected), largest, tolerance


def _may_be_tf32(call: Call, attention: Tensor) -> bool:
    """Whether products in float32 are taken in TF32, as those of convolutions are on a GPU unless that was turned off."""
    # cuDNN's own flag is not asked: where its operators have different ones, PyTorch 2.9 and later raises.
    coarse = torch.get_float32_matmul_precision() != "highest" or any(isinstance(m, _ConvNd) for m in call.layer.inner)
    return attention.is_cuda and coarse


def _steps(tensors: list[Tensor], *, may_be_tf32: bool) -> list[float]:
    """Relative errors as rounding makes them, up and down, in the coarsest dtype that is about; TF32 has float16's."""
    eps = max(torch.finfo(dtype).eps for dtype in [*(t.dtype for t in tensors), *([torch.float16] * may_be_tf32)])
    return [sign * times * eps for sign in (1, -1) for times in (1, 4)]


def _alternating(attention: Tensor) -> Tensor:
    """1 and -1 by turns along the keys: a map times this sums to other values, and no random number is drawn."""
    return 1 - 2 * (torch.arange(attention.shape[-1], device=attention.device) % 2).to(attention.dtype)


def _floats(output: Any) -> Iterator[Tensor]:
    yield from (t for t in pytree.tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point())


def largest_difference(a: Tensor, b: Tensor) -> float:
    """Largest absolute difference; a NaN equals a NaN and differs from everything else by infinity."""
    a, b = a.detach().double(), b.detach().double()
    same = (a == b) | (a.isnan() & b.isnan())
    difference = (a - b).abs().nan_to_num(math.inf, math.inf).masked_fill(same, 0.0)
    return float(difference.max()) if difference.numel() else 0.0


def tolerance_of(output: Tensor) -> float:
    """How far rounding may move an output."""
    largest = float(output.detach().abs().nan_to_num(0.0).max()) if output.numel() else 0.0
    return _TOLERANCE.get(output.dtype, 0.0) * max(1.0, largest)


def saving_unseen() -> AbstractContextManager[Any]:
    """Hide what is saved for backward from hooks of others: a checkpoint counts it by such."""
    # Undocumented, torch 2.6 to 2.15: whether there can be such hooks; inside of torch.func there are none.
    if not torch._C._autograd._saved_tensors_hooks_is_enabled():  # type: ignore[attr-defined]
        return nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t)
