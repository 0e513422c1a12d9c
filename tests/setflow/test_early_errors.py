"""What only needs the user's words is answered before anything that takes long is imported. No clock is asked."""

import json
import subprocess
import sys

import pytest

from setflow.commands.settings import has_gpu_driver

HEAVY = ("torch", "transformers", "datasets", "lm_eval.api", "peft", "matplotlib", "tokenizers")
RUN = f"""
import contextlib, io, json, sys
from setflow.cli import main
for arguments in json.load(sys.stdin):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(arguments)
    loaded = [name for name in {HEAVY} if name in sys.modules]
    print(json.dumps([code, out.getvalue(), err.getvalue(), loaded]))
"""

NAMES = [  # what each command that decodes says about model, decoder and dtype
    (["--decoder", "sdb"], "unknown decoder 'sdb', did you mean 'sbd'?"),
    (["--decoder", "sbd:blok_size=4"], "unknown key 'blok_size', did you mean 'block_size'?"),
    (["--decoder", "sbd:block_size=0"], "block_size must be a whole number of at least 1, got 0"),
    (["--decoder", "sbd-lossless:block_size=1"], "block_size must be a whole number of at least 2, got 1"),
    (["--decoder", "sbd:entropy_bound=-1"], "entropy_bound must be a number"),
    (["--decoder", "rpt:window=1"], "window must be"),
    (["--decoder", "dfm:path=msk"], "path must be one of 'mask', 'uniform', got 'msk'"),
    (["--decoder", "dfm:stps=4"], "unknown key 'stps', did you mean 'steps'?"),
    (["--model", "no-such-folder"], "model 'no-such-folder' does not exist"),
    (["--model", "./no/such"], "model './no/such' does not exist"),
    (["--model", "FILE"], "is a file; give the folder that holds it"),
    (["--model", "EMPTY"], "has no config.json, so there is no model in it"),
    (["--dtype", "fp8"], "dtype must be one of bf16, fp32, got 'fp8'"),
]
OTHERS = [
    (["generate", ""], "the prompt is empty"),
    (["eval", "--tasks", "gms8k"], "got 'gms8k', did you mean 'gsm8k'?"),
    (["eval", "--tasks", ""], "tasks must be names separated by commas, got ''"),
    (["eval", "--tasks", "additions,"], "tasks must be names separated by commas, got 'additions,'"),
    (["eval", "--data", "./no/such"], "data must be a folder, got 'no/such'"),
    (["eval", "--limit", "0"], "limit must be a number in (0, inf]"),
    (["eval", "--batch-size", "many"], "batch_size must be a whole number"),
    (["eval", "--device", "gpu"], "device must be one of cpu, cuda"),
    (["eval", "sweep", "--vary", "block_size"], "vary must be KEY=VALUE"),
    (["eval", "sweep", "--vary", "block_sise=4"], "vary: 'block_sise' is no key of"),
    (["eval", "sweep", "--vary", "order=left"], "order must be one of"),
    (["eval", "sweep", "--control", "./no/such"], "model './no/such' does not exist"),
    (["eval", "report", "./no/such"], "has no sweep"),
    (["finetune", "no-such-recipe"], "recipe 'no-such-recipe' is no file and no packaged recipe; those are"),
    (["finetune", "embeded-ntp"], "did you mean 'embedded-ntp'?"),
    (["finetune", "embedded-ntp", "leraning=1"], "unknown key 'leraning'"),
    (["finetune", "embedded-ntp", "sequence_length"], "an override has the form key=value"),
    (["finetune", "embedded-sbd", "model=./none"], "model: the folder './none' does not exist"),
    (["finetune", "embedded-sbd", "decoder=sbd:blok_size=1"], "unknown key 'blok_size'"),
    (["finetune", "distill-data", "./none", "out.jsonl"], "model './none' does not exist"),
    (
        ["finetune", "distill-data", "owner/name", "out.jsonl", "--prompts", "none.jsonl"],
        "prompts: the file 'none.jsonl'",
    ),
    (["finetune", "fit-sampler", "./none", "out.json", "--texts", "x.jsonl"], "model './none' does not exist"),
    (["finetune", "fit-sampler", "owner/name", "out.json", "--texts", "none.jsonl"], "texts: the file 'none.jsonl'"),
    (["finetune", "accelerate-config", "dpp"], "accelerate-config must be one of ddp"),
]
if not has_gpu_driver():  # with one, it is PyTorch that knows
    commands = (["eval"], ["bench", "speed"], ["bench", "lossless"])
    OTHERS += [([*command, "--device", "cuda:1"], "it has no driver of a GPU, got 'cuda:1'") for command in commands]


def test_mistakes_are_answered_before_torch_is_imported(tmp_path):
    for extra in ("lm_eval", "matplotlib", "datasets", "peft", "accelerate"):
        pytest.importorskip(extra, reason=f"needs {extra}: install the extras [eval] and [train]")
    (tmp_path / "empty").mkdir()
    (tmp_path / "weights.safetensors").touch()
    places = {"EMPTY": "empty", "FILE": "weights.safetensors"}
    commands = (["generate", "x"], ["chat"], ["eval"], ["eval", "sweep"], ["eval", "trace", "x"])
    cases = [([*command, *arguments], sentence) for command in commands for arguments, sentence in NAMES] + OTHERS
    cases = [([places.get(argument, argument) for argument in arguments], sentence) for arguments, sentence in cases]
    given = json.dumps([arguments for arguments, _ in cases])
    done = subprocess.run(
        [sys.executable, "-c", RUN], input=given, capture_output=True, text=True, cwd=tmp_path, timeout=300
    )
    lines = done.stdout.splitlines()
    assert len(lines) == len(cases), done.stderr
    for (arguments, sentence), line in zip(cases, lines, strict=True):
        code, out, err, loaded = json.loads(line)
        assert (code, out, loaded) == (2, "", []), (arguments, code, out, err, loaded)
        assert err.startswith("error: ") and sentence in err and err.count("\n") == 1, (arguments, err)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "weights.safetensors"]


def test_what_needs_no_model_needs_no_torch():
    given = json.dumps([["--version"], ["finetune", "accelerate-config", "ddp"], ["eval", "--help"]])
    done = subprocess.run([sys.executable, "-c", RUN], input=given, capture_output=True, text=True, timeout=300)
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(code, loaded) for code, _, _, loaded in answers] == [(0, [])] * 3, done.stderr
