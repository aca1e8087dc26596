"""How much a loss depends on each head: by gradient, or by what happens without it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import count
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..attention.narrowing import ALL
from ..attention.softmax import Chunk
from ..conditions.devices import telling_apart
from ..errors import NoMapError, UnreadableError, explained
from ..maps.attention_map import AttentionMap
from ..recording.recorder import AttentionRecorder
from ..recording.selection import Layers
from .statistics import Statistic, Sum, compute_statistics

Loss = Callable[..., Tensor]
Kind = Literal["gradient", "knockout"]
_Head = tuple[str, int]  # the name of a map, and the number of the head


class HeadImportance(NamedTuple):
    """How much a loss depends on a head, over all images of a loader.

    Attributes:
        layer: name of the map.
        depth: the how manieth map it is, from 0 on.
        head: number of the head.
        importance: in units of the loss, see `head_importance`.
    """

    layer: str
    depth: int
    head: int
    importance: float


def head_importance(
    model: nn.Module, loader: Iterable[Any], loss: Loss, *, kind: Kind = "gradient", layers: Layers = None
) -> list[HeadImportance]:
    """Measure how much a loss depends on each head, over the images of a loader.

        loss = partial(F.cross_entropy, reduction="none")
        head_importance(model, tqdm(loader), loss)                    # a bar is one around the loader

    With kind="gradient", E_x |sum_qk A_qk dL/dA_qk|, from one forward and one backward for each batch: how fast the loss of an
    image changes when the whole map of the head is scaled, without regard to sign. Where the map is multiplied onto the values
    it is A . dL/dA = o . dL/do for the output o = A v of the head, which is |Att_h(x)^T dL/dAtt_h(x)| of the paper.

    With kind="knockout", E_x [L(x without the head) - L(x)], from one more forward for each head and batch: the map of one head
    is set to zero (not to a uniform one), so that it adds nothing to the output, as in the paper. A head without which the
    loss falls is below zero. The loss need not have a gradient; of an accuracy, what is lost is below zero.

    The model runs as it stands: put it in eval mode, and the batches on its device, before. It is left as it was, without
    gradients in its parameters.

    Args:
        model: what is called with the first of each batch.
        loader: batches (images, labels, ...), or images alone. Each image counts the same, however large its batch is.
        loss: called with the output of the model and the rest of the batch, returns one number for each image.
        kind: "gradient" or "knockout".
        layers: which attention modules, as `AttentionRecorder` takes them; None for all.

    Returns:
        One row for each layer and head, first layer first.

    Raises:
        ValueError: the loader gives no batch, the loss is not one number for each image or has no gradient, the images are no
            floating ones (kind="gradient"), or `kind` is none of the words above.
        UnreadableError: it is not known which entries of a map belong to which image, or as when a map or a gradient is sliced.
        ModelError: as `AttentionRecorder`, or the model lies on another device than a batch.
        LayerNotFoundError, NoMapError, NoGradientError: as `AttentionRecorder`, its maps and their gradients.

    Source: Michel, Levy and Neubig 2019, "Are sixteen heads really better than one?", equation 2 (gradient) and section 3.2
    (one head at a time). `normalize_layers` divides as they do.
    """
    if kind not in _KINDS:
        raise ValueError(f'kind={kind!r} is not known: kind="gradient" or kind="knockout".')
    sums, images = defaultdict[_Head, float](float), 0
    for batch in loader:
        with torch.inference_mode(False):
            first, *rest = pytree.tree_map_only(Tensor, _for_autograd, batch if isinstance(batch, (tuple, list)) else (batch,))
            with telling_apart(model, first, rest):
                images += _KINDS[kind](model, first, lambda output, rest=rest: loss(output, *rest), layers, sums)
    if not images:
        raise ValueError("the loader gave no images: give batches (images, labels), such as a DataLoader, or a list of some.")
    depths = {layer: depth for depth, layer in enumerate(dict.fromkeys(layer for layer, _ in sums))}
    return [HeadImportance(layer, depths[layer], head, total / images) for (layer, head), total in sums.items()]


def normalize_layers(rows: Iterable[HeadImportance]) -> list[HeadImportance]:
    """Divide importances by the l2 norm of those of their layer; a layer of zeros stays as it is.

    Source: Michel, Levy and Neubig 2019, section 4.1, after Molchanov et al. 2017, "Pruning convolutional neural networks for
    resource efficient inference".
    """
    rows, squares = list(rows), defaultdict[str, float](float)
    for row in rows:
        squares[row.layer] += row.importance**2
    return [row._replace(importance=row.importance / (squares[row.layer] ** 0.5 or 1.0)) for row in rows]


def _by_gradient(model: nn.Module, inputs: Any, loss: Loss, layers: Layers, sums: dict[_Head, float]) -> int:
    """Add |A . dL/dA| of the images of a batch; how many there are."""
    with torch.enable_grad(), AttentionRecorder(model, layers, gradients=True) as rec:
        floating = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        variables = {id(leaf): leaf.detach().requires_grad_() for leaf in floating}
        if not variables:
            raise ValueError('images are to be floating ones for gradients; kind="knockout" needs none.')
        losses = _checked(loss(model(_copied(inputs, variables))), inputs)
        if not losses.requires_grad:
            raise ValueError('the loss has no gradient: give one that has, or kind="knockout" for a metric.')
        # with respect to the images, so that no parameter gets a gradient, and none is computed
        torch.autograd.grad(losses.sum(), list(variables.values()), allow_unused=True)
    for m in _maps_of(rec):
        dots = _by_image(m, _dot_with_gradient(m), len(losses))
        for head, total in enumerate(dots.abs().sum(0).tolist()):
            sums[m.name, head] += total
    return len(losses)


def _by_knockout(model: nn.Module, inputs: Any, loss: Loss, layers: Layers, sums: dict[_Head, float]) -> int:
    """Add by how much the loss of each image of a batch grows without a head; how many there are."""
    with torch.no_grad(), AttentionRecorder(model, layers) as rec:
        own = _checked(loss(model(_copied(inputs))), inputs)
        heads = [(m.name, head) for m in _maps_of(rec) for head in range(m.shape[1])]
        for name, head in heads:
            layer, _, call = name.partition("#")
            with rec.edit({layer: _without(head, int(call or 0))}):
                sums[name, head] += float((_checked(loss(model(_copied(inputs))), inputs) - own).sum())
    return len(own)


_KINDS: dict[str, Callable[[nn.Module, Any, Loss, Layers, dict[_Head, float]], int]] = {
    "gradient": _by_gradient,
    "knockout": _by_knockout,
}


def _for_autograd(tensor: Tensor) -> Tensor:
    return tensor.clone() if tensor.is_inference() else tensor  # which autograd does not save


def _copied(inputs: Any, variables: Mapping[int, Tensor] = MappingProxyType({})) -> Any:
    """Inputs for one forward, made of variables where there are some."""
    # a model may write into what it is called with, which is still the user's, and no leaf of a graph can be written into
    return pytree.tree_map_only(Tensor, lambda tensor: variables.get(id(tensor), tensor).clone(), inputs)


def _checked(losses: Any, inputs: Any) -> Tensor:
    """Losses as one floating number for each image.

    Raises:
        ValueError: they are something else.
    """
    first = next(leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor))
    if not isinstance(losses, Tensor) or losses.shape != first.shape[:1]:
        got = f"a tensor of shape {tuple(losses.shape)}" if isinstance(losses, Tensor) else type(losses).__name__
        raise ValueError(
            f"the loss of a batch of {len(first)} returned {got}, and is to be one number for each image: "
            'F.cross_entropy(..., reduction="none"), or .mean(1) over what is not images.'
        )
    return losses if losses.dtype == torch.float64 else losses.float()


def _maps_of(rec: AttentionRecorder) -> Iterator[AttentionMap]:
    """The maps of the last forward.

    Raises:
        NoMapError: none that was recorded can be read.
    """
    if not rec.maps:
        raise NoMapError(f"no map that was recorded can be read. {explained(rec.maps.skipped.values())}")
    yield from list(rec.maps.values())


def _dot_with_gradient(m: AttentionMap) -> Tensor:
    """The sum of the map times its gradient, (batch, heads), of which no more is held than a chunk."""
    with m.gradient.open() as slope:

        def add(total: Tensor, items: slice, rows: slice, chunk: Chunk) -> None:
            total[items] += (chunk.values.detach() * slope.narrow(items, ALL, rows).values()).sum((-2, -1))

        def dot(m: AttentionMap) -> Sum:
            return Sum(m.shape[:2], add)

        return compute_statistics(m, Statistic(dot))[0]


def _by_image(m: AttentionMap, dots: Tensor, images: int) -> Tensor:
    """(images, heads), of (batch, heads): summed over the windows of an image.

    Raises:
        UnreadableError: it is not known which entries belong to which image.
    """
    entries = len(dots)
    known = "windows" in m.axes[0] and entries % images == 0
    if entries != images and images != 1 and not known:
        raise UnreadableError(
            f"{m.name!r} has {entries} entries for {images} images, and it is not known which belong to which: give "
            "batches of one image."
        )
    return dots.reshape(images, -1, dots.shape[1]).sum(1)


def _without(head: int, call: int) -> Callable[[Tensor], Tensor]:
    """An edit for one forward, which sets a head to zero in one call of the module."""
    calls = count()

    def edit(attention: Tensor) -> Tensor:
        if next(calls) == call:
            attention[:, head] = 0
        return attention

    return edit
