"""Few-step distillation: what the network is told, what its teacher shows, and the distribution of one step."""

import pytest
import torch

from decoding.forward.noise_level import (
    GIVEN,
    NONE,
    ROWS,
    TRANSITION_ROWS,
    add_noise_level_rows,
    level_features,
    noise_level_ids,
    transition_levels,
)
from dfm import FlowDecoder, FlowObjective, TransitionObjective
from dfm.flow_config import FlowTraits
from dfm.transition import token_of_number
from sbd import SetBlockObjective
from tests.conftest import BOS, VOCAB, build
from tests.dfm.networks import uniform_model

LETTERS, ODDS = torch.tensor([10, 20, 30]), torch.tensor([0.5, 0.3, 0.2])


def texts(count: int) -> dict[str, torch.Tensor]:
    """BOS and one letter three times."""
    letter = LETTERS[torch.multinomial(ODDS, count, replacement=True)]
    rows = torch.cat([torch.full((count, 1), BOS), letter[:, None].expand(-1, 3)], dim=1)
    return {"input_ids": rows, "document_ids": torch.zeros_like(rows)}


def train(objective, model, steps: int) -> None:
    optimiser = torch.optim.AdamW(model.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.0, steps)
    for _ in range(steps):
        loss, _ = objective(model, texts(64))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()


def distance(model, sampler: str, steps: int, count: int = 1000) -> float:
    """Total variation of samples to the distribution of texts."""
    rows, fixed = texts(count)["input_ids"], torch.zeros(count, 4, dtype=torch.bool)
    fixed[:, 0] = True
    found = FlowDecoder(sampler=sampler, steps=steps).infill(model, rows, fixed).tokens[:, 1:]
    alike = (found == found[:, :1]).all(-1)
    shares = torch.stack([(alike & (found[:, 0] == letter)).float().mean() for letter in LETTERS])
    return ((shares - ODDS).abs().sum() + 1 - shares.sum()).item() / 2


@pytest.fixture(scope="module")
def taught():
    """(teacher, student), both small: texts of equal letters, of which independent draws get 16 % right."""
    torch.manual_seed(0)
    model, flow = build("llama", initializer_range=0.05).requires_grad_(True), FlowObjective(span="row")
    train(flow, model, 200)
    flow.record(model)
    objective = TransitionObjective(span="row", teacher_steps=3)
    objective.prepare(model, None)
    train(objective, model, 300)
    objective.record(model)
    return objective.teacher, model


def test_one_step_of_the_student_has_the_distribution_of_many_of_its_teacher(taught):
    teacher, student = taught
    assert distance(teacher, "exact", 1) > 0.75
    assert distance(student, "transition", 1) < 0.3 > distance(teacher, "exact", 12)


def test_more_steps_serve_too_and_the_student_stays_a_flow_model(taught):
    _, student = taught
    assert distance(student, "transition", 12) < 0.2 and distance(student, "exact", 12) < 0.25
    assert distance(student, "exact", 1) > 0.6  # no step told, so nothing that makes tokens agree


def test_a_block_decoder_tells_the_step_too(taught):
    _, student = taught
    torch.manual_seed(0)
    rows = torch.full((60, 1), BOS)
    decoder, settings = FlowDecoder(sampler="transition", steps=1), {"max_new_tokens": 3, "do_sample": True, "top_k": 0}
    out = student.generate(rows, attention_mask=torch.ones_like(rows), custom_generate=decoder, **settings)[:, 1:]
    assert (out == out[:, :1]).all(-1).float().mean() > 0.6


def test_greedy_steps_take_the_likeliest_text(taught):
    _, student = taught
    rows, fixed = torch.full((20, 4), BOS), torch.zeros(20, 4, dtype=torch.bool)
    fixed[:, 0] = True
    decoder = FlowDecoder(sampler="transition", steps=1)
    assert (decoder.infill(student, rows, fixed, temperature=0).tokens[:, 1:] == LETTERS[0]).all()


@pytest.mark.parametrize("settings", [{"span": "row"}, {"given": "prefix"}, {"block_sizes": (2, 3)}])
def test_what_is_taught(settings):
    """Tokens of steps come from the teacher, those without from the text; what is not asked for stays."""
    torch.manual_seed(1)
    model = build("llama", initializer_range=0.05).requires_grad_(True)
    FlowObjective(**settings).record(model)
    objective = TransitionObjective(**settings, teacher_steps=2)
    objective.prepare(model, None)
    loss, metrics = objective(model, texts(16))
    loss.backward()
    assert metrics["num_targets"] > 10 and {"transition_loss", "flow_loss"} < metrics.keys()
    assert ("ntp_loss" in metrics) == ("block_sizes" in settings)
    told = model.get_input_embeddings().weight.grad[-TRANSITION_ROWS:]
    assert (told.abs().amax(-1) > 0).sum() >= TRANSITION_ROWS - 2
    assert all(p.grad is None and not p.requires_grad for p in objective.teacher.parameters())
    before = torch.cat([p.flatten() for p in objective.teacher.parameters()])
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    assert torch.equal(torch.cat([p.flatten() for p in objective.teacher.parameters()]), before)


def test_a_set_block_model_is_a_teacher():
    model = build("llama", initializer_range=0.05)
    SetBlockObjective(block_sizes=(2, 4)).record(model)
    model.generation_config.trained_block_sizes = [2, 4]
    objective = TransitionObjective(block_sizes=(2, 4), teacher_steps=2)
    objective.prepare(model, None)
    assert objective(model, texts(4))[0].isfinite()
    with pytest.raises(ValueError, match="model must be a flow model or one with mask rows"):
        objective.prepare(build("llama"), None)
    with pytest.raises(ValueError, match="source must be 'uniform', as the model, got 'mask'"):
        objective.prepare(uniform_model(), None)


def test_numbers_choose_tokens_by_the_teachers_distribution():
    logits = torch.randn(5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    numbers = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    found = torch.bincount(token_of_number(logits.expand(10_000, -1), numbers), minlength=5) / 10_000
    assert (found - logits.softmax(-1)).abs().max() < 2e-4
    tokens = token_of_number(logits.expand(10_000, -1), numbers)
    assert tokens[0] == logits.argmax() and tokens[-1] == logits.argmin()


def test_levels_of_a_transition():
    level = torch.tensor([[0, 250, 1000, GIVEN, NONE]])
    told = transition_levels(level[:, :4], torch.full((1, 4), 0.5), torch.tensor([[0.0, 0.25, 1.0, 0.3]]))
    features = level_features(torch.cat([told, level[:, 4:]], dim=1), TRANSITION_ROWS)
    assert torch.equal(features[..., :ROWS], level_features(level))
    assert torch.equal(features[0, :3, ROWS:-8], level_features(torch.full((1, 3), 500))[0, :, :8])
    assert torch.equal(features[0, :3, -8:], level_features(torch.tensor([[0, 250, 1000]]))[0, :, :8])
    assert (features[0, 3:, ROWS:] == 0).all()
    plain = level_features(level, TRANSITION_ROWS)  # no step: nothing but the level
    assert torch.equal(plain[..., :ROWS], level_features(level)) and (plain[..., ROWS:] == 0).all()


def test_rows_are_added_to_those_that_a_model_has():
    model = build("llama")
    add_noise_level_rows(model)
    with torch.no_grad():
        model.get_input_embeddings().weight[VOCAB:] = 1
    add_noise_level_rows(model, TRANSITION_ROWS)
    added = model.get_input_embeddings().weight[VOCAB:]
    assert noise_level_ids(model) == list(range(VOCAB, VOCAB + TRANSITION_ROWS))
    assert (added[:ROWS] == 1).all() and (added[ROWS:] == 0).all()


def test_a_model_that_was_not_taught_is_refused():
    model = build("llama")
    with pytest.raises(ValueError, match="sampler 'transition' needs a model trained with objective dfm-transition"):
        FlowDecoder(sampler="transition", steps=1).infill(model, texts(1)["input_ids"], torch.ones(1, 4).bool())
    assert not FlowTraits.of(model.config).transition


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"source": "uniform"}, "source must be 'mask' for transitions, got 'uniform'"),
        ({"loss": "generalised_kl"}, "loss must be 'cross_entropy' for transitions"),
        ({"time_input": "none"}, "time_input must be None for transitions, got 'none'"),
        ({"teacher_steps": 0}, "teacher_steps must be"),
        ({"to_the_end": 1.5}, "to_the_end must be"),
        ({"without_step": 1.0}, "without_step must be"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        TransitionObjective(**settings)


def test_adapters_are_refused():
    for kind in ("lora", "gated"):
        with pytest.raises(ValueError, match=f"{kind} trains no rows that tell a step"):
            TransitionObjective().for_tuning(kind)
