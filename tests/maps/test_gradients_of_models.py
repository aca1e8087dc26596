"""Gradients of maps of models that no test of recipes knows, against autograd on their softmax and differences of `edit`.

Neither oracle is of the package: autograd is asked at the softmax itself, wherever a module takes it, and the differences are
those of a loss over all outputs when all maps are moved a little. Maps are held against softmaxes entry by entry, by value, so
nothing is taken on trust of how a module lays them out.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from support import elsewhere, other_packages
from support.differentiated import Grads, Loss, agree_with_autograd, agree_with_differences, softmaxes
from support.models import randomise
from support.styles import ODD, STYLES
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from hookattn import AttentionRecorder, UnreadableError

pytestmark = pytest.mark.filterwarnings("ignore")


# The comparison


def loss_of(output: Any) -> Tensor:
    """Of all that a model puts out, each number with a weight of its own."""
    leaves = pytree.tree_leaves(dict(output.items()) if hasattr(output, "items") else output)
    weights = torch.Generator().manual_seed(7)
    floats = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    return torch.stack(
        [(t.double() * torch.randn(t.shape, generator=weights, dtype=torch.float64)).sum() for t in floats]
    ).sum()


def gradients_of(model: nn.Module, loss: Loss, layers: Any, **options: Any) -> Grads:
    with AttentionRecorder(model, layers, gradients=True, **options) as rec:
        loss().backward()
    got = {name: (m[...], m.gradient[...]) for name, m in rec.maps.items()}
    model.zero_grad()
    return got


def compare(
    model: nn.Module, loss: Loss, layers: Any = None, tolerance: float = 1e-6, of_differences: float = 1e-2
) -> set[str]:
    """All gradients against both oracles, in both ways to keep; the maps that were held against differences alone."""
    got, kept = gradients_of(model, loss, layers), gradients_of(model, loss, layers, keep="maps")
    assert got.keys() == kept.keys() != set()
    for name, (m, gradient) in got.items():
        assert m.shape == gradient.shape == kept[name][1].shape
        torch.testing.assert_close(kept[name][1], gradient, rtol=1e-9, atol=1e-12)
    with softmaxes(model, list(got)) as found:
        loss().backward()
    model.zero_grad()
    without = agree_with_autograd(got, found, tolerance)
    agree_with_differences(model, loss, list({name.partition("#")[0] for name in got}), got, of_differences)
    return without


@pytest.fixture
def doubles() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def in_double(model: nn.Module) -> nn.Module:
    def inputs(_: nn.Module, args: Any, kwargs: Any) -> Any:
        return pytree.tree_map_only(Tensor, lambda t: t.double() if t.dtype == torch.float32 else t, (args, kwargs))

    model.double().register_forward_pre_hook(inputs, with_kwargs=True)
    return model


class Within(nn.Module):
    """An attention in a model that does more with its outputs."""

    def __init__(self, attn: nn.Module) -> None:
        super().__init__()
        self.attn = attn

    def forward(self, *args: Any) -> Any:
        return pytree.tree_map_only(Tensor, lambda t: t.sin() if t.is_floating_point() else t, self.attn(*args))


def styled(name: str) -> tuple[nn.Module, Loss]:
    module, args, _ = STYLES[name].make(ODD)
    args = pytree.tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, args)
    model = Within(module).double()
    return model, lambda: loss_of(model(*args))


# Styles: one of each kind of product, order, loop, mask and output

READ = [
    "fused",
    "heads_before_images",
    "heads_third",
    "heads_last",
    "heads_and_images_in_one_axis",
    "keys_before_queries",
    "sum_of_a_broadcast_product",
    "tokens_before_images",
    "one_head_after_the_other",
    "one_image_and_head_after_the_other",
    "chunks_of_queries",
    "every_other_query_first",
    "one_image_without_its_axis",
    "a_second_softmax_for_logging",
    "exp_of_log_softmax",
    "exp_by_sum",
    "softmax_of_aten",
    "sigmoid_attention",
    "top_keys_scattered",
    "a_sink",
    "lower_right_causal",
    "a_padding_mask",
    "a_bias_for_each_pair",
    "queries_of_one_image",
    "groups_in_the_fused_kernel",
    "groups_in_einsum",
    "a_grouped_step_of_decoding",
    "talking_heads",
    "a_softmax_gate_beside_the_map",
    "difference_of_two_maps",
    "two_streams_attend_together",
    "it_returns_its_map",
    "pytorchs_own",
    "pytorchs_own_batch_first_need_weights",
    "windows_of_different_sizes",
    "shifted_windows",
    "packed_sequences_as_qwen_has_them",
    "video_over_time",
    "neighbours_of_each_query",
    "values_in_two_parts",
    "in_a_checkpoint",
    "outputs_of_half_the_channels_each",
    "a_mask_after_the_softmax",
]
# whose map is no softmax, or is one that no function of that name took, or is a part of one
BY_DIFFERENCES_ALONE = {
    "a_second_softmax_for_logging",
    "a_sink",
    "a_softmax_gate_beside_the_map",
    "a_mask_after_the_softmax",
    "exp_by_sum",
    "exp_of_log_softmax",
    "sigmoid_attention",
    "softmax_of_aten",
}
CUT_OFF, RANDOM = "no gradient comes from its output to its map", "draws random numbers though it is not in train mode"
REFUSED = {
    "detached_map": CUT_OFF,
    "a_function_with_a_derivative_of_its_own": CUT_OFF,
    "cut_off_from_the_graph": CUT_OFF,
}


@pytest.mark.parametrize("name", READ)
def test_the_gradient_of_a_style(name: str, doubles: None) -> None:
    model, loss = styled(name)
    without = compare(model, loss, None if name.startswith("pytorchs_own") else "attn")
    assert bool(without) == (name in BY_DIFFERENCES_ALONE)


@pytest.mark.parametrize("keep", ["inputs", "maps"])
@pytest.mark.parametrize("name", REFUSED)
def test_a_style_whose_map_is_read_and_has_no_gradient(name: str, keep: Any) -> None:
    model, loss = styled(name)
    with AttentionRecorder(model, "attn", gradients=True, keep=keep) as rec:
        loss().backward()
    (m,) = rec.maps.values()
    assert m[...].shape == m.shape
    with pytest.raises(UnreadableError, match=REFUSED[name]):
        m.gradient[...]


# Models of packages

MODELS = """
transformers DeformableDetrModel, eager
transformers SegGptModel, eager
transformers Qwen2VisionTransformerPretrainedModel, unequal, eager
transformers Qwen3VLVisionModel, of two frames, sdpa
transformers Florence2VisionBackbone, sdpa
transformers TimesformerModel, divided_space_time, eager
transformers ViTMAEForPreTraining, sdpa
transformers GPT2Model, one more word, eager
transformers TrOCRForCausalLM, eager
transformers T5Model, sdpa
transformers LongformerModel, eager
transformers CvtModel, eager
diffusers Transformer2DModel, AttnProcessor2_0
diffusers Flux
torchvision vit
open_clip CLIP
vit_pytorch looped_vit
vit_pytorch learnable_memory_vit
""".strip().splitlines()


def case_of(name: str) -> tuple[nn.Module, Loss]:
    of_others = name in other_packages.CASES
    model, case = (other_packages if of_others else elsewhere).made(name)

    if hasattr(type(model).forward, "__wrapped__"):  # by torch.no_grad
        model.forward = partial(type(model).forward.__wrapped__, model)

    def loss() -> Tensor:
        torch.manual_seed(0)
        return loss_of(case.call(model) if of_others else model(*case.inputs, **case.named))

    return model, loss


@pytest.mark.parametrize("name", MODELS)
def test_the_gradient_of_a_model(name: str, doubles: None) -> None:
    torch.set_default_dtype(torch.float32)
    model, loss = case_of(name)
    torch.set_default_dtype(torch.float64)
    assert not compare(in_double(model), loss)


def test_the_gradient_of_a_model_that_knows_float32_alone() -> None:
    model, loss = case_of("segment_anything Sam")
    assert not compare(model, loss, tolerance=1e-4, of_differences=0.1)


def test_a_model_that_draws_random_numbers_in_eval_mode_has_no_gradients() -> None:
    """It samples the tokens that it puts out."""
    model, loss = case_of(next(name for name in elsewhere.CASES if "ats_vit" in name))
    with AttentionRecorder(model, gradients=True) as rec:
        loss().backward()
    for m in rec.maps.values():
        with pytest.raises(UnreadableError, match=RANDOM):
            m.gradient[...]


class Thrice(nn.Module):
    """One attention that is called three times, and each time for another of its outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.attn, self.mix = STYLES["it_returns_its_map"].make(ODD)[0], nn.Linear(15, 15)

    def forward(self, x: Tensor) -> Any:
        y, first = self.attn(x)
        z, _ = self.attn(self.mix(y).tanh() + x)
        _, third = self.attn(z)
        return y.square(), first.sin(), third


@pytest.mark.parametrize("passes", [1, 2])
def test_a_module_that_is_called_several_times(passes: int) -> None:
    model, x = randomise(Thrice()).double(), torch.randn(2, 7, 15, dtype=torch.float64)

    def loss() -> Tensor:
        return torch.stack([loss_of(model(x * (1 + n))) for n in range(passes)])[-1]

    assert not compare(model, loss)
