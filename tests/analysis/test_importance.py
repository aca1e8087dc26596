"""What a loss owes to each head, against masks on the softmaxes of the unfused path, image by image in float64."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from support.image import SWIN
from support.models import Raises, enliven, randomise, tiny_double
from support.oracle import own_gradients, unfused
from support.untouched import hooks_of_ours, state_of, untouched
from torch import Tensor, nn

from hookattn import AttentionRecorder, LayerNotFoundError, NoMapError, UnreadableError
from hookattn.analysis import HeadImportance, head_importance, normalize_layers

LOSS = partial(F.cross_entropy, reduction="none")
Batch = tuple[Tensor, Tensor]


class Mixer(nn.Module):
    """Attention that no recipe knows."""

    def __init__(self, dim: int = 16) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        return self.out(((q @ k.mT / 3).softmax(-1) @ v).transpose(1, 2).flatten(2))


class Twice(nn.Module):
    """One module, which is called twice, and a head to classify with."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.mixer, self.classify = Mixer(), nn.Linear(16, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixer(x)
        return self.classify((x + self.mixer(x.tanh())).mean(1))


class Windows(nn.Module):
    """Attention in windows, of which the package knows nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = Mixer()

    def forward(self, x: Tensor) -> Tensor:
        return self.attn(x.flatten(1).unflatten(1, (3, 4, 16)).transpose(0, 1).flatten(0, 1)).unflatten(0, (3, -1)).mean((0, 2))


def vit() -> tuple[nn.Module, Tensor]:
    return tiny_double("vit_registers", batch=5)


def swin() -> tuple[nn.Module, Tensor]:
    model = timm.create_model("swin_tiny_patch4_window7_224", img_size=64, num_classes=5, **SWIN)
    return randomise(model).double().eval(), torch.randn(5, 3, 64, 64).double()


def unknown() -> tuple[nn.Module, Tensor]:
    return randomise(Twice()).double().eval(), torch.randn(5, 7, 16).double()


MODELS = {"vit": vit, "swin": swin, "unknown": unknown}


def batches(x: Tensor) -> list[Batch]:
    """Of unlike sizes."""
    y = torch.arange(len(x)) % 5
    return [(x[:1], y[:1]), (x[1:], y[1:])]


def loss_with(model: nn.Module, x: Tensor, y: Tensor, scale: Callable[[int, Tensor], Tensor]) -> Tensor:
    """The loss of an image where each softmax is multiplied by something, head by head."""
    with unfused(model, lambda i, a: a * scale(i, a)[:, None, None]):
        return F.cross_entropy(model(x[None]), y[None])


def heads_of(model: nn.Module, x: Tensor) -> list[int]:
    with unfused(model) as made, torch.no_grad():
        model(x[:1])
    return [a.shape[1] for a in made]


def by_masks(model: nn.Module, x: Tensor, y: Tensor) -> list[float]:
    """Michel et al. 2019, equation 2: the mean of |dL/dxi_h| at xi = 1."""
    masks = [torch.ones(count, dtype=torch.float64, requires_grad=True) for count in heads_of(model, x)]
    slopes = [
        torch.cat(torch.autograd.grad(loss_with(model, image, label, lambda i, _: masks[i]), masks)).abs()
        for image, label in zip(x, y)
    ]
    return torch.stack(slopes).mean(0).tolist()


@torch.no_grad()
def by_leaving_out(model: nn.Module, x: Tensor, y: Tensor) -> list[float]:
    """Their section 3.2, of a loss: xi = 0 for one head of one layer."""
    found = []
    for layer, count in enumerate(heads_of(model, x)):
        for head in range(count):

            def mask(i: int, a: Tensor, layer: int = layer, head: int = head) -> Tensor:
                return torch.tensor([float((i, h) != (layer, head)) for h in range(a.shape[1])]).to(a)

            more = [
                loss_with(model, image, label, mask) - F.cross_entropy(model(image[None]), label[None])
                for image, label in zip(x, y)
            ]
            found.append(float(sum(more)) / len(more))
    return found


ORACLES: dict[Any, Callable[..., list[float]]] = {"gradient": by_masks, "knockout": by_leaving_out}


@pytest.mark.parametrize("kind", ORACLES)
@pytest.mark.parametrize("name", MODELS)
def test_importance_is_that_of_a_mask_on_the_head_image_by_image(name: str, kind: Any) -> None:
    model, x = MODELS[name]()
    rows = head_importance(model, batches(x), LOSS, kind=kind)
    expected = ORACLES[kind](model, x, torch.arange(5) % 5)
    assert max(map(abs, expected)) > 1e-3
    assert [row.importance for row in rows] == pytest.approx(expected, rel=1e-7, abs=1e-9 * max(map(abs, expected)))
    counts = heads_of(model, x)
    assert [(row.depth, row.head) for row in rows] == [(depth, h) for depth, count in enumerate(counts) for h in range(count)]
    if name == "unknown":
        assert [row.layer for row in rows] == ["mixer"] * 2 + ["mixer#1"] * 2


def test_importance_is_the_map_times_its_gradient() -> None:
    model, x = vit()
    y = torch.arange(5)
    found = []
    for image, label in zip(x, y):
        gradients = own_gradients(model, image[None], lambda out, label=label: F.cross_entropy(out, label[None]))
        with unfused(model) as maps:
            model(image[None])
        found.append(torch.cat([(a * g).sum((0, 2, 3)).abs() for a, g in zip(maps, gradients.values())]))
    rows = head_importance(model, batches(x), LOSS)
    assert [row.importance for row in rows] == pytest.approx(torch.stack(found).mean(0).tolist(), rel=1e-7)


OTHERS: dict[str, dict[str, Any]] = {
    "cait_xxs24_224": {"img_size": 64, "depth": 1},  # mixes heads before and after the softmax
    "xcit_nano_12_p16_224": {"img_size": 64, "depth": 1},  # maps of channels
    "hiera_tiny_224": {"img_size": 128, "embed_dim": 24, "stages": (1, 1, 1, 1)},  # windows in an order of their own
    "nest_tiny": {"img_size": 32},  # blocks of an image side by side
}


@pytest.mark.parametrize("name", OTHERS)
def test_importance_is_that_of_a_factor_in_an_edit(name: str) -> None:
    x = torch.randn(3, 3, OTHERS[name]["img_size"], OTHERS[name]["img_size"])
    model = enliven(timm.create_model(name, num_classes=5, **OTHERS[name]), x).double()
    found = []
    for image in x.double():
        masks: dict[str, Tensor] = {}

        def scale(a: Tensor, layer: str, masks: dict[str, Tensor] = masks) -> Tensor:
            masks[layer] = torch.ones(a.shape[1], dtype=a.dtype, requires_grad=True)
            return a * masks[layer][:, None, None]

        with AttentionRecorder(model) as rec, rec.edit({layer: partial(scale, layer=layer) for layer in rec.layers}):
            end = LOSS(model(image[None]), torch.tensor([2]))
        found.append(torch.cat(torch.autograd.grad(end.sum(), [*masks.values()])).abs())
    rows = head_importance(model, [(x.double(), torch.full((3,), 2))], LOSS)
    expected = torch.stack(found).mean(0)
    assert expected.max() > 1e-4
    assert [row.importance for row in rows] == pytest.approx(expected.tolist(), rel=1e-6, abs=1e-9 * float(expected.max()))


@pytest.mark.parametrize("kind", ORACLES)
def test_some_layers_can_be_measured_alone(kind: Any) -> None:
    model, x = vit()
    whole = head_importance(model, batches(x), LOSS, kind=kind)
    last = head_importance(model, iter(batches(x)), LOSS, kind=kind, layers=-1)
    assert [(row.layer, row.depth, row.head) for row in last] == [("blocks.1.attn", 0, head) for head in range(3)]
    assert [row.importance for row in last] == pytest.approx([row.importance for row in whole[3:]], rel=1e-7)
    with pytest.raises(LayerNotFoundError):
        head_importance(model, batches(x), LOSS, kind=kind, layers="block.*")


@pytest.mark.parametrize("kind", ORACLES)
@pytest.mark.parametrize("trained", [True, False], ids=["parameters that learn", "frozen"])
def test_the_model_and_its_gradients_are_as_they_were(kind: Any, trained: bool) -> None:
    model, x = vit()
    model.requires_grad_(trained)
    grads = {name: torch.randn_like(p) for name, p in model.named_parameters()} if trained else {}
    for name in list(grads)[::2]:
        model.get_parameter(name).grad = grads[name].clone()
    before = state_of(model)
    with untouched(model), torch.inference_mode(not trained):
        head_importance(model, batches(x), LOSS, kind=kind)
    assert state_of(model) == before
    assert not hooks_of_ours(model)
    assert x.grad is None
    assert not x.requires_grad
    for i, (name, parameter) in enumerate(model.named_parameters()):
        kept = parameter.grad
        assert kept is None if i % 2 or not trained else torch.equal(kept, grads[name])


@pytest.mark.parametrize("kind", ORACLES)
def test_what_raises_in_the_loss_leaves_nothing_behind(kind: Any) -> None:
    model, x = vit()
    with untouched(model), pytest.raises(ArithmeticError, match="midway"):
        head_importance(model, [x], Raises(), kind=kind)
    assert not hooks_of_ours(model)


@pytest.mark.parametrize("kind", ORACLES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_can_be_had_in_other_precisions(kind: Any, dtype: torch.dtype) -> None:
    model, x = vit()
    exact = [row.importance for row in head_importance(model, batches(x), LOSS, kind=kind)]
    model.to(dtype)
    given = [(images.to(dtype), y) for images, y in batches(x)]
    found = [row.importance for row in head_importance(model, given, lambda out, y: LOSS(out.float(), y), kind=kind)]
    tolerance = 1e-4 if dtype == torch.float32 else 0.2
    assert found == pytest.approx(exact, abs=tolerance * max(map(abs, exact)))


def test_a_metric_needs_no_gradient() -> None:
    model, x = vit()
    y = model(x).argmax(-1)
    rows = head_importance(model, [(x, y)], lambda out, y: out.argmax(-1) == y, kind="knockout")
    lost = [round(row.importance * 5) for row in rows]
    assert [row.importance * 5 for row in rows] == pytest.approx(lost)
    assert min(lost) < 0 == max([0, *lost])
    with pytest.raises(ValueError, match=r'the loss has no gradient.*kind="knockout"'):
        head_importance(model, [(x, y)], lambda out, y: out.argmax(-1) == y)


class Normalizes(nn.Module):
    """Writes into what it is called with."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Any:
        return self.model(x.sub_(1).mul_(2))


@pytest.mark.parametrize("kind", ORACLES)
def test_a_model_may_write_into_its_input(kind: Any) -> None:
    model, x = vit()
    given = [((x / 2 + 1), torch.arange(5))]
    before = given[0][0].clone()
    found = head_importance(Normalizes(model), given, LOSS, kind=kind)
    assert torch.equal(given[0][0], before)
    expected = head_importance(model, [(x, torch.arange(5))], LOSS, kind=kind)
    assert [row.importance for row in found] == pytest.approx([row.importance for row in expected], rel=1e-6)


def test_batches_may_be_images_alone() -> None:
    model, x = vit()
    assert head_importance(model, [x[:1], x[1:]], lambda out: out.square().sum(-1))[0].importance > 0


def test_what_cannot_be_measured_says_what_to_give() -> None:
    model, x = vit()
    given = batches(x)
    with pytest.raises(ValueError, match=r'batch of 4 returned a tensor of shape \(\).*reduction="none"'):
        head_importance(model, given[1:], F.cross_entropy)
    with pytest.raises(ValueError, match=r"batch of 4 returned float"):
        head_importance(model, given[1:], lambda out, y: 1.0, kind="knockout")
    with pytest.raises(ValueError, match="the loader gave no images"):
        head_importance(model, [], LOSS)
    with pytest.raises(ValueError, match='kind="gradient" or kind="knockout"'):
        head_importance(model, given, LOSS, kind="shapley")  # type: ignore[arg-type]
    words = nn.Sequential(nn.Embedding(9, 16), Twice())
    with pytest.raises(ValueError, match=r'floating ones.*kind="knockout"'):
        head_importance(words, [(torch.arange(8).view(2, 4), torch.arange(2))], LOSS)
    assert len(head_importance(words, [(torch.arange(8).view(2, 4), torch.arange(2))], LOSS, kind="knockout")) == 4
    with pytest.raises(NoMapError):
        head_importance(timm.create_model("poolformer_s12", num_classes=5), [(x.float(), torch.arange(5))], LOSS)


def test_windows_of_which_nothing_is_known_are_not_given_to_some_image() -> None:
    model = randomise(Windows()).double()
    x = torch.randn(2, 12, 16).double()
    loss: Any = lambda out: out.square().sum(-1)  # noqa: E731
    with pytest.raises(UnreadableError, match=r"'attn' has 6 entries for 2 images.*batches of one image"):
        head_importance(model, [x], loss)
    rows = head_importance(model, [x[:1], x[1:]], loss)
    expected = []
    for image in x:
        mask = torch.ones(2, dtype=torch.float64, requires_grad=True)
        with unfused(model, lambda _, a, mask=mask: a * mask[:, None, None]):
            expected.append(torch.autograd.grad(loss(model(image[None])).sum(), mask)[0].abs())
    assert [row.importance for row in rows] == pytest.approx(torch.stack(expected).mean(0).tolist())


def test_layers_are_divided_by_their_norms() -> None:
    rows = [HeadImportance(layer, depth, head, value) for layer, depth, head, value in GIVEN]
    assert [row.importance for row in normalize_layers(iter(rows))] == pytest.approx([0.6, -0.8, 1, 0, 0])
    assert [row[:3] for row in normalize_layers(rows)] == [row[:3] for row in rows]


GIVEN = [("a", 0, 0, 3.0), ("a", 0, 1, -4.0), ("b", 1, 0, 7.0), ("c", 2, 0, 0.0), ("c", 2, 1, 0.0)]
