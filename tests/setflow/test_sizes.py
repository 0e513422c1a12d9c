"""Blocks are bounded by what a model or a row can hold, wherever a size can be written; nothing hangs on them."""

import json

import pytest
import torch

from decoding import LogitsPipeline, decoder_from_spec
from decoding.forward.adapter import GatedAdapter
from finetune.objectives import build_objective
from finetune.recipe import Recipe
from sbd import SelfSpeculativeDecoder
from setflow.loading import load_model
from tests.setflow.conftest import CONTEXT

HUGE = 99_999_999
SPECS = [
    "sbd",
    "sbd:commit=prefix",
    "sbd-lossless",
    "sbd-lossless:look_ahead=auto",
    "prompt-lookup",
    "dfm:sampler=topk",
]


@pytest.mark.parametrize("size", [HUGE, CONTEXT + 1])
@pytest.mark.parametrize("spec", SPECS)
def test_a_block_is_no_longer_than_the_context(tiny, spec, size):
    model, _ = load_model(tiny)
    decoder = decoder_from_spec(f"{spec}{',' if ':' in spec else ':'}block_size={size}")
    with pytest.raises(
        ValueError, match=f"block_size must be from 1 to {CONTEXT}, the context of the model, got {size}"
    ):
        model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, custom_generate=decoder)


@pytest.mark.parametrize("where", ["model", "adapter"])
def test_nor_is_that_of_a_default_decoder(setflow, tiny, tmp_path, where):
    model, tokenizer = load_model(tiny)
    model.generation_config._from_model_config = False
    model.generation_config.decoder = f"sbd-lossless:block_size={HUGE}"
    if where == "model":
        model.save_pretrained(tmp_path)
    else:
        adapter = GatedAdapter(model, 2, 4)
        model.generation_config.mask_token_id = 3
        adapter.save(model, tmp_path)
    tokenizer.save_pretrained(tmp_path)
    for command in (["generate", "1 + 1"], ["eval", "trace", "1 + 1"]):
        code, _, err = setflow(*command, "--model", str(tmp_path))
        assert code == 2 and f"error: block_size must be from 1 to {CONTEXT}" in err and "Traceback" not in err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective_options": {"block_sizes": [4, HUGE]}}, "objective_options.block_sizes must be at most"),
        ({"objective": "rpt", "objective_options": {"window": HUGE}}, "objective_options.window must be at most"),
        (
            {"objective": "sbd+rpt", "objective_options": {"resample": {"window": 65}}},
            "objective_options.resample.window",
        ),
        ({"objective": "dfm", "objective_options": {"block_sizes": [65]}}, "objective_options.block_sizes must be"),
        ({"held_out": ["a.jsonl"], "measure": {"block_size": HUGE}}, "measure.block_size must be at most"),
    ],
)
def test_nor_do_recipes_train_longer_ones_than_their_rows(changes, message):
    pytest.importorskip("peft", reason="needs the extra [train]")
    recipe = {"output": "o", "model": "m/n", "data": ["a.jsonl"], "objective": "sbd", "sequence_length": 64} | changes
    with pytest.raises(ValueError, match=f"{message}.*"):
        Recipe.from_dict(json.loads(json.dumps(recipe)))


@pytest.mark.parametrize("look_ahead", ["all", "auto", 200])
def test_look_ahead_blocks_are_bounded_together(model_folder, count_rows, look_ahead):
    model, _ = load_model(str(model_folder(max_position_embeddings=512)))
    ids = torch.arange(3, 400)[None]
    arguments = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 100, "do_sample": False}
    decoder = SelfSpeculativeDecoder(block_size=256, look_ahead=look_ahead, mask_token_id=1)
    with pytest.raises(ValueError, match=rf"block_size=256 with look_ahead={look_ahead!r} has forwards of \d+ rows"):
        model.generate(ids, custom_generate=decoder, **arguments)
    assert not count_rows
    SelfSpeculativeDecoder(block_size=256, look_ahead=0, mask_token_id=1).check(model, LogitsPipeline([], False))


def test_block_sizes_of_a_recipe_are_sizes(tmp_path):
    for sizes in (8, "8", [], [0], ["x"], [2.5]):
        with pytest.raises(ValueError, match="block_sizes"):
            build_objective("sbd", {"block_sizes": sizes})
        with pytest.raises(ValueError, match="block_sizes"):
            build_objective("dfm", {"block_sizes": sizes})
    assert build_objective("sbd", {"block_sizes": [4, 8]}).block_sizes == (4, 8)
