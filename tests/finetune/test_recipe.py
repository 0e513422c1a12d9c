"""Recipes: typed, checked, overridable; every mistake is named."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

import finetune
from finetune import load_recipe

RECIPES = Path(finetune.__file__).parent / "recipes"
MINIMAL = "output: out\ndata: [a.jsonl]\nobjective: ntp\nmodel: some/model\n"


@pytest.fixture
def recipe_file(tmp_path):
    def write(text: str = MINIMAL) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return path

    return write


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_recipes_load(path):
    recipe = load_recipe(path)
    assert recipe.training_arguments().max_steps > 0


def test_overrides_reach_into_mappings(recipe_file):
    recipe = load_recipe(recipe_file(), ["sequence_length=64", "training.learning_rate=1e-4", "training.max_steps=3"])
    assert recipe.sequence_length == 64
    assert recipe.training == {"learning_rate": 1e-4, "max_steps": 3}
    assert recipe.training_arguments().learning_rate == 1e-4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (MINIMAL + "sequnce_length: 3\n", "sequnce_length.*sequence_length"),
        (MINIMAL + "training: {learning_rte: 1}\n", "learning_rte.*learning_rate"),
        (MINIMAL.replace("ntp", "magic"), "objective.*magic"),
        (MINIMAL + "attention: flash_attention_2\n", "attention.*flex_attention.*flash_attention_2"),
        (MINIMAL.replace("model: some/model\n", ""), "model"),
        (MINIMAL + "new_model: {hidden_size: 8}\n", "not both"),
        (MINIMAL + "decoder: sbd:blok_size=4\n", "blok_size.*block_size"),
        (MINIMAL.replace("output: out\n", ""), "output"),
        ("[1, 2", "not YAML"),
        ("just text", "mapping"),
    ],
)
def test_mistakes_are_named(recipe_file, text, message):
    with pytest.raises(ValueError, match=message):
        load_recipe(recipe_file(text))


def test_missing_file_and_bad_override(recipe_file, tmp_path):
    with pytest.raises(ValueError, match="none.yaml' is no file and no packaged recipe"):
        load_recipe(tmp_path / "none.yaml")
    with pytest.raises(ValueError, match="key=value"):
        load_recipe(recipe_file(), ["sequence_length"])


def test_a_stage_becomes_its_control_by_overrides():
    overrides = ["objective=ntp", "objective_options={}", "decoder=null", "output=elsewhere"]
    stage, control = (load_recipe(RECIPES / "embedded-sbd.yaml", changes) for changes in ([], overrides))
    assert control.objective == "ntp" and not control.objective_options and control.decoder is None
    assert stage.training == control.training and stage.data == control.data and stage.model == control.model


@pytest.mark.parametrize(
    ("key", "device", "width", "expected"),
    [
        ("", "cpu", 64, "sdpa_tiles"),
        ("compile: true\n", "cpu", 64, "sdpa"),
        ("", "cuda", 64, "flex_attention"),
        ("", "cuda", 8, "sdpa"),
        ("attention: sdpa\n", "cuda", 64, "sdpa"),
    ],
)
def test_attention_skips_hidden_tiles_where_it_can(recipe_file, key, device, width, expected):
    config = LlamaConfig(hidden_size=4 * width, num_attention_heads=4)
    assert load_recipe(recipe_file(MINIMAL + key)).attention_on(torch.device(device), config) == expected


def test_flex_attention_on_a_cpu_is_refused(recipe_file):
    recipe = load_recipe(recipe_file(MINIMAL + "attention: flex_attention\n"))
    with pytest.raises(ValueError, match="'flex_attention' cannot train on a CPU"):
        recipe.attention_on(torch.device("cpu"), LlamaConfig())


@pytest.mark.parametrize("supported", [True, False])
def test_bf16_falls_back_where_the_cpu_has_no_instructions_for_it(recipe_file, monkeypatch, capsys, supported):
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: supported)
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: False)
    arguments = load_recipe(recipe_file(MINIMAL + "training: {bf16: true, use_cpu: true}\n")).training_arguments()
    assert arguments.bf16 is supported
    assert ("float32" in capsys.readouterr().err) is not supported
