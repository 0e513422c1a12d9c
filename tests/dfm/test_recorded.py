"""What a seed gave once it gives again: runs of the embedded model in float64, recorded sequence by sequence."""

import json
import warnings
from pathlib import Path

import pytest
import torch

import setflow
from decoding import decoder_from_spec

PROMPTS = ["478 + 395 = ?\n", "def count_words(text):\n    ", "12 + 7 = ?\n"]
RECORDED = json.loads((Path(__file__).parent / "recorded.json").read_text())


@pytest.fixture(scope="module")
def embedded():
    model, tokenizer = setflow.load_embedded(torch.float64)
    return model, tokenizer(PROMPTS, return_tensors="pt", padding=True, padding_side="left")


@pytest.mark.parametrize("run", RECORDED, ids=lambda run: f"{run['decoder']}-{run['settings']['do_sample']}")
def test_a_seed_gives_the_recorded_text(embedded, run):
    """Tokens, forwards and trace of three ragged sequences; draws are in float64 and depend on no instruction set."""
    model, inputs = embedded
    model.config.flow = run["flow"]  # a mask model may be asked as if it were a uniform or a shifted one
    torch.manual_seed(11)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="block_size=.*: this model was trained")
        output = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=12,
            custom_generate=decoder_from_spec(run["decoder"]),
            return_dict_in_generate=True,
            **run["settings"],
        )
    new = output.sequences[:, inputs["input_ids"].shape[1] :].tolist()
    assert [row[:count] for row, count in zip(new, output.new_tokens.tolist(), strict=True)] == run["tokens"]
    assert output.forwards.tolist() == run["forwards"]
    assert [list(trace) for trace in output.trace] == run["trace"]
