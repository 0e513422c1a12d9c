"""The flow-matching measurements: bounds against known likelihoods, judged samples, sweeps that go on, one distribution."""

import json
import math
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from benchmarks.command import main
from benchmarks.figures import plot_curves
from benchmarks.flow import euler, few_steps, fit, judging, likelihood, peer, sweep
from benchmarks.flow.task import complete, judge_completions, make_task
from dfm import FlowDecoder
from dfm.flow_config import FlowTraits
from dfm.paths.fit import FittedSchedule
from dfm.paths.sources import UniformSource
from dfm.samplers.fitted import StepSettings
from eval.additions import Addition
from tests.conftest import MASK, build

ALLOWED = 6  # ids 0 .. 5 occur in the toy's texts; the mask token is 6


def flow_model(source: str, excluded: tuple[int, ...] = (MASK,)):
    """A random model with the marks of one trained on whole texts."""
    model = build("llama")
    model.config.flow = FlowTraits(source, excluded=excluded).as_dict()
    model.generation_config.mask_token_id = MASK if source == "mask" else None
    model.generation_config.eos_token_id = 1
    return model


def exact_network(source: str):
    """The posterior network of independent uniform tokens, of whose texts every token costs ln(ALLOWED)."""

    def make(model, real, traits, scheduler):
        def network(z, t, frozen):
            shape, k = (*z.shape, ALLOWED + (source == "mask")), scheduler.kappa(t)[:, None, None]
            distribution = torch.full(shape, 1 / ALLOWED, dtype=torch.float64)
            if source == "uniform":
                distribution = (1 - k) * distribution + k * torch.nn.functional.one_hot(z, shape[-1])
            return distribution.log()

        return network

    return make


@pytest.mark.parametrize("source", ["mask", "uniform"])
def test_bounds_of_an_exact_posterior(monkeypatch, source):
    """The mask bound and the reversal bound are -log p; that of the forward rates is above it for a uniform source."""
    monkeypatch.setattr(likelihood, "Bidirectional", exact_network(source))
    size = ALLOWED + (source == "mask")
    model = SimpleNamespace(
        config=SimpleNamespace(flow=FlowTraits(source).as_dict()),
        generation_config=SimpleNamespace(mask_token_id=ALLOWED),
        get_input_embeddings=lambda: torch.nn.Embedding(size, 2),
    )
    rows = torch.randint(ALLOWED, (4, 60), generator=torch.Generator().manual_seed(0))
    batches = []
    bound = likelihood.likelihood_bound(model, rows, times=400, batch_size=50, advance=lambda: batches.append(1))
    assert len(batches) == likelihood.bound_batches(4, 400, 50) == 8
    tight = "forward" if source == "mask" else "reversal"
    assert bound[f"{tight}_bound_nats"] == pytest.approx(math.log(ALLOWED), abs=0.06)
    assert bound[f"{tight}_elbo_perplexity"] == pytest.approx(ALLOWED, abs=0.4)
    assert (source == "mask") == ("reversal_bound_nats" not in bound)
    if source == "uniform":
        assert bound["forward_bound_nats"] > math.log(ALLOWED) + 0.3


def test_bounds_are_for_models_of_whole_texts():
    rows = torch.zeros(2, 8, dtype=torch.long)
    for traits in (None, FlowTraits(block_sizes=(4,)).as_dict()):
        model = SimpleNamespace(config=SimpleNamespace(flow=traits))
        with pytest.raises(ValueError, match="trained with the dfm objective on whole texts"):
            likelihood.likelihood_bound(model, rows)


def test_a_network_is_asked_with_the_mask_token(monkeypatch):
    """Of a network that rules all but one token out, the bound is the cross-entropy with that network."""
    model = flow_model("mask")
    with torch.no_grad():
        model.get_output_embeddings().weight.zero_()
    rows = torch.randint(2, MASK, (2, 40), generator=torch.Generator().manual_seed(0))
    bound = likelihood.likelihood_bound(model, rows, times=128)
    vocabulary = model.get_input_embeddings().num_embeddings - 1
    assert bound["forward_bound_nats"] == pytest.approx(math.log(vocabulary), abs=0.3)


def test_samples_are_judged_behind_what_was_given():
    judge, texts = build("llama"), [[5, 9, 30, 41], [7, 7, 60, 12, 3]]
    nats = judging.judged_nats(judge, texts, [2, 0])
    assert [len(tokens) for tokens in nats] == [2, 4]
    distribution = judge(input_ids=torch.tensor([texts[0]])).logits[0].log_softmax(-1)
    assert torch.allclose(nats[0], -torch.stack([distribution[1, 30], distribution[2, 41]]), atol=1e-5)


def test_two_generative_perplexities():
    perplexity = judging.generative_perplexity([torch.tensor([0.0, 0.0, 0.0]), torch.tensor([math.log(16.0)])])
    assert perplexity == {"generative_perplexity": 8.5, "corpus_generative_perplexity": 2.0}
    assert judging.generative_perplexity([torch.zeros(0)])["generative_perplexity"] is None


def test_mauve_where_it_is_installed(monkeypatch):
    judge, texts = build("llama"), [[5, 9, 30], [7, 7]]
    monkeypatch.setattr(judging.importlib.util, "find_spec", lambda name: None)
    assert judging.mauve(judge, texts, texts) is None
    package, seen = ModuleType("mauve"), {}
    package.compute_mauve = lambda **features: seen.update(features) or SimpleNamespace(mauve=0.5)
    monkeypatch.setitem(sys.modules, "mauve", package)
    monkeypatch.setattr(judging.importlib.util, "find_spec", lambda name: package)
    assert judging.mauve(judge, texts, texts[::-1]) == 0.5
    assert (seen["p_features"] == seen["q_features"][::-1]).all() and len(seen["q_features"]) == 2


@pytest.fixture(scope="module")
def embedded():
    import setflow

    return setflow.load_embedded()


def test_the_task_holds_every_solution(embedded):
    model, tokenizer = embedded
    task = make_task(tokenizer, 8)
    assert len(set(task.problems)) == 8 and all(isinstance(problem, Addition) for problem in task.problems)
    room = (task.real & ~task.fixed).sum(-1)
    assert all(len(solved) <= places for solved, places in zip(task.solved, room.tolist(), strict=True))
    judged = judge_completions(model, tokenizer, task, task.solved)
    assert judged["exact_match"] == 1 and judged["generative_perplexity"] < 1.1
    wrong = [solved[1:] for solved in task.solved[1:]] + [[]]
    assert judge_completions(model, tokenizer, task, wrong)["exact_match"] == 0
    with pytest.raises(ValueError, match="count must be at most"):
        make_task(tokenizer, 10000)


def test_completions_end_at_the_end_of_text(embedded):
    _, tokenizer = embedded
    task = make_task(tokenizer, 3)
    model = build("llama", vocab_size=2048)
    model.config.flow = FlowTraits("uniform").as_dict()
    model.generation_config.eos_token_id = 1
    found = complete(model, FlowDecoder(path="uniform", steps=2), task, 1.0, 0)
    assert found.forwards == [2, 2, 2] and len(found.tokens) == 3
    assert all(1 not in tokens[:-1] for tokens in found.tokens)


def test_the_loss_curve_of_a_model_that_knows_nothing(embedded):
    _, tokenizer = embedded
    model = build("llama", vocab_size=2048)
    model.config.flow = FlowTraits().as_dict()
    model.generation_config.mask_token_id = 3
    with torch.no_grad():
        model.get_output_embeddings().weight.zero_()
    curve = fit.masked_loss_curve(model, tokenizer, levels=4, count=2)
    assert torch.allclose(curve, torch.full_like(curve, math.log(2047)), atol=1e-4)


def test_fitted_quotas_lose_no_more_than_even_ones():
    curve = torch.linspace(1, 0, 20, dtype=torch.float64) ** 3
    rows = list(fit.excess_rows(curve, curve, (4, 8, 40)))
    assert [row["rounds"] for row in rows] == [4, 8]
    assert all(row["excess_nats_fitted"] < row["excess_nats_even"] for row in rows)
    decoder = sweep.make_decoder("mask", "topk", sweep.FITTED, 32, curve)
    assert decoder.steps == 20 and isinstance(decoder.scheduler, FittedSchedule)


def test_a_sweep_goes_on_where_it_stopped(embedded):
    model, tokenizer = embedded
    curves = (("mask", "topk", "linear", (1, 2)), ("uniform", "exact", "linear", (1,)))
    done = [{"source": "data", "exact_match": 1.0}]  # the figures of the true solutions stand first in the file
    done += [{"source": "mask", "sampler": "topk", "schedule": "linear", "steps": 1}]
    points = sweep.pending(curves, done, ("mask",))
    assert points == [("mask", "topk", "linear", 2)]
    task = make_task(tokenizer, 2)
    with pytest.warns(UserWarning, match="trained with blocks"):
        (row,) = sweep.measure_sweep({"mask": model}, model, tokenizer, task, points)
    assert row["forwards"] == 2 and sweep.curve_of(row) == "mask: topk"


def test_few_steps_are_measured_at_equal_forwards(embedded, tmp_path):
    _, tokenizer = embedded
    task = make_task(tokenizer, 2)
    model = build("llama", vocab_size=2048)
    model.config.flow = FlowTraits().as_dict()
    model.generation_config.mask_token_id, model.generation_config.eos_token_id = 3, 1
    taught = build("llama", vocab_size=2048)
    taught.config.flow, taught.generation_config = FlowTraits(transition=True).as_dict(), model.generation_config
    points = few_steps.make_points(True, [StepSettings.even("mask", 3)], most_steps=8)
    assert [few_steps.steps_of(decoder) for _, _, decoder in points] == [1, 2, 4, 8, 1, 2, 4, 8, 3, 8]
    chosen = [points[i] for i in (0, 5, 8, 9)]
    models = {"teacher": model, "distilled": taught}
    rows = list(few_steps.measure(models, build("llama", vocab_size=2048), tokenizer, task, chosen, 1.0, 0))
    assert [row["forwards"] for row in rows] == [1, 2, 3, 8] == [row["steps"] for row in rows]
    assert [row["curve"] for row in rows] == [few_steps.TEACHER, "distilled", few_steps.FITTED, "teacher, GLASS 0.5"]
    few_steps.draw([{"curve": "data", "exact_match": 1.0}, *rows], tmp_path / "few", "command")
    assert "| teacher, GLASS 0.5 | 8 | 8.0 |" in (tmp_path / "few.md").read_text() and (tmp_path / "few.png").is_file()


def test_few_steps_go_on_with_models_that_were_added(tmp_path):
    file, settings = tmp_path / "rows.json", {"teacher": "a", "seed": 0, "distilled": None, "fitted": ["4.json"]}
    rows = [{"curve": curve} for curve in ("data", few_steps.TEACHER, few_steps.DISTILLED, few_steps.FITTED)]
    file.write_text(json.dumps({"settings": settings, "rows": rows}))
    kept = [
        len(few_steps.rows_of(file, settings | change))
        for change in ({}, {"distilled": "b"}, {"fitted": []}, {"fitted": ["4.json", "8.json"]}, {"teacher": "c"})
    ]
    assert kept == [4, 3, 3, 4, 0] and few_steps.rows_of(tmp_path / "none.json", settings) == []


def test_figures_are_small(tmp_path):
    rows = [{"x": i, "y": j, "name": str(j)} for i in range(1, 9) for j in range(14)]
    plot_curves(rows, lambda row: row["name"], "x", {"y": "y"}, tmp_path / "figure.png", log_x=True)
    assert 1000 < (tmp_path / "figure.png").stat().st_size < 300_000


@pytest.mark.parametrize("name", ["mask", "uniform"])
def test_the_table_of_the_comparison_is_an_exact_posterior(name):
    """Many steps of our sampler on it give the data distribution."""
    source = euler.make_source(name, 2 + (name == "mask"))
    table = peer.Table(source, 2, 2)
    out = euler.run_ours(table, source, euler.start_text(source, 3000, 2), 24)
    distribution = torch.bincount(table.index(out), minlength=len(table.states)) / 3000
    expected = torch.zeros(len(table.states), dtype=torch.float64)
    expected[table.index(table.texts)] = table.data
    assert (distribution - expected).abs().sum() / 2 < 0.04
    assert (expected - 0.25).abs().sum() / 2 > 0.1 if name == "uniform" else True


def test_timed_runs_are_told_apart(monkeypatch):
    """The ratio is ours over theirs, on one network and the same steps."""
    asked = []

    class Slow:
        def run(self, network, source, x, steps, seed=0):
            asked.append(steps)
            torch.randn(400, 400) @ torch.randn(400, 400)
            return x

    row = peer.compare_times(Slow(), "uniform", 8, 1, 4, 3, 2)
    assert asked == [3, 3] and row["time_ratio"] == pytest.approx(
        row["ours_ms_per_step"] / row["theirs_ms_per_step"], rel=0.05
    )
    assert euler.start_text(UniformSource(8), 2, 4).shape == (2, 4)


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        (sweep.sweep, [], "give --mask FOLDER"),
        (peer.peer, ["--folder", "nowhere"], "flow_matching is not installed in 'nowhere'; run pip install"),
        (likelihood.likelihood, ["--model", "nowhere", "--texts", "nowhere.jsonl"], "nowhere"),
    ],
)
def test_mistakes_are_one_sentence(command, arguments, message, capsys):
    assert main(command, "name", arguments) == 2
    assert message in capsys.readouterr().err
