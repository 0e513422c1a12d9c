"""Whole texts: what is given stays, both sides are seen, batched = one by one."""

import pytest
import torch

from dfm import FlowDecoder
from dfm.flow_config import FlowTraits
from tests.conftest import MASK, VOCAB
from tests.dfm.networks import uniform_model
from tests.dfm.runs import first_seed, flow, generate

DOUBLE = torch.float64


def test_decoding_the_whole_text_is_infilling_behind_the_prompt(shared_model, prompts):
    model, inputs = shared_model("qwen3", DOUBLE), prompts(6)
    for name in ("exact", "remdm", "p2"):
        decoder = flow(name, 4)
        output = generate(model, inputs, decoder, 8, True)
        canvas = torch.cat([inputs["input_ids"], torch.full((1, 8), 50)], dim=1)
        filled = decoder.infill(model, canvas, torch.arange(14)[None] < 6, seed=first_seed())
        assert torch.equal(output.sequences, filled.tokens)
        assert output.forwards.tolist() == filled.evaluations.tolist() == [4]


@pytest.mark.parametrize("path", ["mask", "uniform"])
def test_infilling_keeps_what_is_fixed_and_batches_like_single_runs(shared_model, path):
    model = shared_model("llama", DOUBLE) if path == "mask" else uniform_model(block_sizes=None)
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(3, MASK, (3, 12), generator=generator)
    fixed = torch.rand(3, 12, generator=generator) < 0.4
    real = torch.ones(3, 12, dtype=torch.long)
    real[1, :4], real[2, 9:] = 0, 0
    decoder = flow("exact", 4, path=path)
    out = decoder.infill(model, ids, fixed, attention_mask=real, seed=7)
    kept = fixed | ~real.bool()
    assert torch.equal(out.tokens[kept], ids[kept])
    assert (out.tokens[~kept] != MASK).all() and (out.tokens[~kept] != ids[~kept]).float().mean() > 0.5
    for i, span in enumerate((slice(0, 12), slice(4, 12), slice(0, 9))):
        alone = decoder.infill(model, ids[i : i + 1, span], fixed[i : i + 1, span], seed=7 + i)
        assert torch.equal(alone.tokens[0], out.tokens[i, span])
        assert alone.evaluations.item() == out.evaluations[i].item() == 4


def test_infilling_sees_both_sides(shared_model):
    model = shared_model("llama", DOUBLE)
    ids = torch.arange(3, 11)[None]
    fixed = torch.ones(1, 8, dtype=torch.bool)
    fixed[0, 3] = False
    distributions = []
    for last in (20, 21):
        ids[0, 7] = last
        distributions.append(
            [int(FlowDecoder(steps=1).infill(model, ids, fixed, seed=s).tokens[0, 3]) for s in range(60)]
        )
    assert distributions[0] != distributions[1]
    assert (
        FlowDecoder(steps=1).infill(model, ids, fixed, temperature=0.0, seed=1).tokens[0, 3]
        == FlowDecoder(steps=1, sampler="topk").infill(model, ids, fixed, temperature=0.0, seed=2).tokens[0, 3]
    )


def test_a_long_prompt_is_not_run_causally_for_a_whole_text(shared_model, prompts, count_rows):
    model = shared_model("llama", torch.float32, max_position_embeddings=700)
    output = generate(model, prompts(600), flow("exact", 2), 4, False)
    assert output.prefill_forwards == 0 and count_rows == [604, 604]
    assert generate(model, prompts(600), flow("exact", 2, block_size=4), 4, False).prefill_forwards == 1


def test_infilling_refuses_what_makes_no_sense(shared_model, fresh_model):
    model, ids = shared_model("llama"), torch.arange(3, 9)[None]
    fixed = torch.zeros(1, 6, dtype=torch.bool)
    for settings, arguments, message in (
        ({"block_size": 4}, (ids, fixed), "block_size must be None to infill"),
        ({}, (ids[0], fixed[0]), r"input_ids must be \[B, L\], got shape \(6,\)"),
        ({}, (ids, fixed.long()), "fixed must be bool"),
        ({}, (ids, fixed[:, :3]), r"fixed must be bool of shape \(1, 6\)"),
        ({}, (ids + VOCAB, ~fixed), "input_ids must be from 0 to 96 where they are fixed"),
    ):
        with pytest.raises(ValueError, match=message):
            FlowDecoder(steps=1, **settings).infill(model, *arguments)
    with pytest.raises(ValueError, match="attention_mask must be 1 on one run of tokens"):
        FlowDecoder(steps=1).infill(model, ids, fixed, attention_mask=torch.tensor([[1, 0, 1, 1, 1, 1]]))
    shifted = fresh_model("llama")
    shifted.config.flow = FlowTraits(shift=True).as_dict()
    with pytest.raises(ValueError, match="first position must be fixed"):
        FlowDecoder(steps=1).infill(shifted, ids, fixed)
