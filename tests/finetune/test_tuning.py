"""What is trained and how it is saved: all weights, LoRA, a row-gated adapter; measurements and the card."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from decoding import NextTokenDecoder
from decoding.forward.adapter import WEIGHTS_FILE, GatedAdapter
from decoding.inputs.source import ADAPTER_FILE
from finetune import finetune
from finetune.tuning import merge_adapter
from sbd import SelfSpeculativeDecoder
from sbd.selector import draft_selector
from setflow.loading import default_spec, load_model
from tests.conftest import EOS

PROMPT = torch.tensor([[5, 6, 7, 8]])
LOSSLESS = "sbd-lossless:block_size=4"


@pytest.fixture
def base(fresh_model, tokenizer, tmp_path):
    """The folder of a small model to start from."""
    fresh_model("llama", eos_token_id=EOS, initializer_range=0.1).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


@pytest.fixture
def tuned(recipe, base):
    """``tuned(kind, ...)``: the report of four steps from ``base``."""

    def run(kind: str, tuning: dict | None = None, **changes):
        tuning = {"kind": kind} | ({} if kind == "full" else {"rank": 4}) | (tuning or {})
        changes = {"new_model": None, "tokenizer": None, "model": base, "tuning": tuning} | changes
        return finetune(recipe(save_dtype="float32", decoder=LOSSLESS, **changes))

    return run


@pytest.mark.parametrize("kind", ["full", "gated"])
def test_a_selector_is_trained_on_a_model_that_drafts_already(tuned, recipe, tmp_path, kind):
    """Its folder holds nothing else, and what it stands on is found from there."""
    tuned(kind, objective_options={"block_sizes": [4]})
    changes = {"model": str(tmp_path / "out"), "new_model": None, "tokenizer": None, "tuning": {"kind": "selector"}}
    options = {"block_sizes": [4], "selector": 3, "distill": 1.0, "divergence": "hybrid", "position_weights": "dpace"}
    measure = {"decoders": [LOSSLESS, f"{LOSSLESS},candidates=0"], "prompts": 2, "max_new_tokens": 8, "rows": 2}
    report = finetune(recipe("selector", objective_options=options, measure=measure, **changes))
    assert not list((tmp_path / "selector").glob("model*")) and not (tmp_path / "selector" / WEIGHTS_FILE).exists()
    before, _ = load_model(str(tmp_path / "out"), torch.float32)
    after, _ = load_model(str(tmp_path / "selector"), torch.float32)
    learned = draft_selector(after).state_dict()
    assert draft_selector(before) is None and learned["correction.weight"].any()
    rest = {name: weight for name, weight in after.state_dict().items() if not name.startswith("draft_selector")}
    assert rest.keys() == before.state_dict().keys()
    assert all(torch.equal(weight, before.state_dict()[name]) for name, weight in rest.items())
    assert default_spec(after) == LOSSLESS
    assert report.measured["expected_tau"] >= 1 and report.measured[f"same_text/{LOSSLESS}"] == 1
    assert f"{report.measured['expected_tau']:.2f}" in (tmp_path / "selector" / "README.md").read_text()
    assert {"acceptance", "expected_tau", "distill_loss"} <= report.log[0].keys()


def test_a_selector_needs_a_rank_and_no_decoder(recipe, base):
    changes = {"new_model": None, "tokenizer": None, "model": base, "tuning": {"kind": "selector"}}
    with pytest.raises(ValueError, match="tuning.kind: selector needs the rank of one, objective_options.selector"):
        recipe(**changes)
    with pytest.raises(ValueError, match="tuning.kind selector .* leave decoder out"):
        recipe(objective_options={"selector": 4}, decoder=LOSSLESS, **changes)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(PROMPT).logits


def test_a_gated_run_leaves_the_model_as_it_is(tuned, base, tmp_path):
    report = tuned("gated", measure={"decoders": [LOSSLESS], "prompts": 2, "max_new_tokens": 8, "rows": 2})
    assert not (tmp_path / "out" / "model.safetensors").exists() and (tmp_path / "out" / WEIGHTS_FILE).is_file()
    plain = AutoModelForCausalLM.from_pretrained(base)
    model, _ = load_model(str(tmp_path / "out"), torch.float32)
    assert default_spec(model) == LOSSLESS
    assert torch.equal(logits(model), logits(plain))
    settings = {"max_new_tokens": 16, "do_sample": False}
    text = plain.generate(PROMPT, **settings)
    for decoder in (None, NextTokenDecoder(), SelfSpeculativeDecoder(block_size=4)):
        assert torch.equal(model.generate(PROMPT, custom_generate=decoder, **settings), text)
    assert model.gated_adapter.terms["layers-0-mlp-up_proj"].up.any()  # it was trained
    before, after = report.held_out_before["texts"], report.held_out_next_token_loss_nats["texts"]
    assert before == after and report.measured[f"same_text/{LOSSLESS}"] == 1


def test_a_gated_run_resumes_from_what_it_trained(tuned, monkeypatch, tmp_path):
    whole = tuned("gated", output="whole")
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    assert (checkpoint / "trained.safetensors").is_file() and not (checkpoint / "model.safetensors").exists()
    (tmp_path / "again").mkdir()
    checkpoint.rename(tmp_path / "again" / "checkpoint-2")
    again = tuned("gated", output="again")
    assert [entry["loss"] for entry in again.log] == pytest.approx([entry["loss"] for entry in whole.log], rel=1e-5)


def test_lora_trains_and_merges(tuned, base, tmp_path):
    tuned("lora")
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "out" / "model.safetensors").exists()
    adapted, _ = load_model(str(tmp_path / "out"), torch.float32)
    assert not torch.allclose(logits(adapted), logits(AutoModelForCausalLM.from_pretrained(base)), atol=1e-3)
    merge_adapter(tmp_path / "out", tmp_path / "merged", torch.float32)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), logits(adapted), rtol=0, atol=1e-4)
    assert merged.generation_config.decoder == LOSSLESS and merged.generation_config.trained_block_sizes[0] == 2
    out = merged.generate(PROMPT, max_new_tokens=8, custom_generate=SelfSpeculativeDecoder(block_size=4))
    assert out.shape[1] <= 12


def test_a_merged_run_writes_both(tuned, tmp_path):
    tuned("lora", {"merge": True})
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "merged")
    adapted, _ = load_model(str(tmp_path / "out"), torch.float32)
    torch.testing.assert_close(logits(merged), logits(adapted), rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_checkpointing_changes_no_loss(tuned, kind):
    losses = []
    for checkpointing in (False, True):
        training = {"gradient_checkpointing": checkpointing, "max_steps": 2}
        report = tuned(kind, output=f"{kind}-{checkpointing}", training=training)
        losses.append([entry["loss"] for entry in report.log])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_the_card_holds_the_figures_and_the_command(tuned, tmp_path):
    measure = {"decoders": [LOSSLESS], "prompts": 2, "max_new_tokens": 8, "rows": 2}
    training = {"eval_strategy": "steps", "eval_steps": 2, "report_to": "none"}
    report = tuned("full", measure=measure, training=training)
    card = (tmp_path / "out" / "README.md").read_text()
    for key in ("ntp", LOSSLESS):
        assert f"| `{key}` | " in card and f"{report.measured[f'tokens_per_forward/{key}']:.2f}" in card
    assert f"{report.held_out_next_token_loss_nats['texts']:.4f}" in card
    assert report.command in card and repr(report.objective)[1:20] in card
    states = [json.loads(path.read_text()) for path in (tmp_path / "out").glob("checkpoint-*/trainer_state.json")]
    logged = {key for state in states for entry in state["log_history"] for key in entry}
    assert {"eval_texts_loss", "eval_matp_loss", "eval_acceptance_7", f"eval_tokens_per_forward/{LOSSLESS}"} <= logged


def test_tensorboard_gets_the_logs(tuned, tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    tuned("gated", training={"report_to": "tensorboard"})
    events = EventAccumulator(str(tmp_path / "logs"))
    events.Reload()
    assert len(events.Scalars("train/matp_loss")) == 4


def test_what_cannot_be_is_refused(tuned, base, tmp_path):
    with pytest.raises(ValueError, match="gated trains mask rows alone, which NextTokenObjective cannot"):
        tuned("gated", objective="ntp")
    with pytest.raises(ValueError, match="gradient_checkpointing cannot be combined with tuning.kind gated"):
        tuned("gated", training={"gradient_checkpointing": True})
    with pytest.raises(ValueError, match="tuning.merge is for kind lora"):
        tuned("full", {"merge": True})
    with pytest.raises(ValueError, match="adapter_config.json is missing"):
        merge_adapter(base, tmp_path / "merged")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / ADAPTER_FILE).write_text("{}")
    with pytest.raises(ValueError, match="it acts on mask rows only, so it cannot be merged"):
        merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    adapter = GatedAdapter(AutoModelForCausalLM.from_pretrained(base), 2, 4)
    adapter.save(AutoModelForCausalLM.from_pretrained(base), tmp_path / "gated")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "gated")
    with pytest.raises(
        ValueError, match="gated' is a gated adapter, from which no training starts; give its base model"
    ):
        tuned("full", model=str(tmp_path / "gated"))
