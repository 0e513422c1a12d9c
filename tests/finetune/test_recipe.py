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
def test_shipped_recipes_load(path, cpu):
    recipe = load_recipe(path)
    arguments = recipe.training_arguments()
    assert arguments.max_steps > 0
    assert arguments.bf16 is (cpu.has_bf16 and recipe.training.get("bf16", False))


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


@pytest.mark.parametrize("asked", ["bf16: true", "bf16: true, use_cpu: true"])
def test_a_cpu_computes_in_bf16_where_it_can(recipe_file, cpu, asked, capsys):
    arguments = load_recipe(recipe_file(MINIMAL + f"training: {{{asked}}}\n")).training_arguments()
    assert arguments.bf16 is cpu.has_bf16 and (arguments.mixed_precision == "bf16") is cpu.has_bf16
    assert arguments.device.type == "cpu"
    assert capsys.readouterr().err.count("float32") == (not cpu.has_bf16)


def test_what_a_launcher_asks_for_is_treated_alike(recipe_file, cpu, monkeypatch, capsys):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("RANK", "1")
    arguments = load_recipe(recipe_file()).training_arguments()
    assert arguments.mixed_precision == ("bf16" if cpu.has_bf16 else "no")
    assert not capsys.readouterr().err, "the first process says it"


@pytest.mark.parametrize("told", [{}, {"use_cpu": True}, {"ACCELERATE_USE_CPU": "true"}])
def test_bf16_on_a_machine_with_a_gpu(recipe_file, cpu, monkeypatch, told):
    """A GPU computes in bf16 whatever the CPU can; a run that is told to leave it alone is one of the CPU."""
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)
    for key in told.keys() - {"use_cpu"}:
        monkeypatch.setenv(key, told[key])
    override = ["training.use_cpu=true"] if "use_cpu" in told else []
    arguments = load_recipe(recipe_file(MINIMAL + "training: {bf16: true}\n"), override).training_arguments()
    assert arguments.use_cpu is bool(told)
    assert arguments.bf16 is (cpu.has_bf16 or not told)
