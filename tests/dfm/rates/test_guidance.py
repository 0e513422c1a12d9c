"""Guidance: identity at w = 0 with one evaluation, and the three places agree where they should."""

import pytest
import torch

from dfm.draws import Draws
from dfm.paths.mixture import MixturePath
from dfm.paths.schedulers import PowerScheduler
from dfm.paths.sources import MaskSource
from dfm.rates.guidance import guide_distribution, guide_logits, guide_rates
from dfm.rates.velocities import ForwardVelocity
from dfm.samplers.kernels import D3PM, ExactX1
from dfm.samplers.rates import GuidedEuler
from dfm.sampling.grid import time_grid
from dfm.sampling.loop import Posterior, sample
from tests.dfm.toys import Toy, dirichlet, times

V = 4
PATH = MixturePath(MaskSource(V, V - 1), PowerScheduler())
COND, UNCOND = (Toy(PATH, 2, V - 1, seed=seed, concentration=4.0) for seed in (0, 1))


def test_weight_0_is_the_conditional_distribution_itself():
    p, q, z = dirichlet(V), dirichlet(V, seed=1), torch.tensor(2)
    assert torch.equal(guide_logits(p.log(), q.log(), 0), p.log())
    assert torch.equal(guide_distribution(p, q, 0), p) and torch.equal(guide_rates(p, q, z, 0), p)


def test_logits_are_a_power_of_each():
    p, q = dirichlet(V), dirichlet(V, seed=1)
    guided = guide_logits(p.log() + 3, q.log() - 2, 1.5).softmax(-1)
    expected = p**2.5 * q**-1.5
    assert torch.allclose(guided, expected / expected.sum())
    assert torch.allclose(guide_distribution(p, q, 1.5), guided)


def test_what_the_condition_excludes_stays_excluded():
    p, q = times(0.5, 0.5, 0.0), times(0.5, 0.5, 0.0)
    assert guide_distribution(p, q, 2.0).tolist() == [0.5, 0.5, 0.0]


def test_rates_on_the_mask_mixture_are_the_logits_times_their_normaliser():
    p, q, z, t = dirichlet(V), dirichlet(V, seed=1), torch.tensor([[V - 1]]), times(0.3)
    p[-1] = q[-1] = 0
    p, q = (p / p.sum())[None, None], (q / q.sum())[None, None]
    velocity, w = ForwardVelocity(PATH), 1.5
    u, v = velocity.marginal(z, t, p), velocity.marginal(z, t, q)
    normaliser = (p ** (1 + w) * q**-w)[..., :-1].sum()
    by_logits = velocity.marginal(z, t, guide_logits(p.log(), q.log(), w).softmax(-1))
    assert torch.allclose(guide_rates(u, v, z, w), normaliser * by_logits)
    assert normaliser > 1.01
    assert torch.allclose(guide_rates(u, v, z, w, renormalise=True), by_logits)


def run(sampler, **settings):
    x, frozen = torch.zeros(40, 2, dtype=torch.long), torch.zeros(40, 2, dtype=torch.bool)
    return sample(Posterior(COND, PATH.source, **settings), sampler, x, frozen, Draws.seeded(*range(40)))


def test_weight_0_needs_no_second_evaluation():
    def refuse(*_):
        raise AssertionError("evaluated")

    plain = run(ExactX1(PATH, time_grid(4)))
    guided = run(ExactX1(PATH, time_grid(4)), unconditional=refuse, guidance_weight=0.0)
    assert torch.equal(plain.tokens, guided.tokens) and plain.evaluations.tolist() == [4] * 40
    euler = GuidedEuler(PATH, time_grid(4), ForwardVelocity(PATH), weight=0.0)
    assert run(euler, unconditional=refuse).evaluations.tolist() == [4] * 40


@pytest.mark.parametrize("place", ["logits", "distribution", "rates", "rates-renormalised"])
def test_guidance_costs_two_evaluations_and_follows_the_condition(place):
    if place == "logits":
        out = run(ExactX1(PATH, time_grid(4)), unconditional=UNCOND, guidance_weight=3.0)
    else:
        euler = GuidedEuler(PATH, time_grid(4), ForwardVelocity(PATH), weight=3.0, place=place)
        with pytest.warns(UserWarning) if place == "rates" else torch.no_grad():  # rates grow beyond probabilities
            out = run(euler, unconditional=UNCOND)
    assert out.evaluations.tolist() == [8] * 40
    plain = run(ExactX1(PATH, time_grid(4)))
    ratio = (COND.data / UNCOND.data).nan_to_num(0).log()
    assert ratio[COND.index(out.tokens)].mean() > ratio[COND.index(plain.tokens)].mean() + 0.2


def test_guidance_of_the_last_step_alone_is_guidance_of_the_data_distribution():
    sampler = GuidedEuler(PATH, (0.0, 1.0), ForwardVelocity(PATH), weight=1.0, place="rates-renormalised")
    by_distribution = run(sampler, unconditional=UNCOND).tokens
    # A sampler that draws as GuidedEuler does: one number for each position, from p_1t at the end.
    by_logits = run(D3PM(PATH, (0.0, 1.0)), unconditional=UNCOND, guidance_weight=1.0).tokens
    assert torch.equal(by_distribution, by_logits)


def test_a_missing_unconditional_network_is_named():
    with pytest.raises(ValueError, match="unconditional must be a network if guidance_weight is above 0"):
        Posterior(COND, PATH.source, guidance_weight=1.0)
    with pytest.raises(ValueError, match="unconditional must be a network for a sampler with guidance"):
        run(GuidedEuler(PATH, time_grid(4), ForwardVelocity(PATH), weight=1.0))
