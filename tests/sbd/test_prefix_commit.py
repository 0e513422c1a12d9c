"""commit="prefix": decided tokens run causally with the next forward, so every forward has an anchor."""

import math

import pytest
import torch
from transformers import LogitsProcessorList

from decoding import Engine
from decoding.batch import Batch, Sequence, Stopping
from decoding.decoder import decode
from decoding.sampling import LogitsPipeline
from sbd import EntropyBound, SetBlockDecoder
from tests.conftest import FAMILIES, MASK

DICT = {"return_dict_in_generate": True}


@pytest.mark.parametrize("family", FAMILIES)
def test_one_anchored_token_per_forward_is_next_token_decoding(shared_model, prompts, family):
    """With a bound of 0 each forward reveals its anchor alone, so the text is the model's own, whatever the masks say."""
    model, inputs = shared_model(family), prompts(5, 12)
    decoder = SetBlockDecoder(block_size=4, rule=EntropyBound(0), anchor=True, commit="prefix")
    output = model.generate(**inputs, max_new_tokens=20, custom_generate=decoder, **DICT)
    stock = model.generate(**inputs, max_new_tokens=20, do_sample=False, suppress_tokens=[MASK])
    assert torch.equal(output.sequences, stock)
    assert output.tokens_per_forward.tolist() == [1.0, 1.0]


def test_committing_by_block_is_not(shared_model, prompts):
    """The control of the test above: anchored at the opening only, inner tokens come from the mask rows."""
    model, inputs = shared_model("llama"), prompts(5, 12)
    decoder = SetBlockDecoder(block_size=4, rule=EntropyBound(0, max_reveal=1), anchor=True)
    output = model.generate(**inputs, max_new_tokens=20, custom_generate=decoder, **DICT)
    assert not torch.equal(
        output.sequences, model.generate(**inputs, max_new_tokens=20, do_sample=False, suppress_tokens=[MASK])
    )


def test_batched_equals_single(shared_model, prompts, new_tokens):
    model, inputs = shared_model("llama"), prompts(4, 17, 9)
    decoder = SetBlockDecoder(block_size=6, rule=EntropyBound(6.0), anchor=True, commit="prefix")
    together = model.generate(**inputs, max_new_tokens=30, custom_generate=decoder, **DICT)
    assert together.tokens_per_forward.max() > 1.2
    for i, mask in enumerate(inputs["attention_mask"]):
        alone = model.generate(
            inputs["input_ids"][i][mask.bool()][None], max_new_tokens=30, custom_generate=decoder, **DICT
        )
        assert new_tokens(together, i, 17) == new_tokens(alone, 0, int(mask.sum()))
        assert together.trace[i] == alone.trace[0]


@pytest.mark.parametrize("bound", [0.5, 6.0, math.inf])
def test_cache_after_a_run_is_a_fresh_prefill(shared_model, cache_error, bound):
    model = shared_model("llama")
    sequence = Sequence(0, list(range(5, 20)), 50, torch.Generator())
    batch = Batch([sequence], LogitsPipeline(LogitsProcessorList(), False, MASK), Stopping(), MASK)
    engine = Engine(model)
    cache = engine.new_cache(1)
    decoder = SetBlockDecoder(block_size=5, rule=EntropyBound(bound), anchor=True, commit="prefix")
    decode(engine, decoder, batch, cache)
    assert sequence.cached > 40
    assert cache_error(model, cache, 0, sequence.tokens[: sequence.cached]) < 1e-4


def test_unknown_commit_is_named():
    with pytest.raises(ValueError, match="commit.*'token'"):
        SetBlockDecoder(commit="token")
