"""Generation with a cache of keys and values, as its defaults have it: each step is a forward, which is read and edited."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.models import randomise
from torch import Tensor, nn

from hookattn import AttentionRecorder

transformers = pytest.importorskip("transformers")

SMALL = {"vocab_size": 50, "pad_token_id": None, "eos_token_id": None, "bos_token_id": 1}
LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    **SMALL,
}


def make(name: str, kernel: str) -> Any:
    if name == "gpt2":
        config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, attn_implementation=kernel, **SMALL)
        return transformers.GPT2LMHeadModel(config)
    kind = {"llama": "Llama", "qwen2": "Qwen2"}[name]
    config = getattr(transformers, f"{kind}Config")(attn_implementation=kernel, **LLAMA)
    return getattr(transformers, f"{kind}ForCausalLM")(config)


def generate(model: Any, ids: Tensor) -> Any:
    return model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=4,
        do_sample=False,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )


def without_head(attention: Tensor) -> Tensor:
    return attention.index_fill(1, torch.tensor(1), 0)


MODELS = [("gpt2", "sdpa"), ("gpt2", "eager"), ("llama", "eager"), ("qwen2", "sdpa")]


@pytest.fixture(params=MODELS, ids=lambda case: "-".join(case))
def model(request: pytest.FixtureRequest) -> nn.Module:
    return randomise(make(*request.param), 0.2).eval()


IDS = torch.tensor([[3, 7, 9, 4, 8], [5, 5, 2, 6, 1]])


@pytest.mark.parametrize("keep", ["inputs", "maps"])
def test_each_step_is_a_forward_whose_maps_are_rows_of_the_whole(model: Any, keep: Any) -> None:
    plain = generate(model, IDS)
    with AttentionRecorder(model, passes="all", keep=keep) as rec:
        steps = generate(model, IDS)
    assert torch.equal(steps.sequences, plain.sequences)
    assert all(torch.equal(a, b) for a, b in zip(steps.logits, plain.logits))
    with AttentionRecorder(model) as whole, torch.no_grad():
        model(steps.sequences, use_cache=False)
    assert [maps[0].shape for maps in rec.passes] == [(2, 4, 5, 5), (2, 4, 1, 6), (2, 4, 1, 7), (2, 4, 1, 8)]
    for maps in rec.passes:
        for name, m in maps.items():
            queries, keys = m.shape[2:]
            expected = whole.maps[name][:, :, keys - queries : keys, :keys]
            torch.testing.assert_close(m[...], expected, rtol=0, atol=1e-5)


def test_each_step_is_edited(model: Any) -> None:
    """What comes of it is what a forward of the whole sequence, without a cache, puts out with the same edit."""
    with AttentionRecorder(model) as rec, rec.edit({"*": without_head}):
        steps = generate(model, IDS)
        with torch.no_grad():
            whole = model(steps.sequences, use_cache=False).logits
    assert not torch.allclose(steps.logits[0], generate(model, IDS).logits[0], atol=1e-2)
    got = torch.stack(steps.logits, 1)
    torch.testing.assert_close(got, whole[:, -got.shape[1] - 1 : -1], rtol=0, atol=1e-4)


def test_a_captioner_is_read_while_it_generates() -> None:
    """Its text decoder attends to itself with a cache, and to the image."""
    text = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "encoder_hidden_size": 32,
        "vocab_size": 50,
        "bos_token_id": 1,
        "eos_token_id": 49,
        "sep_token_id": 49,
        "pad_token_id": 0,
    }
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 32,
        "patch_size": 8,
    }
    config = transformers.BlipConfig(text_config=text, vision_config=vision)
    model = randomise(transformers.BlipForConditionalGeneration(config), 0.2).eval()
    pixels = torch.randn(2, 3, 32, 32)
    plain = model.generate(pixel_values=pixels, max_new_tokens=4)
    with AttentionRecorder(model, passes="all") as rec:
        assert torch.equal(model.generate(pixel_values=pixels, max_new_tokens=4), plain)
    maps = [m for each in rec.passes for m in each.values()]
    crossed = [m for m in maps if "crossattention" in m.name]
    assert len(crossed) >= 2 * 3
    assert all(m.shape[1] == 4 and m.shape[3] == 17 for m in crossed)
    for m in maps:
        torch.testing.assert_close(m[...].sum(-1), torch.ones(m.shape[:3]))
        m.verify()
