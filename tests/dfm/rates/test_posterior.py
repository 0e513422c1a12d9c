"""Posteriors: adapters on logits, and the distributions derived from p_1t, against enumeration by Bayes."""

import itertools

import pytest
import torch

from dfm.paths.mixture import MixturePath
from dfm.paths.schedulers import PowerScheduler
from dfm.paths.sources import MaskSource, UniformSource, UnigramSource
from dfm.rates.posterior import leave_one_out, noise_posterior, posterior_distribution, sharpen
from tests.dfm.toys import Toy, dirichlet, times

V = 3
SOURCES = {"mask": MaskSource(V + 1, V), "uniform": UniformSource(V), "unigram": UnigramSource(dirichlet(V, seed=3))}
K = 0.4


def toy_of(source) -> Toy:
    return Toy(MixturePath(source, PowerScheduler()), length=2, tokens=V, concentration=0.4)


def test_mask_token_is_never_predicted_and_revealed_tokens_stay():
    logits = torch.randn(1, 3, 5, generator=torch.Generator().manual_seed(0))
    logits[..., 2] = 50.0  # the network insists on the mask token
    x, masked = torch.tensor([[2, 2, 4]]), torch.tensor([[True, False, False]])  # the second 2 is text, not a mask
    distribution = posterior_distribution(logits, x, masked, mask_id=2)
    assert distribution[0, 0, 2] == 0 and torch.allclose(distribution.sum(-1), torch.ones(1, 3))
    assert distribution[0, 1:].tolist() == torch.eye(5)[[2, 4]].tolist()
    raw = posterior_distribution(logits, x, masked, mask_id=2, carry_over=False)
    assert raw[0, 2, 4] < 1 and (raw[..., 2] == 0).all()


def test_without_mask_source_nothing_is_carried_over():
    logits = torch.randn(1, 2, 4, generator=torch.Generator().manual_seed(0))
    distribution = posterior_distribution(
        logits, torch.tensor([[1, 2]]), torch.zeros(1, 2, dtype=torch.bool), mask_id=None
    )
    assert torch.equal(distribution, logits.softmax(-1))


def test_half_precision_is_decided_in_float32():
    logits = torch.zeros(1, 1, 4, dtype=torch.bfloat16)
    assert (
        posterior_distribution(logits, torch.zeros(1, 1).long(), torch.ones(1, 1).bool(), None).dtype == torch.float32
    )


def test_sharpening():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    assert sharpen(logits, 0, 1.0).tolist() == [1, 0, 0, 0]
    assert torch.allclose(sharpen(logits, 0.5, 1.0), logits.exp() ** 2 / (logits.exp() ** 2).sum())
    assert torch.allclose(sharpen(logits, 1.0, 0.75), torch.tensor([0.625, 0.375, 0, 0]))
    assert torch.allclose(sharpen(logits, 1.0, 0.1), torch.tensor([1.0, 0, 0, 0]))


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
def test_noise_posterior_equals_enumeration(source):
    toy, p = toy_of(source), source.probabilities(times(0.0))
    distribution = noise_posterior(
        toy.posterior(toy.states, times(K).repeat(len(toy.states))), toy.states, times(K)[:, None], p
    )
    joint = torch.zeros(len(toy.states), 2, toy.vocab_size, dtype=torch.float64)  # [z, position, x0]
    for x1, weight in zip(toy.states.tolist(), toy.data.tolist(), strict=True):
        for x0 in toy.states.tolist():
            for shown in itertools.product((0, 1), repeat=2):
                z = [x1[i] if shown[i] else x0[i] for i in range(2)]
                probability = weight * p[x0[0]] * p[x0[1]] * K ** sum(shown) * (1 - K) ** (2 - sum(shown))
                for i in range(2):
                    joint[toy.index(torch.tensor([z]))[0], i, x0[i]] += probability
    seen = joint.sum(-1)[:, 0] > 0
    assert torch.allclose(distribution[seen], (joint / joint.sum(-1, keepdim=True))[seen], atol=1e-12)


@pytest.mark.parametrize("name", ["uniform", "unigram"])
def test_leave_one_out_of_one_position_is_the_data_distribution(name):
    source = SOURCES[name]
    toy = Toy(MixturePath(source, PowerScheduler()), length=1, tokens=V)
    p1 = toy.posterior(toy.states, times(K).repeat(V))
    distribution = leave_one_out(p1.log(), toy.states, times(K)[:, None], source.probabilities(p1)).softmax(-1)
    assert torch.allclose(distribution[:, 0], toy.data.expand(V, -1), atol=1e-12)


@pytest.mark.parametrize("name", ["uniform", "unigram"])
def test_leave_one_out_of_two_positions_is_the_distribution_given_the_other(name):
    source = SOURCES[name]
    toy = toy_of(source)
    p1 = toy.posterior(toy.states, times(K).repeat(len(toy.states)))
    distribution = leave_one_out(p1.log(), toy.states, times(K)[:, None], source.probabilities(p1)).softmax(-1)
    pairs, p = toy.data.reshape(V, V), source.probabilities(p1)
    seen = (1 - K) * p[None] + K * torch.eye(V, dtype=torch.float64)  # [x1, z]
    for row, (z0, z1) in enumerate(toy.states.tolist()):
        for i, expected in enumerate((pairs @ seen[:, z1], pairs.T @ seen[:, z0])):
            assert torch.allclose(distribution[row, i], expected / expected.sum(), atol=1e-12)


def test_uniform_leave_one_out_subtracts_log_1_plus_v_odds():
    logits, z = torch.zeros(1, 1, V, dtype=torch.float64), torch.tensor([[1]])
    changed = leave_one_out(logits, z, times(K)[:, None], SOURCES["uniform"].probabilities(logits))
    assert torch.allclose(changed[0, 0], -torch.tensor([0, (1 + V * K / (1 - K)), 0]).double().clamp_min(1).log())
