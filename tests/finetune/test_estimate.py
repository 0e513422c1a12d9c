"""The estimate of memory and time, against what torch counts."""

import re

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from decoding.forward.adapter import GatedAdapter
from finetune import Recipe, load_recipe
from finetune.estimate import KNOWN, Estimate, layer_bytes
from finetune.recipe_file import RECIPES as RECIPE_FOLDER
from rpt import ResampleObjective
from sbd import SetBlockObjective
from sbd.selector import attach_selector
from tests.conftest import build

SHAPE = {"hidden_size": 64, "intermediate_size": 320, "num_attention_heads": 8, "num_key_value_heads": 2}


def recipe(kind: str = "full", objective: str = "sbd", model: str = "Qwen/Qwen3-0.6B", **changes) -> Recipe:
    values = {"output": "out", "data": ("a.jsonl",), "model": model, "objective": objective, "tuning": {"kind": kind}}
    return Recipe.from_dict(values | changes)


def of(model, recipe: Recipe) -> Estimate:
    """The estimate for ``model`` in place of the one that the recipe names."""
    return type("OfModel", (Estimate,), {"config": model.config, "model": model})(recipe)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("meta-llama/Llama-3.1-8B", 8_030_261_248),
        ("Qwen/Qwen3-8B", 8_190_735_360),
        ("Qwen/Qwen3-0.6B", 596_049_920),
    ],
)
def test_the_known_models_have_their_published_size(name, count):
    assert Estimate(recipe(model=name)).parameters == count
    assert set(KNOWN) >= {name}


def test_a_new_model_has_as_many_embeddings_as_its_tokenizer_has_tokens(tokenizer, tmp_path):
    shape = SHAPE | {"num_hidden_layers": 1, "tie_word_embeddings": True}
    made = Recipe.from_dict(
        {"output": "out", "data": ("a.jsonl",), "new_model": shape, "objective": "ntp", "tokenizer": str(tmp_path)}
    )
    with pytest.raises(ValueError, match="tokenizer .* has no config.json"):
        _ = Estimate(made).parameters
    tokenizer.save_pretrained(tmp_path)
    counted = Estimate(made).parameters
    assert counted == build(**shape, vocab_size=len(tokenizer)).num_parameters()


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_layer_keeps_what_autograd_saves(family):
    saved = []
    for layers in (2, 3):
        model, length = build(family, num_hidden_layers=layers, **SHAPE).requires_grad_(True), 40
        storages = {p.untyped_storage().data_ptr() for p in model.parameters()}
        sizes, kept = {}, []

        def pack(tensor, storages=storages, sizes=sizes, kept=kept, length=length):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in storages and tensor.shape[-2:] != (length, length):  # the mask
                sizes[storage.data_ptr()] = storage.nbytes()
                kept.append(tensor)
            return tensor

        mask = torch.ones(2, 1, length, length, dtype=torch.bool).tril()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model.model(torch.ones(2, length, dtype=torch.long), attention_mask=mask, use_cache=False)
        saved.append(sum(sizes.values()) / (2 * length))
    assert layer_bytes(model.config, 4) == pytest.approx(saved[1] - saved[0], rel=0.02)


@pytest.mark.parametrize("kind", ["full", "lora", "gated"])
@pytest.mark.parametrize("distill", [0.0, 1.0])
def test_operations_are_those_that_torch_counts(kind, distill):
    """One training step on a model whose attention is small beside its linear layers; LoRA's own terms are left out."""
    model = build("llama", initializer_range=0.02, attn_implementation="eager", **SHAPE)
    if kind == "full":
        model.requires_grad_(True)
    elif kind == "gated":
        GatedAdapter(model, 1, 1).attach(model)
        model.gated_adapter.mask_token_id = 96
    else:
        model.get_input_embeddings().weight.requires_grad_(True)  # the gradient must reach the first layer
    options = {"block_sizes": (4,), "all_mask_share": 1.0, "distill": distill}
    batch = {"input_ids": torch.randint(3, 90, (4, 16)), "document_ids": torch.zeros(4, 16, dtype=torch.long)}
    with FlopCounterMode(display=False) as counter:
        SetBlockObjective(**options, gated=kind == "gated")(model, batch)[0].backward()
    chosen = recipe(kind, objective_options=options, sequence_length=16)
    counted = counter.get_total_flops() / batch["input_ids"].numel()
    assert of(model, chosen).flops_per_token == pytest.approx(counted, rel=0.08)  # attention computes hidden pairs, too


@pytest.mark.parametrize(("window", "share"), [(2, 0.5), (3, 0.25)])
def test_operations_of_branches_are_those_that_torch_counts(window, share):
    model = build("llama", attn_implementation="eager", **SHAPE).requires_grad_(True)
    options = {
        "window": window,
        "layout": "branches",
        "prev_target": "ntp",
        "sequence_share": 1.0,
        "window_share": share,
    }
    objective = ResampleObjective(**options)
    objective.prepare(model)
    batch = {"input_ids": torch.randint(3, 90, (4, 16)), "document_ids": torch.zeros(4, 16, dtype=torch.long)}
    with FlopCounterMode(display=False) as counter:
        objective(model, batch)[0].backward()
    chosen = recipe(objective="rpt", objective_options=options, sequence_length=16)
    counted = counter.get_total_flops() / batch["input_ids"].numel()
    assert of(model, chosen).flops_per_token == pytest.approx(counted, rel=0.08)


def test_what_is_trained_is_counted(fresh_model):
    model = fresh_model("llama", **SHAPE)
    adapter = GatedAdapter(model, 4, 8)
    gated = of(model, recipe(tuning={"kind": "gated", "rank": 4}))
    assert gated.trained == sum(p.numel() for p in adapter.parameters())
    assert of(model, recipe()).trained == sum(p.numel() for p in model.parameters())
    options = {"selector": 5}
    alone = of(model, recipe(tuning={"kind": "selector"}, objective_options=options, decoder=None))
    both = of(model, recipe(tuning={"kind": "gated", "rank": 4}, objective_options=options))
    count = sum(p.numel() for p in attach_selector(model, 5).parameters())
    assert alone.trained == count and both.trained == gated.trained + count
    assert alone.activations < gated.activations


def test_memory_is_shared_where_weights_are_trained():
    one, eight = (Estimate(recipe(training={"bf16": True}), gpus=gpus) for gpus in (1, 8))
    assert one.weights + one.gradients_and_optimizer == one.parameters * (4 + 2 + 12)
    assert eight.weights + eight.gradients_and_optimizer == one.parameters * 18 / 8
    assert eight.activations == one.activations and eight.memory < one.memory
    frozen = [Estimate(recipe("gated", training={"bf16": True}), gpus=gpus) for gpus in (1, 8)]
    assert frozen[0].memory == frozen[1].memory
    assert frozen[0].weights == pytest.approx(2 * one.parameters, rel=0.2)


def test_time_is_work_over_arithmetic():
    training = {"max_steps": 100, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 3}
    found = Estimate(recipe(sequence_length=128, training=training), "h100", 4, 0.5)
    assert found.tokens_per_step == 2 * 128 * 3 * 4
    assert found.tokens_per_second == 4 * 0.5 * 989e12 / found.flops_per_token
    assert found.hours == pytest.approx(100 * found.tokens_per_step / found.tokens_per_second / 3600)
    slower = Estimate(recipe(sequence_length=128, training=training | {"gradient_checkpointing": True}))
    assert slower.flops_per_token > found.flops_per_token and slower.activations < found.activations


def test_mistakes_are_named():
    for changes, message in (({"gpu": "tpu"}, "gpu must be one of a100"), ({"gpus": 0}, "gpus"), ({"mfu": 2.0}, "mfu")):
        with pytest.raises(ValueError, match=message):
            Estimate(recipe(), **changes)


RECIPES = sorted(path for kind in ("llama3.1", "qwen3") for path in RECIPE_FOLDER.glob(f"{kind}-*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_state_what_they_cost(path):
    """The sentence at the head of each recipe, against the estimate; those of one GPU fit into its 80 GB."""
    stated = re.search(r"Estimated .*: (\d+) GB on .*?(\d*) ?H100, ([\d.]+) hours for (\d+) million", path.read_text())
    gigabytes, gpus, hours, tokens = stated.groups()
    found = Estimate(load_recipe(path), "h100", int(gpus or 1), 0.4)
    assert round(found.memory / 1e9) == int(gigabytes) < 80
    assert f"{found.hours:.1f}" == hours
    assert round(found.recipe.training["max_steps"] * found.tokens_per_step / 1e6) == int(tokens)
