"""``setflow corpus`` and ``setflow finetune``: they reach the functions behind them, with the user's words."""

import importlib.util
import json
import shutil
from functools import partial
from importlib.resources import files
from pathlib import Path

import pytest

from finetune.recipe import load_recipe
from finetune.recipe_file import find_recipe
from setflow import corpus


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
        find_recipe("no such recipe")
    with pytest.raises(ValueError, match="did you mean 'embedded-ntp'"):
        find_recipe("embeded-ntp")


def test_finetune_estimates_without_the_model(setflow):
    code, out, err = setflow("finetune", "--estimate", "llama3.1-8b-lora", "--gpu", "h200")
    assert code == 0 and err == ""
    assert "8.03 billion" in out and "fits into h200" in out and "tokens/s" in out
    code, out, _ = setflow("finetune", "llama3.1-8b-full", "--estimate")
    assert code == 0 and "does not fit into h100" in out
    code, _, err = setflow("finetune", "--estimate", "llama3.1-8b-full", "--gpu", "abacus")
    assert code == 2 and "gpu must be one of a100, h100, h200, got 'abacus'" in err


def test_finetune_samples_its_own_data(setflow, tiny, tmp_path):
    out = str(tmp_path / "own.jsonl")
    command = ("finetune", "distill-data", tiny, out, "--samples", "3", "--max-new-tokens", "4", "--batch-size", "3")
    code, _, err = setflow(*command)
    assert code == 0 and err.endswith(f"{out}: 3 texts, 0 of them from before\n")
    assert len((tmp_path / "own.jsonl").read_text().splitlines()) == 3
    assert setflow(*command)[2].endswith("3 of them from before\n")
    code, _, err = setflow("finetune", "distill-data", "no-such-folder", out)
    assert code == 2 and "model 'no-such-folder' does not exist" in err


def test_a_sampler_is_fitted_to_a_flow_model(setflow, tiny, tmp_path):
    texts, out = tmp_path / "texts.jsonl", tmp_path / "sampler.json"
    texts.write_text("".join(json.dumps({"text": f"{n} + 1 = {n + 1}\n"}) + "\n" for n in range(8)))
    options = ("--texts", str(texts), "--steps", "2", "--prompt-tokens", "3", "--new-tokens", "5", "--count", "4")
    quick = ("--iterations", "2", "--batch", "2", "--samples", "2", "--many-steps", "4")
    code, _, err = setflow("finetune", "fit-sampler", tiny, str(out), *options, *quick)
    assert code == 2 and "must be a flow model of whole texts" in err and not out.exists()
    config = json.loads((Path(tiny) / "config.json").read_text())
    model = tmp_path / "flow"
    shutil.copytree(tiny, model)
    (model / "config.json").write_text(json.dumps(config | {"flow": {"source": "mask", "excluded": [2, 3]}}))
    code, _, err = setflow("finetune", "fit-sampler", str(model), str(out), *options, *quick)
    assert code == 0 and "distance to 4 steps on held-out prompts" in err
    found = json.loads(out.read_text())
    assert len(found["times"]) == 3 and found["fitted"] <= found["start"]
    code, _, err = setflow("finetune", "fit-sampler", str(model), str(out), *options, "--count", "40")
    assert code == 2 and "holds 8 prompts, fewer than count 40" in err
    code, _, err = setflow(
        "generate", "1 + 1 =", "--model", str(model), "--decoder", f"dfm:sampler={out}", "--max-new-tokens", "4"
    )
    assert code == 0


@pytest.mark.parametrize("name", ["one_gpu", "ddp", "fsdp2", "zero3"])
def test_configurations_of_accelerate_can_be_read_by_it(setflow, name):
    from accelerate.commands.config.config_args import load_config_from_file

    code, out, _ = setflow("finetune", "accelerate-config", name)
    config = load_config_from_file(out.strip())
    assert code == 0 and config.num_processes == (1 if name == "one_gpu" else 8)


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


def test_recipes_are_listed_and_shown_as_files_that_train(setflow, tmp_path):
    code, out, _ = setflow("finetune", "list")
    recipes = {path.stem: path.read_text() for path in files("finetune").joinpath("recipes").iterdir()}
    assert code == 0 and len(recipes) > 20 and all(f"{name} " in out for name in recipes)
    for name in ("llama3.1-8b-gated", "rpt-embedded", "embedded-dfm-mask"):
        code, shown, _ = setflow("finetune", "show", name)
        assert code == 0 and shown == recipes[name]
        own = tmp_path / "my.yaml"
        own.write_text(shown)
        assert load_recipe(own) == load_recipe(name)
    code, _, err = setflow("finetune", "show", "rpt-embeded")
    assert code == 2 and "did you mean 'rpt-embedded'" in err
