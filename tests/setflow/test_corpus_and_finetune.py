"""``setflow corpus`` and ``setflow finetune``: they reach the functions behind them, with the user's words."""

import importlib.util
import json
from functools import partial

import pytest

from setflow import corpus
from setflow.commands.finetune import find_recipe


def test_corpus_writes_texts_and_tokenizer(setflow, tmp_path, monkeypatch):
    small = partial(corpus.write_corpus, num_additions=20, num_held_out=5)
    monkeypatch.setattr(corpus, "library_pieces", lambda held_out: iter(["def f():\n    return 1\n"] * 3))
    monkeypatch.setattr(corpus, "write_corpus", small)
    code, out, err = setflow("corpus", str(tmp_path / "corpus"))
    assert code == 0 and out == ""
    assert "additions-train.jsonl: 20 texts" in err and "additions-heldout.jsonl: 5 texts" in err
    assert (tmp_path / "corpus/tokenizer/tokenizer.json").is_file()


def test_recipes_by_name_and_by_path(tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("{}")
    assert find_recipe(str(recipe)) == recipe
    assert find_recipe("embedded-ntp").name == "embedded-ntp.yaml"
    with pytest.raises(ValueError, match="those are .*embedded-ntp"):
        find_recipe("embedded")


def test_finetune_trains_and_reports(setflow, tiny, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"text": f"{n} + 1 = {n + 1}\n"}) + "\n" for n in range(60)))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"{{output: {tmp_path / 'out'}, model: {tiny}, data: [{data}], held_out: [{data}], objective: ntp,\n"
        "sequence_length: 32, training: {max_steps: 5, per_device_train_batch_size: 2, use_cpu: true}}"
    )
    code, _, err = setflow("finetune", str(recipe), "training.max_steps=2")
    assert code == 0 and "nats per token" in err
    assert json.loads((tmp_path / "out/training.json").read_text())["steps"] == 2


def test_finetune_names_the_extra_that_is_missing(setflow, monkeypatch):
    original = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *a: None if name == "accelerate" else original(name, *a)
    )
    code, _, err = setflow("finetune", "embedded-ntp")
    assert (
        code == 2
        and err == "error: this needs accelerate, which this installation lacks: pip install 'setflow[train]'\n"
    )
