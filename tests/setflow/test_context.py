"""The context of a scaled rope is usable wherever a context counts: generate, chat, evaluation, recipes."""

import builtins
import json

import pytest
from transformers import AutoModelForCausalLM

from decoding.forward.rope import context_length, steady_length
from decoding.next_token import NextTokenDecoder
from sbd import SelfSpeculativeDecoder
from setflow.run import Settings

NATIVE, FACTOR = 64, 4
ROPES = {
    "default": ({"rope_type": "default"}, NATIVE, None),
    "yarn": ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": NATIVE}, NATIVE * FACTOR, None),
    "linear": ({"rope_type": "linear", "factor": 4.0}, NATIVE * FACTOR, None),
    "dynamic": ({"rope_type": "dynamic", "factor": 4.0}, NATIVE * FACTOR, NATIVE),
}
LENGTHENING = ["yarn", "linear"]


@pytest.fixture(scope="module")
def folders(model_folder):
    return {
        name: model_folder(
            max_position_embeddings=NATIVE, eos_token_id=None, rope_parameters={"rope_theta": 1e4, **rope}
        )
        for name, (rope, _, _) in ROPES.items()
    }


@pytest.fixture(params=ROPES)
def model(request, folders):
    return AutoModelForCausalLM.from_pretrained(folders[request.param]), *ROPES[request.param][1:]


def test_room_behind_a_prompt(model):
    model, context, steady = model
    assert (context_length(model.config), steady_length(model.config)) == (context, steady)
    for decoder in (None, NextTokenDecoder(), SelfSpeculativeDecoder(4)):
        ahead = 0 if decoder is None else decoder.rows_ahead
        end = context if decoder is None or steady is None else steady - ahead
        assert Settings().room(model, 10, decoder) == min(256, end - 10)
        assert Settings(5).room(model, 10, decoder) == 5
        assert Settings(500).room(model, 10, decoder, at_most=True) == min(500, end - 10)
    with pytest.raises(ValueError, match=f"max_new_tokens must be from 1 to {context - 10}, .* context of {context}"):
        Settings(context).room(model, 10)
    with pytest.raises(ValueError, match=f"the prompt is too long: it has {context} tokens"):
        Settings().room(model, context)


@pytest.mark.parametrize("name", [*LENGTHENING, "dynamic"])
def test_generate_goes_beyond_the_native_context(setflow, folders, name):
    prompt = "1 + " * 20
    arguments = ("--model", folders[name], "--decoder", "ntp", "--json")
    code, out, err = setflow("generate", prompt, *arguments)
    report = json.loads(out)
    assert code == 0 and err == "" and report["prompt_tokens"] > 40
    assert report["prompt_tokens"] + report["tokens"] == (NATIVE if name == "dynamic" else NATIVE * FACTOR)


def test_chat_goes_on_until_the_scaled_context_is_full(setflow, folders, monkeypatch):
    """Each answer takes at most --max-new-tokens, the last one what there is room for."""
    script = iter(["1 + 1 = ?"] * 12)

    def read(prompt=""):
        line = next(script, None)
        if line is None:
            raise EOFError
        return line

    monkeypatch.setattr(builtins, "input", read)
    code, out, err = setflow("chat", "--model", folders["yarn"], "--decoder", "ntp", "--max-new-tokens", "40")
    counts = [int(line.split()[0][1:]) for line in err.splitlines() if "tokens per forward" in line]
    assert code == 0 and counts[:2] == [40, 40] and 0 < counts[-1] < 40 and sum(counts) > NATIVE
    assert "error: the prompt is too long" in err


@pytest.mark.parametrize("name", ROPES)
def test_evaluation_keeps_what_fits_into_the_context(folders, name):
    pytest.importorskip("lm_eval", reason="needs lm-eval: install the extra [eval]")
    from eval.model import SetflowLM

    assert SetflowLM(folders[name], device="cpu").max_length == ROPES[name][1]
    assert SetflowLM(folders[name], device="cpu", max_length=32).max_length == 32


@pytest.mark.parametrize("name", ROPES)
def test_recipes_train_as_long_rows_as_the_context(setflow, folders, tmp_path, name):
    pytest.importorskip("peft", reason="needs the extra [train]")
    context = ROPES[name][1]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"text": f"{n} + 1 = {n + 1}\n" * 30}) + "\n" for n in range(20)))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"{{output: {tmp_path / 'out'}, model: {folders[name]}, tokenizer: {folders[name]}, data: [{data}], "
        "objective: ntp, training: {max_steps: 1, per_device_train_batch_size: 1, use_cpu: true}}"
    )
    code, _, err = setflow("finetune", str(recipe), f"sequence_length={context + 1}")
    assert code == 2 and f"sequence_length must be from 1 to {context}, the context of the model" in err
    code, _, err = setflow("finetune", str(recipe), f"sequence_length={context}")
    assert code == 0, err
