"""Objectives as recipes name them: what they cost, and what each asks of model and folder in the course of a run."""

from dataclasses import dataclass

import pytest
import torch
from safetensors import safe_open
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from decoding import NextTokenObjective, Objective, load_model
from decoding.forward.adapter import GatedAdapter
from dfm import FlowDecoder
from finetune import finetune, objectives
from finetune.objectives import OBJECTIVES, build_objective
from finetune.tuning import Tuning
from rpt import OFFSET_CODE_FILE, load_offset_code
from tests.conftest import EOS, MASK, build

BRANCHES = {"layout": "branches", "prev_target": "ntp", "window": 3, "sequence_share": 0.5, "window_share": 0.25}
OPTIONS = [
    ("ntp", {}),
    ("sbd", {}),
    ("sbd", {"complement": True, "distill": 1.0}),
    ("sbd", {"all_mask_share": 0.3, "mask_ramp": 0.8, "distill": 1.0, "gated": True}),
    ("rpt", {"sequence_share": 1.0, "window_share": 0.2}),
    ("rpt", BRANCHES),
    ("sbd+rpt", {"resample_share": 0.25, "set_block": {"complement": True}, "resample": BRANCHES}),
    ("dfm", {"scheduler": "quadratic"}),
    ("dfm", {"source": "uniform", "given": "span"}),
    ("dfm", {"given": "prefix", "ntp_weight": 0}),
    ("dfm", {"block_sizes": (4, 8)}),
    ("dfm", {"block_sizes": (4,), "loss": "generalised_kl", "ntp_weight": 0, "time_scope": "row"}),
    ("dfm", {"block_sizes": (4,), "gated": True}),
]


def prepared(objective: Objective, tokenizer):
    """A random model that the objective has prepared, with a gated adapter if that is what it trains."""
    model = build("llama").requires_grad_(True)
    if getattr(objective, "gated", False):
        Tuning("gated", rank=2).freeze(model)
        Tuning("gated", rank=2).add_gated_adapter(model)
    objective.prepare(model, tokenizer)
    return model


@pytest.mark.parametrize(("name", "options"), OPTIONS)
def test_a_step_runs_the_rows_that_the_objective_says(tokenizer, name, options):
    """Counted at the trunk and at the head, over steps enough for the shares that are drawn."""
    objective = build_objective(name, options)
    model, counted = prepared(objective, tokenizer), {"trained": 0, "constant": 0, "labelled": 0, "taught": 0}

    def count(rows: str, others: str):
        def hook(module, inputs, output):
            hidden = getattr(output, "last_hidden_state", output)
            counted[rows if torch.is_grad_enabled() else others] += hidden.shape[:-1].numel()

        return hook

    model.get_decoder().register_forward_hook(count("trained", "constant"))
    model.get_output_embeddings().register_forward_hook(count("labelled", "taught"))
    shape, steps = (4, 64), 60
    batch = {"input_ids": torch.randint(3, 90, shape), "document_ids": torch.zeros(shape, dtype=torch.long)}
    torch.manual_seed(0)
    for _ in range(steps):
        _, metrics = objective(model, batch)
        assert int(metrics["num_targets"]) > 0
    expected = objective.rows_per_token()._asdict()
    for rows, total in counted.items():
        # One token of a document has no predecessor and borders no branch; shares are drawn.
        assert total / (4 * 64 * steps) == pytest.approx(expected[rows], rel=0.06, abs=0.01), rows


@pytest.mark.parametrize("name", OBJECTIVES)
def test_each_name_builds_an_objective_of_its_defaults(name):
    objective = build_objective(name, {})
    assert isinstance(objective, Objective) and objective == build_objective(name, {})
    with pytest.raises(ValueError, match="objective_options: .*nonsense"):
        build_objective(name, {"nonsense": 1})


def test_gating_and_lora_are_for_the_objectives_that_can():
    for name, options in (("sbd", {}), ("dfm", {"block_sizes": (4,)})):
        assert Tuning("gated").fit(build_objective(name, options)).gated
    for kind, name, message in (
        ("gated", "ntp", "tuning.kind: gated trains mask rows alone, which NextTokenObjective cannot"),
        ("gated", "rpt", "which ResampleObjective cannot"),
        ("gated", "sbd+rpt", "which SetBlockResampleObjective cannot"),
        ("gated", "dfm", "tuning.kind: block_sizes must be given with gated=True"),
        ("lora", "dfm", "tuning.kind: lora keeps no config.flow"),
    ):
        with pytest.raises(ValueError, match=message):
            Tuning(kind).fit(build_objective(name, {}))
    for kind in ("full", "lora"):
        assert Tuning(kind).fit(NextTokenObjective()) == NextTokenObjective()


@dataclass(frozen=True)
class Told(NextTokenObjective):
    """An objective of someone else, which notes what it is asked."""

    calls = []
    tags = ("told",)

    def __call__(self, model, batch):
        self.calls.append("loss")
        return super().__call__(model, batch)

    def prepare(self, model, tokenizer):
        assert tokenizer.eos_token_id == EOS
        model.register_parameter("scale", torch.nn.Parameter(torch.ones(1)))
        self.calls.append("prepare")

    def record(self, model):
        model.generation_config.told = True
        self.calls.append("record")

    def extra_files(self, model, weights):
        self.calls.append("extra_files")
        return super().extra_files(model, weights) | {"scale.txt": str(float(weights.pop("scale"))).encode()}


def test_a_run_asks_the_objective_and_knows_none_by_name(recipe, tmp_path, monkeypatch):
    monkeypatch.setitem(objectives.OBJECTIVES, "told", f"{__name__}:Told")
    Told.calls.clear()
    measure = {"decoders": ["ntp"], "prompts": 1, "max_new_tokens": 4, "rows": 1}
    finetune(recipe(objective="told", measure=measure))
    assert Told.calls[0] == "prepare" and Told.calls[-2:] == ["record", "extra_files"]
    assert Told.calls.count("loss") >= 4
    folder = tmp_path / "out"
    assert (folder / "scale.txt").read_text() == "1.0"
    assert "tags: [setflow, told]" in (folder / "README.md").read_text()
    assert AutoModelForCausalLM.from_pretrained(folder).generation_config.told is True


@pytest.fixture
def base(fresh_model, tokenizer, tmp_path):
    """The recipe keys of a run that starts from a small model."""
    fresh_model("llama", eos_token_id=EOS, initializer_range=0.1).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return {"new_model": None, "tokenizer": None, "model": str(tmp_path / "base")}


def test_lora_trains_the_offset_code_too_and_merging_keeps_it(recipe, base, tmp_path):
    tuning = {"kind": "lora", "rank": 2, "merge": True}
    options = {"sequence_share": 1.0, "window_share": 0.2}
    finetune(recipe(objective="rpt", objective_options=options, tuning=tuning, save_dtype="float32", **base))
    for folder in (tmp_path / "out", tmp_path / "out" / "merged"):
        with safe_open(folder / OFFSET_CODE_FILE, "pt") as file:
            assert file.get_tensor("table").abs().max() > 0
        load_offset_code(AutoModelForCausalLM.from_pretrained(folder), folder)


def test_a_gated_flow_run_leaves_the_model_as_it_is(recipe, base, tmp_path):
    """Trained on blocks of masks, saved as an adapter, and decoded by FlowDecoder; the base model's text is its own."""
    options = {"block_sizes": [4], "scheduler": "cubic"}
    decoder = "dfm:block_size=4,sampler=rule,entropy_bound=0.1"
    tuning = {"kind": "gated", "rank": 2}
    report = finetune(recipe(objective="dfm", objective_options=options, tuning=tuning, decoder=decoder, **base))
    assert report.log[0]["flow_loss"] > 0 and "ntp_loss" not in report.log[0]
    plain, model = AutoModelForCausalLM.from_pretrained(base["model"]), load_model(tmp_path / "out")[0]
    assert model.gated_adapter.terms["layers-0-mlp-up_proj"].up.any()
    assert model.generation_config.trained_block_sizes == [4] and model.generation_config.suppress_tokens is None
    prompt, settings = torch.tensor([[5, 6, 7]]), {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(model.generate(prompt, **settings), plain.generate(prompt, **settings))
    out = model.generate(prompt, custom_generate=FlowDecoder(block_size=4, steps=4), **settings)
    assert not torch.equal(out, plain.generate(prompt, **settings)) and MASK not in out


def test_gated_flow_losses_and_gradients_are_those_of_the_masked_part(tokenizer):
    """Two forwards with the clean rows as constants = one with everything and no next-token loss."""
    options, found = {"block_sizes": (4,), "phase": "document"}, []
    batch = {"input_ids": torch.randint(3, 90, (2, 24)), "document_ids": torch.zeros(2, 24, dtype=torch.long)}
    for changes in ({"gated": True}, {"ntp_weight": 0.0}):
        model = build("llama").requires_grad_(False)
        adapter = GatedAdapter(model, 2, 4)
        adapter.attach(model)
        adapter.mask_token_id = MASK
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.normal_(std=0.2, generator=torch.Generator().manual_seed(0))
        model.generation_config.pad_token_id = None  # else one loss has a token more to choose from
        torch.manual_seed(1)
        loss, metrics = build_objective("dfm", options | changes)(model, batch)
        gradients = torch.autograd.grad(loss, [p for p in adapter.parameters()])
        found.append([loss, metrics["flow_loss"], *gradients])
    for ours, reference in zip(*found, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-5)


def test_operations_of_flow_training_are_those_that_torch_counts(tokenizer):
    """On a model whose attention is small beside its linear layers."""
    from tests.finetune.test_estimate import SHAPE, of, recipe

    for options, tuning in (({"block_sizes": (4,)}, "full"), ({"block_sizes": (4,)}, "gated"), ({}, "full")):
        chosen = recipe(tuning, "dfm", objective_options=options, sequence_length=16)
        objective = chosen.build_objective()
        model = build("llama", attn_implementation="eager", **SHAPE).requires_grad_(tuning == "full")
        if tuning == "gated":
            Tuning("gated", rank=1).add_gated_adapter(model)
        objective.prepare(model, tokenizer)
        batch = {"input_ids": torch.randint(3, 90, (16, 16)), "document_ids": torch.zeros(16, 16, dtype=torch.long)}
        counted = []
        for seed in range(4):
            torch.manual_seed(seed)
            with FlopCounterMode(display=False) as counter:
                objective(model, batch)[0].backward()
            counted.append(counter.get_total_flops() / batch["input_ids"].numel())
        assert of(model, chosen).flops_per_token == pytest.approx(sum(counted) / 4, rel=0.08)
