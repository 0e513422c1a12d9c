"""Token for token what transformers gives, and what vLLM gives without us."""

import pytest
import torch

from decoding import decoder_from_spec
from sbd import SelfSpeculativeDecoder
from tests.conftest import MASK
from tests.serving.engine.conftest import engine, random_prompts, run, saved

FAMILIES = ("llama", "llama-tied", "qwen2", "qwen3", "mistral")
LENGTHS = (1, 7, 12, 30, 45)


def reference(model, prompts, max_tokens, decoder=None):
    """New tokens of each prompt, and forwards, from transformers, one by one; a random model would emit its mask token."""
    tokens, forwards = [], 0
    for prompt in prompts:
        ids = torch.tensor([prompt])
        settings = {"max_new_tokens": max_tokens, "do_sample": False, "return_dict_in_generate": True}
        settings |= {} if decoder is not None else {"suppress_tokens": [MASK]}
        output = model.generate(ids, attention_mask=torch.ones_like(ids), custom_generate=decoder, **settings)
        tokens.append(output.sequences[0, len(prompt) :].tolist())
        forwards += int(output.forwards.sum()) if decoder is not None else 0
    return tokens, forwards


@pytest.mark.parametrize("family", FAMILIES)
def test_lossless_text_is_that_of_transformers(family, count_forwards):
    """And so is the number of forwards, behind the first token, which comes with the prompt here."""
    model, folder = saved(family)
    prompts = random_prompts(*LENGTHS)
    expected, _ = reference(model, prompts, 24)
    assert run(engine(folder), prompts) == expected
    begun = [prompt + text[:1] for prompt, text in zip(prompts, expected, strict=True)]
    tail, forwards = reference(model, begun, 23, SelfSpeculativeDecoder(block_size=8, look_ahead=0))
    assert [text[1:] for text in expected] == tail
    assert len(count_forwards) == forwards


RULES = ("entropy_bound=0", "entropy_bound=0.5", "entropy_bound=1e9")
MODES = (*RULES, "confidence_threshold=0.3", "confidence_factor=2", "top_k=3", "entropy_bound=0.5,anchor=true")


@pytest.mark.parametrize("block_size", (4, 7))
@pytest.mark.parametrize("mode", MODES)
def test_set_blocks_are_those_of_transformers(mode, block_size, count_forwards):
    """Text and forwards. An anchored decoder takes its first token from the prompt's last row, which is exact."""
    model, folder = saved("llama")
    prompts, spec = random_prompts(*LENGTHS), f"sbd:block_size={block_size},{mode}"
    text = run(engine(folder), prompts, 22, {"decoder": spec})
    begun = prompts
    if "anchor" in mode:
        first, _ = reference(model, prompts, 1)
        begun = [prompt + token for prompt, token in zip(prompts, first, strict=True)]
        assert [tokens[:1] for tokens in text] == first
    expected, forwards = reference(model, begun, 22 - len(begun[0]) + len(prompts[0]), decoder_from_spec(spec))
    assert [tokens[-len(expected[0]) :] for tokens in text] == expected
    assert len(count_forwards) == forwards


@pytest.mark.parametrize("family", ("qwen2", "qwen3", "mistral"))
def test_set_blocks_of_other_families(family, count_forwards):
    model, folder = saved(family)
    prompts, spec = random_prompts(*LENGTHS), "sbd:block_size=6,entropy_bound=0.5,anchor=true,commit=prefix"
    text = run(engine(folder), prompts, 20, {"decoder": spec})
    begun = [prompt + tokens[:1] for prompt, tokens in zip(prompts, text, strict=True)]
    expected, forwards = reference(model, begun, 19, decoder_from_spec(spec))
    assert [tokens[1:] for tokens in text] == expected
    assert len(count_forwards) == forwards
