"""Slots on a GPU: after a run they hold what a fresh prefill writes, and a kept cache goes on with the text."""

import pytest
import torch

from decoding import SlotCache, decoder_from_spec
from tests.conftest import MASK

SPECS = (
    "ntp",
    "sbd:block_size=5,entropy_bound=1.5",
    "sbd:block_size=5,top_k=2,anchor=true,commit=prefix",
    "sbd-lossless:block_size=4",
    "sbd-lossless:block_size=4,look_ahead=2,draft=both",
)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("family", ["llama-3.1", "qwen2-window", "qwen3", "mistral-window"])
def test_slots_hold_a_fresh_prefill_from_turn_to_turn(gpu_model, gpu_prompts, cache_error, family, spec):
    model, text = gpu_model(family, torch.float64), gpu_prompts(20)["input_ids"]
    cache = SlotCache(model.config.num_hidden_layers, chunk=16)
    settings = {"do_sample": False, "suppress_tokens": [MASK], "custom_generate": decoder_from_spec(spec)}
    for turn in range(2):
        expected = model.generate(text, attention_mask=torch.ones_like(text), max_new_tokens=15, **settings)
        output = model.generate(
            text, attention_mask=torch.ones_like(text), max_new_tokens=15, past_key_values=cache, **settings
        )
        assert torch.equal(output, expected)
        assert cache.layers[0].keys.device.type == "cuda"
        assert cache.tokens[0] == output[0, :-1].tolist()
        # Norms and positions are float32 inside the model, and rows of other shapes are summed in another order.
        assert cache_error(model, cache, 0, cache.tokens[0]) < 1e-5
        text = torch.cat([output, gpu_prompts(3 + turn)["input_ids"]], 1)
