"""`torch.func`: what can be read is exact, and what is gone when the transform has returned is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.models import tiny
from support.reading import furthest, own_softmaxes, read
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, vjp, vmap

from hookattn import AttentionRecorder, UnreadableError


def transforms(model: nn.Module, x: Tensor, state: dict[str, Tensor]) -> dict[str, Callable[[], Any]]:
    def of_state(parameters: dict[str, Tensor], images: Tensor = x) -> Tensor:
        return functional_call(model, parameters, (images,)).sum()

    return {
        "functional_call": lambda: of_state(state),
        "grad": lambda: grad(of_state)(state),
        "vjp": lambda: vjp(of_state, state),
        "jacrev": lambda: jacrev(of_state)(state),
        "vmap": lambda: vmap(model)(torch.stack([x, -x])),
        "ensemble": lambda: vmap(of_state)({name: torch.stack([p, p]) for name, p in state.items()}),
        "gradients of each image": lambda: vmap(grad(of_state), (None, 0))(state, x[:, None]),
    }


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # a kernel that PyTorch has no batching rule for
@pytest.mark.parametrize("options", [{}, {"keep": "maps"}, {"detach": False}, {"keep": "maps", "detach": False}], ids=str)
@pytest.mark.parametrize("how", transforms(nn.Identity(), torch.zeros(2), {}))
def test_a_map_captured_under_a_transform_is_exact_or_refused_with_the_way_to_it(how: str, options: dict[str, Any]) -> None:
    model, x = tiny("vit")
    other, _ = tiny("vit")
    state = {name: p.detach() for name, p in other.named_parameters()}
    run = transforms(model, x, state)[how]
    with AttentionRecorder(model, **options) as rec:
        run()
    if "vmap" in how or how in ("ensemble", "gradients of each image"):
        with pytest.raises(UnreadableError, match=r"'blocks\.0\.attn'.* ran under torch\.vmap.*return .*m\[\.\.\.\]"):
            rec.maps[0][...]
    else:
        assert furthest({name: m.detach() for name, m in read(rec).items()}, own_softmaxes(other, x)) < 1e-5


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("keep", ["inputs", "maps"])
def test_a_recorder_opened_inside_what_vmap_maps_reads_each_slice(keep: Any) -> None:
    model, x = tiny("vit")

    def read_inside(images: Tensor) -> dict[str, Tensor]:
        with AttentionRecorder(model, keep=keep) as rec:
            model(images)
        return read(rec)

    got = vmap(read_inside)(torch.stack([x, -x]))
    for i, images in enumerate((x, -x)):
        assert furthest({name: m[i] for name, m in got.items()}, own_softmaxes(model, images)) < 1e-5
