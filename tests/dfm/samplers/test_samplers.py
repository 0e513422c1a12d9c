"""The contract of all samplers: frozen tokens, batch = single runs, counts of evaluations, masks known by a boolean."""

import itertools
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from decoding.rules import ConfidenceFactor, ConfidenceThreshold, EntropyBound, TopK
from dfm.draws import Draws
from dfm.paths.beta_schedules import PowerBeta
from dfm.paths.metric import EmbeddingDistance, MetricPath
from dfm.paths.mixture import MixturePath
from dfm.paths.schedulers import (
    CosineScheduler,
    KineticOptimalScheduler,
    PiecewiseLinearScheduler,
    PowerScheduler,
)
from dfm.paths.sources import CouplingSource, MaskSource, UniformSource
from dfm.rates.conditional import KineticOptimalVelocity
from dfm.rates.velocities import CorrectorSchedule, CorrectorVelocity, ForwardVelocity
from dfm.samplers.events import FirstHitting, Uniformisation
from dfm.samplers.fitted import FittedSampler
from dfm.samplers.glass import Glass
from dfm.samplers.kernels import D3PM, Adaptive, Corrected, Corrector, ExactX1, FrozenPass, Psi, ReMDM
from dfm.samplers.metric import MetricX1
from dfm.samplers.ranked import P2, CanvasRule, LooGibbs, RuleSampler, ScheduledTopK, best
from dfm.samplers.rates import Euler, EulerX1, GuidedEuler, TauLeap, ThetaTrapezoidal
from dfm.sampling.grid import time_grid
from dfm.sampling.loop import Posterior, run_step, sample
from dfm.sampling.state import FlowState
from tests.dfm.toys import times

V, MASK_ID, L, STEPS = 6, 2, 5, 4
GRID = time_grid(STEPS)
MASK = MixturePath(MaskSource(V, MASK_ID), CosineScheduler())
UNIFORM = MixturePath(UniformSource(V, excluded=(MASK_ID,)), CosineScheduler())
DISTANCE = EmbeddingDistance(torch.randn(V, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
METRIC = MetricPath(UniformSource(V), PowerBeta(), DISTANCE)


def on_mixtures(make):
    return {"mask": make(MASK), "uniform": make(UNIFORM)}


SAMPLERS = {
    f"{kind}-{name}": (sampler, evaluations)
    for kind, by_source, evaluations in [
        ("euler", on_mixtures(lambda p: Euler(p, GRID, ForwardVelocity(p))), STEPS),
        ("euler-corrector", on_mixtures(lambda p: Euler(p, GRID, CorrectorVelocity(p))), STEPS),
        ("euler_x1", on_mixtures(lambda p: EulerX1(p, GRID, KineticOptimalVelocity(p))), STEPS),
        ("tau_leap", on_mixtures(lambda p: TauLeap(p, GRID, ForwardVelocity(p))), STEPS),
        ("theta", on_mixtures(lambda p: ThetaTrapezoidal(p, GRID, ForwardVelocity(p))), 2 * STEPS),
        ("guided", on_mixtures(lambda p: GuidedEuler(p, GRID, ForwardVelocity(p), weight=0.5)), 2 * STEPS),
        ("exact_x1", on_mixtures(lambda p: ExactX1(p, GRID)), STEPS),
        ("d3pm", on_mixtures(lambda p: D3PM(p, GRID)), STEPS),
        ("psi", on_mixtures(lambda p: Psi(p, GRID)), STEPS),
        ("corrector", on_mixtures(lambda p: Corrector(p, GRID)), STEPS),
        ("frozen", on_mixtures(lambda p: Corrected(ExactX1(p, GRID), FrozenPass(p), passes=2)), 3 * STEPS - 2),
        ("adaptive-corrector", on_mixtures(lambda p: Adaptive(Corrector(p, GRID), least=0.05)), None),
        ("adaptive-euler", on_mixtures(lambda p: Adaptive(Euler(p, GRID, ForwardVelocity(p)))), None),
        ("metric", {"metric": MetricX1(METRIC, GRID)}, STEPS),
        ("first_hitting", {"mask": FirstHitting(MASK)}, None),
        ("uniformisation", {"uniform": Uniformisation(UNIFORM, rest=0.05)}, None),
        ("remdm", {"mask": ReMDM(MASK, GRID, eta=0.2)}, STEPS),
        ("remdm-rescale", {"mask": ReMDM(MASK, GRID, "rescale", eta=0.5)}, STEPS),
        ("remdm-confidence", {"mask": ReMDM(MASK, GRID, "confidence", eta=1.0)}, STEPS),
        ("remdm-loop", {"mask": ReMDM.loop(MASK.source, 10)}, 10),
        ("glass", {"mask": Glass(MASK, GRID, 0.3, inner_steps=3)}, 3 * STEPS),
        ("fitted", on_mixtures(lambda p: FittedSampler(p, GRID, (1.0, 0.5, 2.0, 1.0), (0.0, 0.5, 0.0, 0.3))), STEPS),
        ("topk", {"mask": ScheduledTopK(MASK, GRID)}, STEPS),
        ("topk-gumbel", {"mask": ScheduledTopK(MASK, GRID, "margin", gumbel=0.5)}, STEPS),
        ("entropy", {"mask": RuleSampler(MASK.source, EntropyBound(0.5))}, None),
        ("threshold", {"mask": RuleSampler(MASK.source, ConfidenceThreshold(0.5))}, None),
        ("factor", {"mask": RuleSampler(MASK.source, ConfidenceFactor(1.0))}, None),
        ("canvas", {"uniform": CanvasRule(UNIFORM, EntropyBound(2.0), max_evaluations=6)}, None),
        ("p2", {"mask": P2(MASK, GRID, eta=2.0)}, STEPS),
        ("gibbs", {"uniform": Corrected(ExactX1(UNIFORM, GRID), LooGibbs(UNIFORM), passes=2)}, 3 * STEPS - 2),
        ("gibbs-doubtful", {"uniform": Corrected(ExactX1(UNIFORM, GRID), LooGibbs(UNIFORM, 2, "least_confident"))}, 7),
    ]
    for name, sampler in by_source.items()
}
IDS = list(SAMPLERS)
CASES = list(SAMPLERS.values())
pytestmark = pytest.mark.filterwarnings("ignore:Euler")


def source_of(name: str):
    return {"mask": MASK.source, "uniform": UNIFORM.source, "metric": METRIC.source}[name.split("-")[-1]]


def network(seed: int = 0):
    """Logits that depend on every token to the right and on the time; excluded and mask tokens as likely as others."""
    generator = torch.Generator().manual_seed(seed)
    own = torch.randn(V, V, dtype=torch.float64, generator=generator)
    right = torch.randn(V, V, dtype=torch.float64, generator=generator)

    def logits(x, t, frozen):
        onto = torch.nn.functional.one_hot(x, V).double()
        behind = onto.flip(1).cumsum(1).flip(1) - onto
        return onto @ own + behind @ right + t[:, None, None]

    return logits


def posterior_for(name: str) -> Posterior:
    return Posterior(network(), source_of(name), unconditional=network(1))


def texts(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ragged conditions, among them the mask token as text."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randint(0, V, (count, L), generator=generator)
    frozen = torch.rand(count, L, generator=generator) < 0.4
    x[0, 0], frozen[0, 0] = MASK_ID, True
    frozen[0, 1] = False
    frozen[-1] = True  # nothing to do
    return x, frozen


@pytest.mark.parametrize("name", SAMPLERS)
def test_frozen_tokens_stay_and_no_mask_is_emitted(name):
    x, frozen = texts(6)
    out = sample(posterior_for(name), SAMPLERS[name][0], x, frozen, Draws.seeded(*range(6)))
    assert torch.equal(out.tokens[frozen], x[frozen])
    if "metric" not in name:  # the mask token is an ordinary one there
        assert "uniform" in name or (out.tokens[~frozen] != MASK_ID).all()
    assert out.evaluations[-1] == 0 and torch.equal(out.tokens[-1], x[-1])


@pytest.mark.parametrize("name", SAMPLERS)
def test_batch_equals_single_runs(name):
    sampler, _ = SAMPLERS[name]
    x, frozen = texts(6)
    batch = sample(posterior_for(name), sampler, x, frozen, Draws.seeded(*range(6)))
    for b in range(6):
        single = sample(posterior_for(name), sampler, x[b : b + 1], frozen[b : b + 1], Draws.seeded(b))
        assert torch.equal(single.tokens[0], batch.tokens[b])
        assert single.evaluations[0] == batch.evaluations[b]


@pytest.mark.parametrize("name", SAMPLERS)
def test_padding_on_the_left_costs_no_random_numbers(name):
    sampler, _ = SAMPLERS[name]
    short, frozen = torch.tensor([[1, 0, 0]]), torch.tensor([[True, False, False]])
    x = torch.nn.functional.pad(short, (2, 0), value=MASK_ID)
    alone = sample(posterior_for(name), sampler, short, frozen, Draws.seeded(3))
    padded = sample(
        posterior_for(name), sampler, x, torch.nn.functional.pad(frozen, (2, 0), value=True), Draws.seeded(3)
    )
    assert torch.equal(padded.tokens[:, 2:], alone.tokens)


@pytest.mark.parametrize("name", SAMPLERS)
def test_evaluations_are_counted(name):
    sampler, expected = SAMPLERS[name]
    calls = []

    def counted(x, t, frozen):
        calls.append(t)
        return network()(x, t, frozen)

    posterior = Posterior(counted, source_of(name), unconditional=counted)
    x, frozen = torch.zeros(1, L, dtype=torch.long), torch.zeros(1, L, dtype=torch.bool)
    out = sample(posterior, sampler, x, frozen, Draws.seeded(0), keep_trajectory=True)
    assert out.evaluations.tolist() == [len(calls)]
    if expected is not None:
        assert len(calls) == expected
    if name.startswith("first_hitting"):
        assert len(calls) == L
    moments = [t.item() for t, _ in out.trajectory]
    assert all(a <= b for a, b in itertools.pairwise(moments)) or name.startswith("canvas")
    assert len(out.trajectory) == len(moments) and torch.equal(out.trajectory[-1][1], out.tokens)


@pytest.mark.parametrize("name", SAMPLERS)
def test_same_seed_same_text_other_seed_other_text(name):
    x, frozen = torch.zeros(4, L, dtype=torch.long), torch.zeros(4, L, dtype=torch.bool)
    runs = [
        sample(posterior_for(name), SAMPLERS[name][0], x, frozen, Draws.seeded(*seeds)).tokens
        for seeds in ((0, 1, 2, 3), (0, 1, 2, 3), (4, 5, 6, 7))
    ]
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


def test_temperature_0_and_small_top_p_take_the_likeliest_token():
    x, frozen = torch.zeros(2, L, dtype=torch.long), torch.zeros(2, L, dtype=torch.bool)
    settings = ({"temperature": 0.0}, {"top_p": 1e-9})
    outs = [
        sample(Posterior(network(), MASK.source, **s), ScheduledTopK(MASK, GRID), x, frozen, Draws.seeded(i, 9 + i))
        for i, s in enumerate(settings)
    ]
    assert torch.equal(outs[0].tokens, outs[1].tokens) and torch.equal(outs[0].tokens[0], outs[0].tokens[1])


def started(path, t: float = 0.0, seeds=(0,)) -> SimpleNamespace:
    draws = Draws.seeded(*seeds)
    nothing = torch.zeros(len(seeds), L, dtype=torch.bool)
    state = FlowState.start(torch.zeros(len(seeds), L, dtype=torch.long), nothing, path.source, draws)
    state.t += t
    return SimpleNamespace(state=state, draws=draws)


@pytest.mark.parametrize("make", [ExactX1, ReMDM, P2, ScheduledTopK])
def test_the_mask_token_as_text_is_no_mask(make):
    x, frozen = torch.tensor([[MASK_ID, 0, 0, MASK_ID, 0]]), torch.tensor([[True, False, False, True, False]])
    draws, posterior = Draws.seeded(0), posterior_for("mask")
    state = FlowState.start(x, frozen, MASK.source, draws)
    for _ in range(2):
        assert not state.masked[frozen].any() and state.masked.any()
        run_step(make(MASK, GRID).step(state, draws), lambda query: posterior.answer(query, state))


def test_rows_of_a_state_may_be_at_different_times():
    """What a batch of blocks needs: one sequence starts anew while the others go on."""
    posterior, sampler = posterior_for("mask"), ExactX1(MASK, GRID)
    both, late = started(MASK, seeds=(0, 1)), started(MASK, seeds=(1,))
    fresh = vars(both.state).copy()
    for _ in range(2):
        run_step(sampler.step(both.state, both.draws), lambda query: posterior.answer(query, both.state))
    for field in ("x", "masked", "t"):  # the second sequence goes back to the start
        getattr(both.state, field)[1] = fresh[field][1]
    both.draws.generators[1].manual_seed(1)
    for _ in range(2):
        run_step(sampler.step(both.state, both.draws), lambda query: posterior.answer(query, both.state))
        run_step(sampler.step(late.state, late.draws), lambda query: posterior.answer(query, late.state))
    assert both.state.t.tolist() == [1.0, 0.5] and both.state.done.tolist() == [True, False]
    assert torch.equal(both.state.x[1], late.state.x[0]) and torch.equal(both.state.masked[1], late.state.masked[0])


def test_a_coupled_source_starts_from_the_text_given():
    path = MixturePath(CouplingSource(V, lambda x1, draws: x1.flip(1)), CosineScheduler())
    x, frozen = torch.tensor([[0, 1, 3, 4, 5]]), torch.zeros(1, L, dtype=torch.bool)
    posterior = Posterior(network(), path.source)
    out = sample(posterior, ExactX1(path, GRID), x, frozen, Draws.seeded(0), keep_trajectory=True)
    assert torch.equal(out.trajectory[0][1], x) and not torch.equal(out.tokens, x)


def test_topk_reveals_the_scheduled_numbers_best_first():
    path = MixturePath(MASK.source, PiecewiseLinearScheduler((0.0, 0.2, 0.6, 1.0)))
    for order in ("confidence", "entropy", "margin"):
        sampler, run = ScheduledTopK(path, time_grid(3), order), started(path)
        left = []
        while not run.state.done.all():
            generator = sampler.step(run.state, run.draws)
            query = next(generator)
            distribution = posterior_for("mask").answer(query, run.state)
            p1 = posterior_for("mask").answer(replace(query, only=None), run.state)
            before = run.state.masked.clone()
            with pytest.raises(StopIteration):
                generator.send(distribution)
            revealed, rest = before & ~run.state.masked, before & run.state.masked
            score = {"confidence": p1.amax(-1), "margin": p1.topk(2).values @ times(1.0, -1.0)}.get(
                order, (p1 * p1.clamp_min(1e-300).log()).sum(-1)
            )
            assert not rest.any() or score[revealed].min() >= score[rest].max()
            left.append(int(run.state.masked.sum()))
        assert left == [4, 2, 0]


def test_best_counts_only_those_asked_for():
    cost, among = torch.tensor([[0.1, 0.3, 0.2, 0.0]]), torch.tensor([[True, True, True, False]])
    assert best(cost, among, torch.tensor([2])).tolist() == [[True, False, True, False]]
    assert best(cost, among, torch.tensor([9])).tolist() == [among[0].tolist()]


def test_p2_keeps_the_scheduled_number_and_eta_protects_old_tokens():
    answer = posterior_for("mask").answer
    for eta in (0.0, 1.0, 1e9):
        run, sampler = started(MASK), P2(MASK, GRID, eta)
        taken_back = 0
        for k in MASK.scheduler.kappa(times(*GRID[1:])).tolist():
            before = run.state.masked.clone()
            run_step(sampler.step(run.state, run.draws), lambda query, state=run.state: answer(query, state))
            taken_back += int((run.state.masked & ~before).sum())
            assert (~run.state.masked).sum() == int(k * L + 1e-9)
        assert taken_back == 0 if eta == 1e9 else eta > 0 or taken_back > 0


def test_p2_asks_a_planner():
    wanted = torch.tensor([[0.0, 3.0, 0.0, 2.0, 1.0]])
    run, sampler = started(MASK), P2(MASK, (0.0, 0.7, 1.0), planner=lambda x1, state: wanted)
    run_step(sampler.step(run.state, run.draws), lambda query: posterior_for("mask").answer(query, run.state))
    assert run.state.masked.tolist() == [[True, False, True, False, True]]


def revealed_per_step(sampler) -> list[int]:
    run, posterior, counts = started(MASK), posterior_for("mask"), [L]
    while not run.state.done.all():
        run_step(sampler.step(run.state, run.draws), lambda query: posterior.answer(query, run.state))
        counts.append(int(run.state.masked.sum()))
    return [a - b for a, b in itertools.pairwise(counts)]


def test_a_rule_decides_how_many_tokens_a_step_reveals():
    assert revealed_per_step(RuleSampler(MASK.source, EntropyBound(0.0))) == [1] * L
    assert revealed_per_step(RuleSampler(MASK.source, EntropyBound(float("inf")))) == [L]
    assert revealed_per_step(RuleSampler(MASK.source, TopK(2))) == [2, 2, 1]


def test_canvas_rule_accepts_all_or_goes_on_to_its_limit():
    x, frozen = torch.zeros(1, L, dtype=torch.long), torch.zeros(1, L, dtype=torch.bool)
    for bound, evaluations in ((float("inf"), 1), (0.0, 7)):
        sampler = CanvasRule(UNIFORM, EntropyBound(bound), max_evaluations=7)
        out = sample(posterior_for("uniform"), sampler, x, frozen, Draws.seeded(0), keep_trajectory=True)
        assert out.evaluations.tolist() == [evaluations]
    assert out.trajectory[1][0].item() == pytest.approx(UNIFORM.scheduler.inverse(times(1 / L)).item())


def test_adaptive_shortens_steps_until_probabilities_fit():
    corrector = Corrector(UNIFORM, time_grid(2), CorrectorSchedule(4.0))
    x, frozen = torch.zeros(1, L, dtype=torch.long), torch.zeros(1, L, dtype=torch.bool)
    out = sample(posterior_for("uniform"), Adaptive(corrector, 1e-2), x, frozen, Draws.seeded(0), keep_trajectory=True)
    moments = [t.item() for t, _ in out.trajectory]
    assert len(moments) > 6 and 0.5 in moments and moments[1] == 0.5  # no correction, so no bound, at time 0
    for t, s in itertools.pairwise(moments[1:]):
        k, k_next = UNIFORM.scheduler.kappa(times(t, s)).tolist()
        beta = corrector.beta(times(t)).item()
        fits = (1 + beta) * (k_next - k) / (1 - k) + beta * (k_next - k) / k <= 1 + 1e-9
        assert fits or s - t <= 1e-2 + 1e-12
    euler = Euler(UNIFORM, time_grid(2), CorrectorVelocity(UNIFORM, CorrectorSchedule(4.0)))
    with pytest.warns(UserWarning, match="scaled to 1"):
        sample(posterior_for("uniform"), euler, x, frozen, Draws.seeded(0))


def test_adaptive_steps_depend_on_its_bound_more_than_on_the_grid():
    """What its docstring says: with the default corrector, whose backward rate is large at the start."""
    path = MixturePath(MASK.source, PowerScheduler())
    x, frozen = torch.zeros(1, L, dtype=torch.long), torch.zeros(1, L, dtype=torch.bool)
    found = [
        sample(
            posterior_for("mask"), Adaptive.default(path, time_grid(n)), x, frozen, Draws.seeded(0)
        ).evaluations.item()
        for n in (4, 8, 32, 128)
    ]
    assert found == [45, 52, 71, 144]


def test_adaptive_euler_never_warns(recwarn):
    x, frozen = torch.zeros(1, L, dtype=torch.long), torch.zeros(1, L, dtype=torch.bool)
    velocity = CorrectorVelocity(UNIFORM, CorrectorSchedule(4.0))
    out = sample(
        posterior_for("uniform"), Adaptive(Euler(UNIFORM, time_grid(2, 0.9), velocity)), x, frozen, Draws.seeded(0)
    )
    assert out.evaluations[0] > 4 and not [w for w in recwarn if "Euler" in str(w.message)]


@pytest.mark.parametrize(
    ("make", "wanted"),
    [
        (lambda: ReMDM(UNIFORM, GRID), "a"),
        (lambda: ScheduledTopK(UNIFORM, GRID), "a"),
        (lambda: P2(UNIFORM, GRID), "a"),
        (lambda: FirstHitting(UNIFORM), "a"),
        (lambda: RuleSampler(UNIFORM.source, TopK(1)), "a"),
        (lambda: CanvasRule(MASK, TopK(1)), "no"),
        (lambda: LooGibbs(MASK), "no"),
    ],
)
def test_samplers_refuse_sources_that_they_cannot_use(make, wanted):
    with pytest.raises(ValueError, match=f"source must have {wanted} mask token here"):
        make()


def test_each_sequence_needs_a_generator():
    x, frozen = texts(3)
    with pytest.raises(ValueError, match="draws must have 3 generators"):
        sample(posterior_for("mask"), ExactX1(MASK, GRID), x, frozen, Draws.seeded(0, 1))


def test_a_scheduler_of_its_own_for_each_token_is_refused_where_it_means_nothing():
    path = MixturePath(UniformSource(V), KineticOptimalScheduler(torch.full((V,), 1 / V)))
    x, frozen = texts(2)
    with pytest.raises(ValueError, match="scheduler must be the same for all data tokens"):
        sample(posterior_for("uniform"), Uniformisation(path), x, frozen, Draws.seeded(0, 1))
