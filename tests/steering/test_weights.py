"""Resampling and effective sample sizes, by their algebra."""

import pytest
import torch

from steering.population import Target
from steering.weights import effective_sample_size, log_mean, systematic

WEIGHTS = torch.tensor([0.05, 0.0, 0.4, 0.3, 0.25, 0.0], dtype=torch.float64)


def test_every_particle_is_expected_in_proportion_to_its_weight():
    """Over an even grid of the one random number the mean is the integral, exactly where the grid hits no edge."""
    grid = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
    counts = torch.zeros(6, dtype=torch.float64)
    for uniform in grid.tolist():
        counts += torch.bincount(torch.tensor(systematic(WEIGHTS.log(), uniform)), minlength=6)
    assert (counts / 2000 - 6 * WEIGHTS).abs().max() < 1e-3


@pytest.mark.parametrize("uniform", [0.0, 0.37, 1 - 1e-16])
def test_counts_differ_from_that_by_less_than_one_and_nobody_moves(uniform):
    ancestors = systematic(WEIGHTS.log() + 700, uniform)  # only ratios matter
    counts = torch.bincount(torch.tensor(ancestors), minlength=6)
    assert ((counts - 6 * WEIGHTS).abs() < 1).all() and counts[1] == counts[5] == 0
    assert all(ancestors[ancestor] == ancestor for ancestor in ancestors)


def test_effective_sample_size_and_mean():
    assert effective_sample_size(torch.full((7,), -900.0, dtype=torch.float64)) == 7
    assert effective_sample_size(torch.tensor([0.0, -torch.inf, -torch.inf]).double()) == 1
    assert effective_sample_size(torch.full((3,), -torch.inf).double()) == 0
    weights = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    assert effective_sample_size(weights.log()) == pytest.approx(36 / 14)
    assert log_mean(weights.log()) == pytest.approx(torch.tensor(2.0).log().item())


def test_the_ramp_reaches_the_whole_and_finished_texts_always_have_it():
    target = Target(alpha=3.0, scale=2.0, ramp=8)
    at = {tokens: target.potential([1.0, -torch.inf], [-2.0, -2.0], [-5.0, -5.0], tokens) for tokens in (2, 8, 20, 0)}
    assert at[2].tolist() == [0.25 * 2 + 1.5 * -2 + 5, -torch.inf]
    assert at[8].tolist() == at[20].tolist() == at[0].tolist() == [2 + 3 * -2 + 5, -torch.inf]
