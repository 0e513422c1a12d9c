"""``setflow generate``: the text is the decoder's, the figures are true, mistakes get one sentence."""

import io
import json
import os
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from decoding.forward.costs import RowCosts

PROMPT = "47 + 5 = ?\n"


def expected(folder: str, new_tokens: int) -> str:
    """What stock ``model.generate`` says."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.tensor([tokenizer(PROMPT)["input_ids"]])
    output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False)
    return tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)


def test_json_holds_the_text_of_model_generate(setflow, tiny):
    code, out, err = setflow(
        "generate", PROMPT, "--model", tiny, "--decoder", "ntp", "--max-new-tokens", "20", "--json"
    )
    report = json.loads(out)
    assert (code, err) == (0, "")
    assert report["text"] == expected(tiny, 20)
    assert report["decoder"] == "ntp" and report["dtype"] == "float32"
    assert report["tokens"] == report["forwards"] == 20 and report["tokens_per_forward"] == 1
    assert "compare" not in report


def test_comparison_measures_both_baselines(setflow, tiny):
    spec = "sbd-lossless:block_size=4"
    code, out, _ = setflow(
        "generate", PROMPT, "--model", tiny, "--decoder", spec, "--max-new-tokens", "20", "--json", "--compare"
    )
    report = json.loads(out)
    assert code == 0 and report["same_text"] is True and report["text"] == expected(tiny, 20)
    assert set(report["compare"]) == {"ntp", "model.generate"}
    assert report["speed_up"] == pytest.approx(
        report["tokens_per_second"] / report["compare"]["model.generate"]["tokens_per_second"], rel=0.02
    )


def test_plain_text_goes_to_stdout_and_figures_to_stderr(setflow, tiny):
    code, out, err = setflow("generate", PROMPT, "--model", tiny, "--decoder", "ntp", "--max-new-tokens", "20")
    assert code == 0 and out.rstrip("\n") == (PROMPT + expected(tiny, 20)).rstrip("\n")
    assert "\x1b" not in out + err
    assert err.startswith("ntp: 20 tokens, 20 forwards, 1.00 tokens per forward, ")


def test_comparison_as_a_table_says_whether_the_text_is_the_same(setflow, tiny):
    arguments = ("generate", PROMPT, "--model", tiny, "--max-new-tokens", "30", "--compare")
    code, _, err = setflow(*arguments, "--decoder", "prompt-lookup:block_size=4")
    assert code == 0 and err.endswith("text: the same as next-token decoding's\n")
    assert [line.split()[0] for line in err.splitlines()[:4]] == [
        "decoder",
        "prompt-lookup:block_size=4",
        "ntp",
        "model.generate",
    ]
    code, _, err = setflow(*arguments, "--decoder", "sbd:block_size=8,entropy_bound=100")
    assert code == 0 and "text: differs from next-token decoding's from token " in err
    code, _, err = setflow(*arguments, "--temperature", "1")
    assert code == 0 and "text: sampled, so not compared" in err


def test_default_decoder(setflow, tiny, model_folder):
    def default(folder: str) -> str:
        return json.loads(setflow("generate", PROMPT, "--model", folder, "--max-new-tokens", "4", "--json")[1])[
            "decoder"
        ]

    assert default(tiny) == "sbd:block_size=16,entropy_bound=0.1"
    assert default(model_folder(mask_token=False)) == "ntp"
    named = model_folder()
    with open(f"{named}/generation_config.json", "w") as file:
        json.dump({"decoder": "sbd-lossless:block_size=4", "eos_token_id": 1, "pad_token_id": 2}, file)
    assert default(named) == "sbd-lossless:block_size=4"


def test_a_seed_repeats_a_sample(setflow, tiny):
    def text(seed: int) -> str:
        arguments = ("--model", tiny, "--max-new-tokens", "20", "--temperature", "1", "--seed", str(seed), "--json")
        return json.loads(setflow("generate", PROMPT, *arguments)[1])["text"]

    assert text(1) == text(1) != text(2)


@pytest.mark.parametrize("draft", ["mask", "prompt_lookup", "both"])
def test_a_seed_repeats_a_sample_whatever_the_load_of_the_machine(setflow, tiny, monkeypatch, draft):
    texts = set()
    for seconds in (lambda rows: 1.0, float):  # rows that are free, and rows that cost
        monkeypatch.setattr(
            "decoding.engine.measure_row_costs",
            lambda step, most, seconds=seconds: RowCosts(range(1, most + 1), [seconds(r) for r in range(1, most + 1)]),
        )
        spec = f"sbd-lossless:look_ahead=auto,block_size=4,draft={draft}"
        arguments = ("--model", tiny, "--temperature", "1", "--seed", "3", "--max-new-tokens", "40", "--json")
        texts.add(json.loads(setflow("generate", PROMPT, *arguments, "--decoder", spec)[1])["text"])
    assert len(texts) == 1


def test_dtype_and_prompt_from_standard_input(setflow, tiny, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(PROMPT))
    code, out, _ = setflow("generate", "-", "--model", tiny, "--dtype", "bf16", "--max-new-tokens", "4", "--json")
    report = json.loads(out)
    assert code == 0 and report["dtype"] == "bfloat16" and report["prompt"] == PROMPT


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["generate", ""], "error: the prompt is empty"),
        (["generate", "x", "--model", "no-such-folder"], "error: model 'no-such-folder' does not exist"),
        (["generate", "x", "--model", "./no/such"], "error: model './no/such' does not exist"),
        (["generate", "x", "--model", "tests/no-such"], "error: model 'tests/no-such' does not exist"),
        (["generate", "x", "--model", "no-such/model"], "error: model 'no-such/model' cannot be loaded: "),
        (["generate", "x", "--model", "EMPTY"], "has no config.json"),
        (["generate", "x", "--model", "TINY", "--decoder", "sdb"], "error: unknown decoder 'sdb', did you mean 'sbd'?"),
        (["generate", "x", "--model", "TINY", "--decoder", "sbd:blok_size=4"], "unknown key 'blok_size', did you mean"),
        (["generate", "x", "--model", "TINY", "--decoder", "sbd:block_size=0"], "error: block_size must be"),
        (["generate", "x", "--model", "TINY", "--dtype", "fp8"], "error: dtype must be one of bf16, fp32, got 'fp8'"),
        (["generate", "x", "--model", "TINY", "--max-new-tokens", "0"], "--max-new-tokens"),
        (["generate", "x", "--model", "TINY", "--temperature", "-1"], "--temperature"),
        (["generate", "x", "--model", "TINY", "--max-new-tokens", "1000"], "error: max_new_tokens must be from 1 to 9"),
        (["generate", "1 " * 99, "--model", "TINY"], "error: the prompt is too long: it has "),
        (["generate", "x", "--model", "UNMASKED", "--decoder", "sbd"], "error: mask_token_id: this model has no mask"),
        (["generate", "x", "--unknown"], "No such option: --unknown"),
        (["unknown"], "No such command 'unknown'"),
        (["finetune", "no-such-recipe"], "error: recipe 'no-such-recipe' is no file and no packaged recipe; those are"),
        (["finetune", "embedded-sbd", "model=tests/none"], "error: model: the folder 'tests/none' does not exist"),
        (["finetune", "embedded-ntp", "leraning=1"], "error: unknown key 'leraning'"),
        (["chat", "--model", "no-such-folder"], "error: model 'no-such-folder' does not exist"),
    ],
)
def test_mistakes_get_one_sentence_and_exit_code_2(setflow, tiny, model_folder, tmp_path, arguments, sentence):
    folders = {"TINY": lambda: tiny, "EMPTY": lambda: str(tmp_path), "UNMASKED": lambda: model_folder(mask_token=False)}
    code, out, err = setflow(*(folders.get(argument, lambda a=argument: a)() for argument in arguments))
    assert code == 2 and out == "" and sentence in err
    assert "Traceback" not in err and (not err.startswith("error") or err.count("\n") == 1)


def test_ctrl_c_ends_without_a_traceback(setflow, tiny, monkeypatch):
    def stopped(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("setflow.run.run", stopped)
    code, out, err = setflow("generate", "x", "--model", tiny)
    assert code == 130 and out == "" and "Traceback" not in err


def test_weights_that_are_missing_from_the_files_are_named(setflow, tiny, tmp_path):
    shutil.copytree(tiny, tmp_path / "model")
    weights = load_file(tmp_path / "model/model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, tmp_path / "model/model.safetensors", metadata={"format": "pt"})
    code, _, err = setflow("generate", "x", "--model", str(tmp_path / "model"), "--max-new-tokens", "2")
    assert code == 0 and "warning: model " in err and "model.norm.weight" in err


@pytest.fixture
def stopping(tiny, tmp_path) -> tuple[str, str]:
    """A model whose generation config has stop strings, one of which comes after a few tokens; and that string."""
    text = expected(tiny, 30)
    stop = next(text[i : i + 2] for i in range(5, len(text)) if text[i : i + 2] not in text[:i])
    folder = tmp_path / "stopping"
    shutil.copytree(tiny, folder)
    config = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(config | {"stop_strings": ["no such", stop]}))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 192}))
    return str(folder), stop


@pytest.mark.parametrize("decoder", ["ntp", "sbd-lossless:block_size=4", "prompt-lookup:block_size=4"])
def test_stop_strings_of_a_generation_config_are_honoured(setflow, tiny, stopping, decoder):
    folder, stop = stopping
    arguments = ("--model", folder, "--decoder", decoder, "--max-new-tokens", "30", "--json", "--compare")
    code, out, err = setflow("generate", PROMPT, *arguments)
    report = json.loads(out)
    assert code == 0, err
    assert stop in report["text"] and stop not in report["text"][:-2] and report["same_text"]
    assert expected(tiny, 30).startswith(report["text"]) and report["tokens"] < 30


@pytest.mark.parametrize("command", ["chat", "trace", "eval", "distill-data", "finetune", "bench"])
def test_every_command_takes_a_model_with_stop_strings(setflow, stopping, tmp_path, monkeypatch, command):
    for extra in ("lm_eval", "peft"):
        pytest.importorskip(extra, reason=f"needs {extra}: install the extras [eval] and [train]")
    folder, _ = stopping
    lines = iter(["1 + 1 = ?"])

    def read(prompt=""):
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", read)
    data = tmp_path / "data.jsonl"
    data.write_text('{"text": "1 + 1 = 2, 2 + 2 = 4, 3 + 3 = 6"}\n' * 30)
    recipe = {"output": str(tmp_path / "out"), "model": folder, "data": [str(data)], "held_out": [str(data)]}
    recipe |= {"objective": "sbd", "sequence_length": 32, "training": {"max_steps": 1, "use_cpu": True}}
    recipe |= {"measure": {"decoders": ["ntp"], "prompts": 1, "prompt_tokens": 4, "max_new_tokens": 8, "rows": 1}}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    small = ("--tasks", "additions", "--limit", "1", "--max-gen-toks", "4")
    arguments = {
        "chat": ("chat", "--model", folder),
        "trace": ("eval", "trace", PROMPT, "--model", folder),
        "eval": ("eval", "--model", folder, *small),
        "distill-data": ("finetune", "distill-data", folder, str(tmp_path / "own.jsonl"), "--samples", "2"),
        "finetune": ("finetune", str(tmp_path / "recipe.yaml")),
        "bench": ("bench", "lossless", "--model", folder, "--count", "1", "--batch-size", "1", "--prompts", str(data)),
    }[command]
    if command in ("distill-data", "finetune", "bench"):
        monkeypatch.chdir(tmp_path)
    code, _, err = setflow(*arguments)
    assert code == 0 and "error: " not in err, err


NO_UTF8 = {"latin-1": b"caf\xe9", "half a character": "\N{SNOWMAN}".encode()[:2], "utf-16": "ab".encode("utf-16")}


@pytest.mark.parametrize("name", NO_UTF8)
@pytest.mark.parametrize("errors", ["surrogateescape", "strict"])
@pytest.mark.parametrize("command", ["generate", "trace", "chat"])
def test_bytes_that_are_no_text(setflow, tiny, monkeypatch, name, errors, command):
    """Whatever Python was told to do with them, which the locale decides."""
    given = io.TextIOWrapper(io.BytesIO(NO_UTF8[name] + b"\n"), "utf-8", errors)
    monkeypatch.setattr("sys.stdin", given)
    monkeypatch.setattr("builtins.input", lambda prompt="": given.readline() or (_ for _ in ()).throw(EOFError))
    commands = {"generate": ["generate", "-"], "trace": ["eval", "trace", "-"], "chat": ["chat"]}
    code, out, err = setflow(*commands[command], "--model", tiny)
    assert out == "" and "error: the prompt is not UTF-8 text" in err and "Traceback" not in err
    assert code == (0 if command == "chat" else 2)


def test_an_argument_that_is_no_text(setflow, tiny):
    code, _, err = setflow("generate", os.fsdecode(b"caf\xe9"), "--model", tiny)
    assert code == 2 and err == "error: the prompt is not UTF-8 text; convert it, for instance with iconv\n"


def test_a_comparison_in_bf16_gives_the_reason(setflow, tiny, monkeypatch):
    from setflow.commands import generate

    monkeypatch.setattr(generate, "_first_difference", lambda run, other: 6)  # such ties are rare
    said = {}
    for dtype in ("bf16", "fp32"):
        for spec in ("sbd-lossless:block_size=4", "sbd:block_size=4"):
            arguments = ("--decoder", spec, "--dtype", dtype, "--max-new-tokens", "4", "--compare")
            said[dtype, spec[:6]] = setflow("generate", PROMPT, "--model", tiny, *arguments)[2].splitlines()[-1]
    reason = "bfloat16 rounds a forward of more rows otherwise"
    assert {key for key, line in said.items() if reason in line} == {("bf16", "sbd-lo")}
    assert all("from token 6 on" in line for line in said.values())


def test_options_for_speed_do_what_they_say(setflow, tiny, monkeypatch):
    """The text of --compile is the same; --quantize says what it lacks, where it lacks it."""
    from decoding import Engine

    asked, original = [], Engine.forward
    monkeypatch.setattr(Engine, "forward", lambda self, *a: (asked.append(self.compile), original(self, *a))[1])
    arguments = ("generate", PROMPT, "--model", tiny, "--decoder", "ntp", "--max-new-tokens", "6")
    code, out, _ = setflow(*arguments, "--compile")
    assert code == 0 and out.rstrip("\n") == (PROMPT + expected(tiny, 6)).rstrip("\n") and set(asked) == {True}
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    code, _, err = setflow(*arguments, "--quantize", "int8")
    assert code == 2 and "needs torchao" in err
    code, _, err = setflow(*arguments, "--quantize", "int2")
    assert code == 2 and "quantize must be one of 'int8', got 'int2'" in err
