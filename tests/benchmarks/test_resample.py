"""The measurements of revising: losses against uncached runs, rows of the table, interpolation at equal forwards."""

import json
import shutil

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.command import main
from benchmarks.resample.exact import exact_distribution, measure_exactness, trained_distribution
from benchmarks.resample.likelihood import _over_documents, document_losses, measure_likelihood, next_token_losses
from benchmarks.resample.samples import FORWARDS, equal_forwards, measure_samples, resample
from eval.bench.prompts import PromptSet
from rpt import ResampleObjective, attach_offset_code, save_offset_code
from rpt.config import ResampleConfig
from tests.conftest import build
from tests.rpt.test_decoder import uncached_previous

TEXT = [5, 9, 30, 41, 7, 7, 60, 12]


@pytest.fixture(scope="module")
def model():
    model = build("llama")
    code = attach_offset_code(model, ResampleConfig()).requires_grad_(False)
    code.table.copy_(torch.randn(code.table.shape, generator=torch.Generator().manual_seed(7)) / code.GAIN)
    return model


def test_losses_of_a_document_are_those_of_uncached_runs(model):
    ntp, ptp = document_losses(model, TEXT)
    assert torch.allclose(ntp, next_token_losses(model, TEXT)[:-1], atol=1e-4)
    expected = [-uncached_previous(model, ResampleConfig(), TEXT, i, 2).log_softmax(-1)[TEXT[i]] for i in range(1, 7)]
    assert torch.allclose(ptp, torch.stack(expected), atol=1e-4)


@torch.no_grad()
def test_the_exact_distribution_is_that_of_texts_of_two_tokens(model):
    """All pairs that may follow, with their probabilities: the distribution of the first among those with the second."""
    start, pairs = TEXT[:3], {}
    first = model(torch.tensor([start])).logits[0, -1].softmax(-1)
    for token, probability in enumerate(first.tolist()):
        pairs[token] = probability * model(torch.tensor([[*start, token]])).logits[0, -1].softmax(-1)[TEXT[4]].item()
    expected = torch.tensor(list(pairs.values())) / sum(pairs.values())
    assert torch.allclose(exact_distribution(model, TEXT, 3).exp(), expected, atol=1e-6)


def test_the_trained_distribution_is_told_apart_from_the_exact_one(model):
    assert torch.allclose(
        trained_distribution(model, TEXT, 3),
        uncached_previous(model, ResampleConfig(), TEXT, 3, 2).log_softmax(-1),
        atol=1e-4,
    )
    found = measure_exactness(model, [TEXT], 5)
    assert found["exact_tokens"] == 5 and found["drawn_cost"] > found["exact_entropy"] > 0
    assert found["trained_loss"] != found["exact_loss"]


def test_likelihoods_are_means_over_tokens(model):
    documents, control = [TEXT, TEXT[2:6]], build("llama", seed=1)
    result = measure_likelihood(model, documents, control)
    losses = [document_losses(model, tokens) for tokens in documents]
    ntp, ptp = (torch.cat([loss[i] for loss in losses]) for i in range(2))
    assert result["tokens"] == 8 and result["documents"] == 2
    assert result["ntp_loss"] == pytest.approx(ntp.mean().item(), abs=1e-3)
    assert result["ptp_loss"] == pytest.approx(ptp.mean().item(), abs=1e-3)
    assert result["gained"] == pytest.approx((ntp - ptp).mean().item(), abs=1e-3)
    assert result["raised"] == pytest.approx((ptp < ntp).float().mean().item(), abs=1e-3)
    expected = torch.cat([next_token_losses(control, tokens)[:-1] for tokens in documents]).mean().item()
    assert result["control_loss"] == pytest.approx(expected, abs=1e-3)
    assert result["ntp_interval"][0] <= result["ntp_loss"] <= result["ntp_interval"][1]


def test_the_bootstrap_covers_the_mean():
    rng = np.random.default_rng(3)
    covered = 0
    for _ in range(100):
        lengths = rng.integers(5, 15, 60)
        mean, low, high = _over_documents(lengths * 2.0 + rng.normal(0, 5, 60), lengths)
        covered += low < 2.0 < high
    assert 88 <= covered <= 100


def test_rows_of_samples(model, tokenizer):
    prompts = PromptSet("toy", [[5, 6, 7], [8, 9]], 6)
    specs = ("ntp", "rpt:iterations=0.5", "rpt:iterations=0.5,schedule=plain")
    rows = list(measure_samples(model, tokenizer, prompts, specs, (0.0, 1.0), 2, 2))
    assert [(row["temperature"], row["decoder"]) for row in rows] == [(t, s) for t in (0.0, 1.0) for s in specs]
    assert rows[0]["forwards_per_token"] == 1 and rows[0]["changes_per_token"] == 0 and rows[0]["seeds"] == 1
    two_slot, plain = rows[4], rows[5]
    assert two_slot["ntp_loss"] == plain["ntp_loss"] and two_slot["changes_per_token"] == plain["changes_per_token"] > 0
    assert two_slot["forwards_per_token"] < plain["forwards_per_token"]
    assert two_slot["seeds"] == 2 and two_slot["ntp_loss_plus_minus"] > 0


def test_families_are_compared_where_they_have_decoders():
    rows = [
        {"decoder": "a", "forwards_per_token": 0.4, "q": 0.2},
        {"decoder": "b", "forwards_per_token": 0.8, "q": 0.6},
        {"decoder": "ntp", "forwards_per_token": 1.0, "q": 0.9},
    ]
    blocks, ntp = equal_forwards(rows, {"blocks": ("a", "b"), "NTP": ("ntp",)}, "q")
    assert [blocks[f"q at {f}"] for f in FORWARDS] == [None, 0.2, 0.3, 0.4, 0.6, None]
    assert [ntp[f"q at {f}"] for f in FORWARDS] == [None] * 5 + [0.9]


def test_the_command(model_folder, tmp_path, capfd):
    folder, trained = model_folder(max_position_embeddings=256), tmp_path / "trained"
    shutil.copytree(folder, trained)
    model = AutoModelForCausalLM.from_pretrained(trained)
    ResampleObjective(prev_target="ntp").prepare(model)
    model.generation_config.trained_block_sizes, model.generation_config._from_model_config = [2], False
    model.save_pretrained(trained)
    save_offset_code(model, trained)
    prompts = tmp_path / "prompts.jsonl"
    texts = ["1 + 2 = 3, 4 + 5 = 9, " * 4, "37 + 45 = 82 " * 5, "8 + 9 = 17; " * 5]
    prompts.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    given = ("--prompts", str(prompts), "--texts", str(prompts), "--control", folder)
    sizes = ("--block-size", "2", "--exact", "2")
    sampled = ("--temperature", "1", "--seeds", "2", "--decoder", "rpt:iterations=0.5")
    shown = ("--model", str(trained), "--out", str(tmp_path), "--name", "found")
    assert main(resample, "resample.samples", (*shown, *given, *sizes, *sampled)) == 0
    file = json.loads((tmp_path / "found.json").read_text())
    assert file["command"].startswith("python -m benchmarks.resample.samples")
    likelihood, samples, *rest = file["rows"]
    assert likelihood["documents"] == 3 and likelihood["exact_tokens"] == 2 and likelihood["control_loss"] > 0
    assert samples["seeds"] == 2 and samples["changes_per_token"] > 0
    points, table = [row for row in rest if "decoder" in row], [row for row in rest if "family" in row]
    assert len(points) + len(table) == len(rest)
    assert {row["family"] for row in table} == {"NTP", "RPT", "SBD", "SBD + RPT", "SBD + re-masking"}
    assert all(row["temperature"] == 0 for row in points)
