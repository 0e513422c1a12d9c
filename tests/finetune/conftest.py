"""A tiny recipe that any test can change: four steps of a one-layer Llama on a page of text."""

import gc
import json
from types import SimpleNamespace

import pytest

from finetune import load_recipe
from finetune.distill import Distillation
from tests.conftest import EOS

TEXTS = [
    f"the {word} ate the {other}." for word in ("cat", "dog", "hen", "fox") for other in ("bread", "corn", "fish")
] * 6
NEW_MODEL = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
TRAINING = {
    "max_steps": 4,
    "per_device_train_batch_size": 2,
    "save_steps": 2,
    "logging_steps": 1,
    "use_cpu": True,
    "seed": 3,
    "learning_rate": 1e-2,
    "disable_tqdm": True,
}


@pytest.fixture(autouse=True)
def quick_collections():
    """A Trainer collects garbage when it starts, which takes longer than these runs where all libraries are looked at."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(params=[True, False], ids=["bf16", "no-bf16"])
def cpu(request, monkeypatch):
    """A machine without a GPU whose CPU has bf16 instructions, and one whose CPU has none, whatever this one is."""
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: request.param)
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: False)
    for name in ("ACCELERATE_MIXED_PRECISION", "ACCELERATE_USE_CPU", "RANK"):
        monkeypatch.delenv(name, raising=False)
    return SimpleNamespace(has_bf16=request.param)


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


@pytest.fixture
def recipe_path(tmp_path, data, tokenizer):
    """``recipe_path(**changes)``: the file of a run of four steps; ``training`` changes single arguments of it."""
    tokenizer.save_pretrained(tmp_path / "tokenizer")

    def write(output: str = "out", training: dict | None = None, **changes):
        values = {
            "output": str(tmp_path / output),
            "data": [str(data)],
            "held_out": [str(data)],
            "new_model": NEW_MODEL,
            "tokenizer": str(tmp_path / "tokenizer"),
            "objective": "sbd",
            "sequence_length": 32,
            "training": TRAINING | (training or {}),
        } | changes
        path = tmp_path / f"{output}.yaml"
        path.write_text(json.dumps(values))
        return path

    return write


@pytest.fixture
def recipe(recipe_path):
    """``recipe(**changes)``: the same, loaded."""
    return lambda *arguments, **changes: load_recipe(recipe_path(*arguments, **changes))


@pytest.fixture
def folder(fresh_model, tokenizer, tmp_path):
    """A random model with an EOS, and its tokenizer, in a folder."""
    model = fresh_model("llama", eos_token_id=EOS, initializer_range=0.05)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.fixture
def settings(folder, tmp_path):
    """``settings(records, **changes)``: six short samples, of prompts if ``records`` are given."""

    def make(*records: dict, **changes) -> Distillation:
        given = {"model": folder, "output": str(tmp_path / "own.jsonl"), "samples": 6, "batch_size": 2}
        if records:
            (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
            given["prompts"] = str(tmp_path / "prompts.jsonl")
        return Distillation(**given | {"max_new_tokens": 12} | changes)

    return make


def lines(settings: Distillation) -> list[dict]:
    return [json.loads(line) for line in open(settings.output, encoding="utf-8")]


def saying(*ids: int):
    """A generator that always says this."""
    return lambda prompts, seed: [list(ids) for _ in prompts]
