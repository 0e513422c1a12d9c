"""Steering from the command line: the text is a particle's, the figures are true, mistakes get one sentence."""

import json

import pytest
import torch

from decoding import decoder_from_spec
from setflow.loading import load_model

PROMPT = "47 + 5 = ?\n"
REWARDS = """
def short(completions):
    return [-0.2 * len(text) for text in completions]

def digits(completions, finished):
    return [0.5 * sum(c.isdigit() for c in text) for text in completions]

def broken(completions, finished):
    if max(map(len, completions)) > 3:
        raise KeyError("no such word")
    return [0.0] * len(completions)

def nothing(texts):
    return texts
"""


@pytest.fixture
def rewards(tmp_path, monkeypatch):
    """A file of a user's in the folder where the command is typed."""
    (tmp_path / "own_rewards.py").write_text(REWARDS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))


SAMPLED = ("--temperature", "1", "--seed", "3", "--max-new-tokens", "24")


def steer(setflow, tiny, *arguments):
    return setflow("generate", PROMPT, "--model", tiny, *SAMPLED, *arguments)


@pytest.mark.parametrize("spec", ["ntp", "sbd:block_size=4,entropy_bound=1", "sbd-lossless:block_size=4"])
def test_json_holds_every_particle(setflow, tiny, rewards, spec):
    code, out, err = steer(
        setflow, tiny, "--decoder", spec, "--reward", "own_rewards:digits", "--particles", "3", "--json"
    )
    report = json.loads(out)
    assert (code, err) == (0, "")
    assert report["decoder"] == f"smc:particles=3,reward=own_rewards:digits,decoder={spec}"
    steering = report["steering"]
    assert len(steering["particles"]) == 3 and steering["particles"][steering["chosen"]]["text"] == report["text"]
    for particle in steering["particles"]:
        assert particle["reward"] == pytest.approx(0.5 * sum(c.isdigit() for c in particle["text"]))
    assert steering["particle_forwards"] > report["forwards"] and len(steering["judgements"]) >= 2
    assert not steering["exhausted"] and isinstance(steering["log_normaliser"], float)

    model, tokenizer = load_model(tiny)
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    torch.manual_seed(3)
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=24,
        do_sample=True,
        temperature=1.0,
        tokenizer=tokenizer,
        custom_generate=decoder_from_spec(report["decoder"]),
    )
    assert tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True) == report["text"]


def test_the_default_decoder_is_steered_and_the_figures_are_told(setflow, tiny, rewards):
    code, out, err = steer(setflow, tiny, "--reward", "own_rewards:short")
    assert code == 0 and out.startswith(PROMPT)
    first, second = err.splitlines()
    assert first.startswith("smc:reward=own_rewards:short,decoder=sbd:block_size=16,entropy_bound=0.1: ")
    assert second.startswith("8 particles (") and "effective sample size" in second
    assert "target exp(reward(x)) q(x), q the distribution of SetBlockDecoder's own texts" in second


def test_the_trace_shows_the_lineage(setflow, tiny, rewards, tmp_path):
    spec = "smc:particles=3,reward=own_rewards:digits,every=4,ess_threshold=1,decoder=sbd:block_size=4,entropy_bound=1"
    command = ("eval", "trace", PROMPT, "--model", tiny, *SAMPLED, "--decoder", spec, "--out", str(tmp_path / "x.svg"))
    code, out, _ = setflow(*command)
    lines = out.splitlines()
    assert code == 0 and "%" in (tmp_path / "x.svg").read_text(encoding="utf-8")
    assert sum("%  " in line for line in lines) >= 3
    assert any("4 tokens: effective sample size" in line and "copies of" in line for line in lines)


def test_a_reward_that_fails_leaves_what_was_written(setflow, tiny, rewards):
    code, out, err = steer(setflow, tiny, "--reward", "own_rewards:broken", "--decoder", "ntp", "--particles", "2")
    assert (code, err) == (2, "error: reward 'broken' raised KeyError: 'no such word'\n")
    assert out.startswith(PROMPT) and len(out) > len(PROMPT) + 3


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["--particles", "4"],
            "error: particles need a --reward, or a decoder that says what to steer by, such as power",
        ),
        (
            ["--reward", "own_rewards:digits", "--decoder", "power"],
            "error: reward goes around a decoder, and 'power' is",
        ),
        (
            ["--reward", "own_rewards:nothing"],
            "error: reward 'nothing' has a parameter 'texts'; what it can be given is",
        ),
        (["--reward", "own_rewards:missing"], "error: reward 'own_rewards:missing' cannot be imported"),
        (["--reward", "./no-such-model"], "error: reward './no-such-model' does not exist"),
        (["--reward", "own_rewards:digits", "--particles", "0"], "Invalid value for '--particles'"),
        (
            ["--reward", "own_rewards:digits", "--decoder", "dfm"],
            "error: reward judges unfinished texts, but FlowDecoder",
        ),
        (["--decoder", "power:decoder=sbd"], "error: alpha needs a decoder that samples the next-token distribution"),
        (
            ["--reward", "own_rewards:digits", "--temperature", "0"],
            "error: particles must be 1 where nothing is sampled",
        ),
    ],
)
def test_mistakes_get_one_sentence(setflow, tiny, rewards, arguments, sentence):
    code, out, err = steer(setflow, tiny, *arguments)
    assert code == 2 and out == "" and sentence in err and "Traceback" not in err


def test_evaluation_takes_a_steered_decoder(tiny):
    pytest.importorskip("lm_eval", reason="needs the extra [eval]")
    from lm_eval.api.instance import Instance

    from eval.model import SetflowLM

    model, tokenizer = load_model(tiny)
    spec = "smc:particles=3;reward=benchmarks.steering.checkers:right_lines;every=4;decoder=sbd:block_size=4"
    lm = SetflowLM(model, tokenizer=tokenizer, decoder=spec, device="cpu", batch_size=2)
    settings = {"until": ["\n\n"], "max_gen_toks": 12, "do_sample": True, "temperature": 1.0}
    requests = [Instance("generate_until", {}, (f"{a} + 5 = ?\n", settings), a) for a in (47, 4)]
    texts = lm.generate_until(requests, disable_tqdm=True)
    assert len(texts) == 2 and [sample["batch_size"] for sample in lm.samples] == [2, 2]
    assert all(0 < sample["tokens"] <= 12 for sample in lm.samples)
