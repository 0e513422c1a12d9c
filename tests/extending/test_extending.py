"""What somebody else would add, each a class in a file of its own: used from Python and by name, with no edit elsewhere."""

from pathlib import Path

import pytest
import torch
import yaml
from typer.testing import CliRunner

from decoding import decoder_from_spec
from dfm import FlowDecoder
from finetune.objectives import build_objective
from finetune.recipe import load_recipe
from sbd import SelfSpeculativeDecoder, SetBlockDecoder
from setflow.cli import app
from tests.extending.decoder import Patient
from tests.extending.draft_source import Counting
from tests.extending.objective import Smoothed
from tests.extending.reveal_rule import FallingLine
from tests.extending.sampler import LeftToRight

HERE = Path(__file__).parent
MODULE = "tests.extending"
EXTENSIONS = {
    f"sbd:block_size=4,rule={MODULE}.reveal_rule:FallingLine,start=0.3,slope=0.1": SetBlockDecoder(
        4, FallingLine(0.3, 0.1)
    ),
    f"sbd-lossless:block_size=4,draft={MODULE}.draft_source:Counting": SelfSpeculativeDecoder(4, draft=Counting),
    f"sbd-lossless:block_size=4,draft=mask+{MODULE}.draft_source:Counting": None,
    f"dfm:block_size=4,steps=2,sampler={MODULE}.sampler:LeftToRight": FlowDecoder(
        block_size=4, steps=2, sampler=LeftToRight
    ),
    f"{MODULE}.decoder:Patient:looks=3": Patient(3),
}


def generate(model, inputs, decoder, **settings):
    settings = {"max_new_tokens": 12, "do_sample": False, "return_dict_in_generate": True, **settings}
    return model.generate(**inputs, custom_generate=decoder, **settings)


@pytest.mark.parametrize("spec", EXTENSIONS)
def test_by_name_and_from_python_they_do_the_same(shared_model, prompts, spec):
    model, inputs, decoder = shared_model("llama"), prompts(9, 5), EXTENSIONS[spec]
    by_name = generate(model, inputs, decoder_from_spec(spec))
    assert by_name.new_tokens.tolist() == [12, 12]
    if decoder is not None:
        assert torch.equal(by_name.sequences, generate(model, inputs, decoder).sequences)


@pytest.mark.parametrize("spec", EXTENSIONS)
def test_the_command_line_takes_them(spec):
    result = CliRunner().invoke(app, ["generate", "1 + 2 = ?\n", "--decoder", spec, "--max-new-tokens", "8"])
    assert result.exit_code == 0, result.output


def test_the_rule_decides_what_is_revealed(shared_model, prompts):
    """With a line that nothing is above one token a forward is revealed, with one below everything the whole block."""
    model, inputs = shared_model("llama"), prompts(9)
    forwards = [int(generate(model, inputs, SetBlockDecoder(4, FallingLine(start, 0))).forwards) for start in (1, 0)]
    assert forwards == [12, 3]


def test_the_draft_source_is_asked_and_the_text_stays(shared_model, prompts):
    """On a model that repeats one token counting is right, and the text is that of generate anyway."""
    model, inputs = shared_model("llama"), prompts(9)
    calm = generate(model, inputs, None)
    assert torch.equal(generate(model, inputs, SelfSpeculativeDecoder(4, draft=Counting)).sequences, calm.sequences)
    forced = {"sequence_bias": [[[7], 1e4]]}
    output = generate(model, inputs, SelfSpeculativeDecoder(4, draft=Counting), **forced)
    assert output.sequences[0, 9:].tolist() == [7] * 12
    assert output.forwards.item() < 12 and max(output.acceptance_lengths[0]) == 3


def test_the_sampler_reveals_from_left_to_right(shared_model, prompts):
    output = generate(shared_model("llama"), prompts(9, 5), FlowDecoder(block_size=4, steps=2, sampler=LeftToRight))
    assert output.trace == ([1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6],) * 2


def test_the_decoder_looks_as_often_as_it_is_told(shared_model, prompts):
    model, inputs = shared_model("llama"), prompts(9, 5)
    output = generate(model, inputs, Patient(3))
    assert torch.equal(output.sequences, generate(model, inputs, None).sequences)
    assert output.forwards.tolist() == [36, 36]


def test_the_objective_trains_from_a_recipe(tmp_path, shared_model):
    """Options are its fields; without smoothing the loss is that of next-token training."""
    recipe = {"output": "out", "model": "m", "objective": f"{MODULE}.objective:Smoothed", "data": [{"path": "x.jsonl"}]}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(recipe | {"objective_options": {"smoothing": 0.2}}))
    loaded = load_recipe(tmp_path / "own.yaml")
    assert build_objective(loaded.objective, loaded.objective_options) == Smoothed(0.2)
    batch = {"input_ids": torch.arange(3, 27)[None], "document_ids": torch.zeros(1, 24, dtype=torch.long)}
    model = shared_model("llama")
    plain, _ = build_objective("ntp", {})(model, batch)
    ours, metrics = Smoothed(0.0)(model, batch)
    torch.testing.assert_close(ours, plain)
    assert metrics["num_targets"] == 23 and Smoothed(0.2)(model, batch)[0] != plain


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (f"sbd:rule={MODULE}.reveal_rule:Missing", "Missing"),
        (f"sbd:rule={MODULE}.draft_source:Counting", "is no dataclass"),
        (f"sbd:rule={MODULE}.reveal_rule:FallingLine,speed=3", "unknown key 'speed'"),
        (f"sbd:rule={MODULE}.reveal_rule:FallingLine,start=2", "start must be a number in"),
        ("sbd:rule=falling", "rule must be"),
        ("sbd-lossless:draft=no.such.module:Counting", "draft.*no.such.module"),
        ("no.such.module:Decoder", "no.such.module"),
        (f"{MODULE}.decoder:Patient:look=3", "unknown key 'look', did you mean 'looks'"),
        ("dfm:sampler=no.such.module:Sampler", "sampler.*no.such.module"),
    ],
)
def test_what_is_named_wrongly_is_said(spec, message):
    with pytest.raises(ValueError, match=message):
        decoder_from_spec(spec)


@pytest.mark.parametrize("path", sorted(HERE.glob("[a-z]*.py")), ids=lambda path: path.stem)
def test_each_is_one_short_file(path):
    if not path.stem.startswith("test_"):
        assert len(path.read_text().splitlines()) <= 40
