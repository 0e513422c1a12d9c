"""A damaged or absurd model folder is one sentence and exit code 2, never a traceback, and runs no code."""

import json
import os
import pickle
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

MARKER = "SETFLOW_TEST_PICKLE_RAN"


class Evil:
    """A pickle that runs a command when it is read."""

    def __reduce__(self):
        return os.putenv, (MARKER, "1")


def edit(file: str, **changes) -> Callable[[Path], None]:
    def do(folder: Path) -> None:
        path = folder / file
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return do


def holds(file: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / file).write_bytes(content)


def cut(file: str) -> Callable[[Path], None]:
    def do(folder: Path) -> None:
        content = (folder / file).read_bytes()
        (folder / file).write_bytes(content[: len(content) // 2])

    return do


def weights(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def do(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return do


def pickled(value, plain: bool = False, part: float = 1.0) -> Callable[[Path], None]:
    def do(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        path = folder / "pytorch_model.bin"
        path.write_bytes(pickle.dumps(value)) if plain else torch.save(value, path)
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * part)])

    return do


def sharded(index: str) -> Callable[[Path], None]:
    def do(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors.index.json").write_text(index)

    return do


def generation(**changes) -> Callable[[Path], None]:
    return edit("generation_config.json", _from_model_config=False, **changes)


DEEP = b"[" * 100_000
FILES = {
    **{f"{file}: cut": cut(file) for file in ("config.json", "tokenizer.json", "tokenizer_config.json")},
    **{f"{file}: empty": holds(file, b"") for file in ("config.json", "generation_config.json", "tokenizer.json")},
    **{f"{file}: a list": holds(file, b"[1]") for file in ("config.json", "generation_config.json", "tokenizer.json")},
    **{
        f"{file}: deep": holds(file, DEEP)
        for file in ("config.json", "generation_config.json", "tokenizer_config.json")
    },
    **{f"{file}: no UTF-8": holds(file, b'{"a": "\xe9"}') for file in ("generation_config.json", "tokenizer.json")},
    "generation_config.json: cut": cut("generation_config.json"),
    "weights: cut": cut("model.safetensors"),
    "weights: empty": holds("model.safetensors", b""),
    "weights: garbage": holds("model.safetensors", bytes(range(256)) * 20),
    "weights: an endless header": holds("model.safetensors", b"\xff" * 8 + bytes(100)),
    "weights: other shapes": weights(lambda w: w.update({"model.layers.0.mlp.down_proj.weight": torch.zeros(3, 5)})),
    "weights: other ranks": weights(lambda w: w.update({"model.embed_tokens.weight": torch.zeros(7)})),
    "weights: none": lambda folder: (folder / "model.safetensors").unlink(),
    "pickle: runs code": pickled({"a": Evil()}),
    "pickle: runs code, old form": pickled(Evil(), plain=True),
    "pickle: cut": pickled({"a": torch.zeros(3)}, part=0.5),
    "pickle: empty": pickled({}, part=0),
    "pickle: a list": pickled([1, 2]),
    "shards: missing": sharded(
        json.dumps({"metadata": {}, "weight_map": {"lm_head.weight": "model-1-of-2.safetensors"}})
    ),
    "shards: no map": sharded("{}"),
    "shards: no JSON": sharded("{"),
}
CONFIGS = {
    "model_type": ["nothing", 5, "t5", "bert", "mamba"],
    "vocab_size": [0, -1, "x", 5],
    "hidden_size": [33, -4, None],
    "num_hidden_layers": [-1, "x", 10**9],
    "num_attention_heads": [0, 3],
    "max_position_embeddings": [0, "x"],
    "rope_parameters": [5, {"rope_type": "nothing"}, {"rope_type": "yarn"}],
    "hidden_act": ["nothing"],
    "dtype": ["x", "int8"],
    "layer_types": [["x"]],
    "quantization_config": [5, {}],
    "noise_level_rows": ["x", -1, 10**9],
    "sliding_window": ["x"],
}
# Of the wrong type, and impossible or refused whatever the decoder.
GENERATION = {
    "temperature": ["x"],
    "top_k": ["x", 2.5],
    "top_p": ["x"],
    "repetition_penalty": ["x", 0, -1],
    "eos_token_id": ["x", [1, "x"], {}, 2.5],
    "bos_token_id": ["x"],
    "pad_token_id": ["x"],
    "mask_token_id": ["x", 10**9, -1],
    "max_length": ["x"],
    "max_new_tokens": ["x", -1],
    "min_length": ["x"],
    "min_new_tokens": ["x"],
    "num_beams": ["x", 4],
    "num_return_sequences": ["x", 3],
    "no_repeat_ngram_size": ["x"],
    "suppress_tokens": ["x", ["a"], 5],
    "begin_suppress_tokens": [5],
    "bad_words_ids": ["x", [["a"]], []],
    "sequence_bias": [5],
    "forced_eos_token_id": ["x", 10**9],
    "exponential_decay_length_penalty": ["x", [1], [1, "x"]],
    "stop_strings": [5, [5]],
    "max_time": ["x"],
    "trained_block_sizes": [5, ["a"]],
    "decoder": [5, ["ntp"], "", "nothing", "sbd:x=1", "sbd:block_size=0"],
    "guidance_scale": ["x"],
    "watermarking_config": [5],
    "penalty_alpha": [0.6],
}
TOKENIZERS = {"tokenizer_class": [5, "BertTokenizer"], "model_max_length": ["x"], "eos_token": [5]}
CASES = {
    **FILES,
    **{f"config: {k}={v!r}": edit("config.json", **{k: v}) for k, vs in CONFIGS.items() for v in vs},
    **{f"tokenizer: {k}={v!r}": edit("tokenizer_config.json", **{k: v}) for k, vs in TOKENIZERS.items() for v in vs},
}


@pytest.fixture
def damaged(tiny, tmp_path, monkeypatch):
    """``damaged(do)``: a copy of a model of which ``do(folder)`` was done."""
    monkeypatch.delenv(MARKER, raising=False)

    def make(do: Callable[[Path], None]) -> str:
        shutil.copytree(tiny, tmp_path / "model")
        do(tmp_path / "model")
        return str(tmp_path / "model")

    return make


def is_one_sentence(code: int, out: str, err: str) -> bool:
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    return code == 2 and out == "" and len(lines) == 1 and "Traceback" not in err and len(lines[0]) > 30


@pytest.mark.parametrize("name", CASES)
def test_generate_says_what_is_wrong_with_the_files(setflow, damaged, name):
    folder = damaged(CASES[name])
    code, out, err = setflow("generate", "1 + 1 = ", "--model", folder, "--max-new-tokens", "4")
    assert is_one_sentence(code, out, err), (code, err)
    assert subprocess.check_output(["sh", "-c", f"echo ${MARKER}"]) == b"\n"  # what a pickle would have set


@pytest.mark.parametrize("field", GENERATION)
def test_generate_says_what_is_wrong_with_the_generation_config(setflow, damaged, field, tmp_path):
    for value in GENERATION[field]:
        folder = damaged(generation(**{field: value}))
        arguments = ["--model", folder, "--max-new-tokens", "4"]
        code, out, err = setflow("generate", "1 + 1 = ", *arguments)
        assert is_one_sentence(code, out, err), (value, code, err)
        # By a decoder that is given it is one sentence as well, or it does not matter.
        code, out, err = setflow("generate", "1 + 1 = ", *arguments, "--decoder", "sbd-lossless:block_size=4")
        assert code == 0 or is_one_sentence(code, out, err), (value, code, err)
        shutil.rmtree(tmp_path / "model")


def test_what_looks_odd_and_can_be_run_is_run(setflow, damaged, tmp_path):
    for do in (
        plain_weights,
        generation(temperature=None, top_k=0, eos_token_id=[], pad_token_id=None),
        generation(unknown_field=5, transformers_version="9.9", max_length=3, min_length=-1),
        lambda folder: (folder / "generation_config.json").unlink(),
    ):
        folder = damaged(do)
        code, out, err = setflow("generate", "1 + 1 = ", "--model", folder, "--decoder", "ntp", "--max-new-tokens", "4")
        assert code == 0 and out, err
        shutil.rmtree(tmp_path / "model")


def plain_weights(folder: Path) -> None:
    """Pickled weights and nothing else, as models had them before safetensors."""
    tensors = load_file(folder / "model.safetensors")
    pickled(tensors)(folder)


@pytest.mark.parametrize("name", ["weights: cut", "config: hidden_size=33", "tokenizer.json: a list"])
@pytest.mark.parametrize("command", ["chat", "eval", "finetune", "distill-data"])
def test_the_other_commands_do_so_too(setflow, damaged, tmp_path, monkeypatch, name, command):
    for extra in ("lm_eval", "peft"):
        pytest.importorskip(extra, reason=f"needs {extra}: install the extras [eval] and [train]")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("builtins.input", lambda prompt="": (_ for _ in ()).throw(EOFError))
    folder = damaged(CASES[name])
    (tmp_path / "data.jsonl").write_text('{"text": "1 + 1 = 2"}\n' * 30)
    recipe = {"output": "out", "model": folder, "data": ["data.jsonl"], "objective": "ntp", "sequence_length": 16}
    (tmp_path / "r.yaml").write_text(json.dumps(recipe | {"training": {"max_steps": 1, "use_cpu": True}}))
    arguments = {
        "chat": ["chat", "--model", folder],
        "eval": ["eval", "--model", folder, "--tasks", "additions", "--limit", "1", "--max-gen-toks", "4"],
        "finetune": ["finetune", "r.yaml"],
        "distill-data": ["finetune", "distill-data", folder, "own.jsonl", "--samples", "2"],
    }[command]
    code, out, err = setflow(*arguments)
    assert is_one_sentence(code, out, err), (code, out, err)


@pytest.mark.parametrize("template", ["{{", "{{ messages[9].x.y }}", "{% for m in messages %}"])
def test_a_broken_chat_template(setflow, damaged, monkeypatch, template):
    def write(folder: Path) -> None:
        (folder / "chat_template.jinja").write_text(template)

    lines = iter(["hello"])
    monkeypatch.setattr("builtins.input", lambda prompt="": next(lines, None) or (_ for _ in ()).throw(EOFError))
    code, _, err = setflow("chat", "--model", damaged(write))
    assert code == 0 and "error: the chat template of" in err and "Traceback" not in err
