"""Fitted samplers: the hand-made ones among them, their files, and what a fit finds on a toy."""

import json
from dataclasses import replace

import pytest
import torch

from dfm import FlowDecoder
from dfm.draws import Draws
from dfm.fitting import Fit, Prompts, agreement, discrepancy, fit_sampler
from dfm.paths.mixture import MixturePath
from dfm.paths.schedulers import CosineScheduler, PowerScheduler
from dfm.paths.sources import MaskSource, UniformSource
from dfm.rates.kernels import largest_beta
from dfm.rates.velocities import CorrectorSchedule
from dfm.samplers.fitted import FittedSampler, StepSettings
from dfm.samplers.kernels import Corrector, ExactX1, ReMDM
from dfm.sampling.grid import time_grid
from dfm.sampling.loop import Posterior, sample
from dfm.sampling.state import FlowState
from tests.conftest import build
from tests.dfm.toys import Toy, times

V = 2
MASK = MixturePath(MaskSource(V + 1, V), CosineScheduler())
UNIFORM = MixturePath(UniformSource(V), CosineScheduler())
GENTLE = CorrectorSchedule(1.0, 0.5, 0.5)


def transition(toy: Toy, sampler, t: float) -> torch.Tensor:
    """[S, S'] of one step from every state, by running every branch of its draws."""
    rows = []
    for row in range(len(toy.states)):
        start = FlowState(**{name: value[row : row + 1] for name, value in vars(toy.everywhere(t)).items()})
        rows.append(toy.enumerate(sampler, start, to_end=False))
    return torch.stack(rows)


def of_distribution(toy: Toy, sampler, t: float, s: float) -> torch.Tensor:
    """[S, S'] of a step of a sampler that has a distribution for each position."""
    state = toy.everywhere(t)
    p1 = toy.reachable(toy.posterior(state.x, state.t), state)
    return toy.transition(sampler.distribution(state, p1, times(s).repeat(len(state.x))))


@pytest.mark.parametrize("path", [MASK, UNIFORM], ids=["mask", "uniform"])
def test_even_settings_are_the_exact_sampler_token_for_token(path):
    toy = Toy(path, length=2, tokens=V)
    x, frozen = torch.zeros(50, 2, dtype=torch.long), torch.zeros(50, 2, dtype=torch.bool)
    settings = StepSettings.even("mask", 4)
    fitted, exact = (
        sample(Posterior(toy, path.source), sampler, x, frozen, Draws.seeded(*range(50)), keep_trajectory=True)
        for sampler in (settings(path, time_grid(4)), ExactX1(path, time_grid(4)))
    )
    for (t, tokens), (t_other, others) in zip(fitted.trajectory, exact.trajectory, strict=True):
        assert torch.equal(t, t_other) and torch.equal(tokens, others)


@pytest.mark.parametrize("path", [MASK, UNIFORM], ids=["mask", "uniform"])
def test_correctors_are_settings(path):
    toy, grid = Toy(path, length=2, tokens=V, concentration=0.4), (0.0, 0.4, 0.6, 1.0)
    k, k_next = path.scheduler.kappa(times(0.4, 0.6))
    share = (GENTLE(times(0.4))[0] / largest_beta(k, k_next, path is MASK)).clamp_max(1).item()
    fitted = FittedSampler(path, grid, (1.0,) * 3, (0.0, share, 0.0))
    wanted = of_distribution(toy, Corrector(path, grid, GENTLE), 0.4, 0.6)
    assert 0 < share < 1 and torch.allclose(transition(toy, fitted, 0.4), wanted, atol=1e-12)


def test_remasking_is_a_setting():
    toy, grid = Toy(MASK, length=2, tokens=V, concentration=0.4), (0.0, 0.4, 0.6, 1.0)
    fitted = FittedSampler(MASK, grid, (1.0,) * 3, (0.3,) * 3)
    wanted = of_distribution(toy, ReMDM(MASK, grid, "rescale", 0.3), 0.4, 0.6)
    assert torch.allclose(transition(toy, fitted, 0.4), wanted, atol=1e-12)


def test_temperatures_sharpen_their_own_step():
    toy, grid = Toy(MASK, length=1, tokens=V), (0.0, 0.5, 1.0)
    settings = StepSettings("mask", grid, (0.5, 2.0), (0.0, 0.0))
    odds = toy.data[:V] / toy.data[:V].sum()
    wanted = {0.0: odds**2 / (odds**2).sum(), 0.5: odds.sqrt() / odds.sqrt().sum()}
    for t, distribution in wanted.items():
        step = transition(toy, settings(MASK, grid), t)[V, :V]
        assert torch.allclose(step / step.sum(), distribution, atol=1e-12)


def letters() -> tuple[Toy, Prompts]:
    """Texts of three equal letters, of which independent draws get few right."""
    path = MixturePath(MaskSource(4, 3), PowerScheduler())
    toy = Toy(path, length=3, tokens=3)
    toy.data[:] = 0
    for letter, odds in enumerate((0.5, 0.3, 0.2)):
        toy.data[(toy.states == letter).all(-1)] = odds
    nothing = torch.zeros(4, 3, dtype=torch.long)
    return toy, Prompts(nothing, nothing.bool(), lambda index: Posterior(toy, path.source))


def test_a_fit_is_nearer_to_many_steps_on_prompts_that_it_has_not_seen():
    toy, prompts = letters()
    start, told = StepSettings.even("mask", 2), []
    fit = Fit(iterations=45, texts=100, batch=2, many_steps=24)
    found = fit_sampler(prompts, toy.path, start, fit, told.append)
    assert found.fitted < found.start and len(told) == fit.iterations + 3
    assert found.times != start.times and found.temperatures != start.temperatures
    many, few, even = (
        prompts.texts(s(toy.path, s.times), 500, 7) for s in (StepSettings.even("mask", 24), found, start)
    )
    assert discrepancy(few, many, ~prompts.frozen) < 0.8 * discrepancy(even, many, ~prompts.frozen)
    short = replace(fit, iterations=2, texts=8)
    assert fit_sampler(prompts, toy.path, start, short) == fit_sampler(prompts, toy.path, start, short)  # by its seed


def test_what_is_worse_than_the_start_is_not_taken():
    toy, prompts = letters()
    start = StepSettings.even("mask", 12)
    found = fit_sampler(prompts, toy.path, start, Fit(1, 200, 4, 32, learning_rate=50.0))
    assert found.fitted == found.start and replace(found, start=None, fitted=None) == start


def test_agreement_counts_runs_of_equal_tokens():
    x, y = torch.tensor([[[1, 2, 3, 4, 5]]]), torch.tensor([[[1, 2, 3, 0, 5]]])
    free = torch.tensor([[True] * 5])
    assert agreement(x, y, free).item() == pytest.approx(4 / 5 + 2 / 4 + 0 / 2)
    assert agreement(x, x, free).item() == pytest.approx(3.0)
    free = torch.tensor([[False, True, True, True, False]])
    assert agreement(x, y, free).item() == pytest.approx(2 / 3 + 1 / 2)


def test_discrepancy_is_0_for_one_distribution_and_not_for_two():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(2, (6, 60, 4), generator=generator) for _ in range(2))
    equal = a[..., :1].expand(-1, -1, 4)
    free = torch.ones(6, 4, dtype=torch.bool)
    assert abs(discrepancy(a, b, free)) < 0.02 < 0.2 < discrepancy(a, equal, free)


def test_settings_are_saved_and_taken_by_decoders(tmp_path):
    settings = StepSettings("mask", (0.0, 0.3, 1.0), (0.7, 0.9), (0.0, 0.0), 0.2, 0.1)
    file = tmp_path / "fitted.json"
    settings.save(file)
    assert StepSettings.load(file) == settings and [path.name for path in tmp_path.iterdir()] == ["fitted.json"]
    decoder = FlowDecoder(sampler=str(file))
    assert decoder == FlowDecoder(sampler=settings) and hash(decoder) == hash(FlowDecoder(sampler=settings, steps=None))
    model = build("llama")
    rows, fixed = torch.full((2, 9), 5), torch.zeros(2, 9, dtype=torch.bool)
    fixed[:, 0] = True
    out = decoder.infill(model, rows, fixed)
    assert out.evaluations.tolist() == [2, 2]
    torch.manual_seed(0)
    decoded = model.generate(rows[:, :1], max_new_tokens=8, do_sample=True, top_k=0, custom_generate=decoder)
    assert decoded.shape == (2, 9)
    even, exact = FlowDecoder(sampler=StepSettings.even("mask", 3)), FlowDecoder(steps=3)
    assert torch.equal(even.infill(model, rows, fixed).tokens, exact.infill(model, rows, fixed).tokens)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "must be a JSON object with 'source', 'times', 'temperatures' and 'shares'"),
        ({"source": "mask"}, "must be a JSON object with"),
        ({"source": "noise", "times": [0, 1], "temperatures": [1], "shares": [0]}, "source must be one of"),
        ({"source": "mask", "times": [0, 0.5], "temperatures": [1], "shares": [0]}, "times must be two or more"),
        ({"source": "mask", "times": [0, 1], "temperatures": [1, 1], "shares": [0]}, "temperatures must be 1 numbers"),
        ({"source": "mask", "times": [0, 1], "temperatures": [0], "shares": [0]}, "temperatures must be"),
        ({"source": "mask", "times": [0, 1], "temperatures": [1], "shares": [2]}, "shares must be"),
        ({"source": "uniform", "times": [0, 1], "temperatures": [1], "shares": [0]}, "path must be 'uniform'"),
    ],
)
def test_files_that_are_no_settings_are_refused(tmp_path, content, message):
    file = tmp_path / "fitted.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ValueError, match=message):
        FlowDecoder(sampler=str(file))


def test_other_numbers_of_steps_and_missing_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match="steps must be 3, as this sampler was fitted, or left out, got 4"):
        FlowDecoder(sampler=StepSettings.even("mask", 3), steps=4)
    with pytest.raises(ValueError, match="sampler '.*nowhere.json' does not exist"):
        FlowDecoder(sampler=str(tmp_path / "nowhere.json"))
    toy, prompts = letters()
    with pytest.raises(ValueError, match="prompts must be"):
        fit_sampler(prompts.subset(torch.tensor([0])), toy.path, StepSettings.even("mask", 2), Fit())
