"""The acceptance toy of the method: exact recursions, what they leave invariant, and the real sampler on tables."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from rpt import ResampleDecoder
from rpt.resampler import Resampler
from tests.conftest import chi_square_z
from tests.rpt.toys import acceptance_toys, conditionals, noisy, recursion, sample_table, total_variation

# Mean TV between the sampled joint and the data by PTP noise and iterations; the last two are the limits.
EXPECTED = {
    0.50: (0.255, 0.204, 0.193, 0.195, 0.194, 0.195, 0.196),
    0.25: (0.255, 0.135, 0.184, 0.120, 0.182, 0.183, 0.120),
    0.10: (0.255, 0.107, 0.181, 0.087, 0.179, 0.179, 0.087),
    0.00: (0.255, 0.101, 0.181, 0.079, 0.179, 0.179, 0.079),
}
ITERATIONS = (0, 0.5, 1, 1.5, 2, 60, 60.5)


@pytest.mark.parametrize("noise", EXPECTED)
def test_recursion_gives_the_known_table(noise):
    toys = list(acceptance_toys(noise))
    for k, expected in zip(ITERATIONS, EXPECTED[noise], strict=True):
        mean = np.mean([total_variation(recursion(m, n, p, k), joint) for joint, m, n, p in toys])
        assert abs(mean - expected) < 0.001, k


def drawn(decoder, tables, count: int, batch: int = 4000) -> torch.Tensor:
    samples = []
    for start in range(0, count, batch):
        sequences = sample_table(decoder, tables, min(batch, count - start), 2, seed=start)
        samples += [sequence.new_tokens for sequence in sequences]
    return torch.tensor(samples)


@pytest.mark.parametrize(
    ("k", "redraw", "schedule"),
    [(0, "always", "two_slot"), (0.5, "always", "plain"), (0.5, "always", "two_slot"), (1, "always", "two_slot")]
    + [(1, "if_changed", "two_slot"), (1.5, "always", "two_slot"), (1.5, "if_changed", "plain")],
)
def test_sampler_follows_the_recursion(k, redraw, schedule):
    """Chi-square on a small toy, which sees a distribution that is off by far less than the TV that the large test allows."""
    rng = np.random.default_rng(5)
    m, n, p = conditionals(rng.dirichlet(0.5 * np.ones(25)).reshape(5, 5))
    tables = noisy(rng, m, 1.0), noisy(rng, n, 1.0), noisy(rng, p, 1.0)
    samples = drawn(ResampleDecoder(iterations=k, redraw=redraw, schedule=schedule), tables, 1500)
    assert abs(chi_square_z(samples, torch.tensor(recursion(*tables, k, redraw)))) < 4
    if k:  # the control: one half step fewer is another distribution, and the test sees it
        assert chi_square_z(samples, torch.tensor(recursion(*tables, k - 0.5, redraw))) > 5


@pytest.mark.slow
@pytest.mark.parametrize("k", [0, 0.5, 1, 1.5])
def test_sampler_on_the_acceptance_toy(k):
    joint, m, n, p = next(iter(acceptance_toys(0.25)))
    samples = drawn(ResampleDecoder(iterations=k), (m, n, p), 200_000)
    counts = torch.bincount(samples[:, 0] * 20 + samples[:, 1], minlength=400).view(20, 20).numpy()
    assert total_variation(counts / counts.sum(), recursion(m, n, p, k)) < 0.03


def test_exact_tables_leave_the_joint_invariant_only_with_redraw_always():
    for joint, *_ in acceptance_toys(0.0, count=5):
        m, n, p = conditionals(joint)
        for k in (0.5, 1, 1.5, 3):
            assert total_variation(recursion(m, n, p, k), joint) < 1e-12
        assert total_variation(recursion(m, n, p, 1, "if_changed"), joint) > 0.01


def test_if_changed_moves_the_joint_by_the_known_amount():
    joint = np.random.default_rng(1).dirichlet(0.3 * np.ones(400)).reshape(20, 20)
    assert abs(total_variation(recursion(*conditionals(joint), 1, "if_changed"), joint) - 0.047) < 0.001


def test_first_order_error_formula():
    """pihat - pi = pi (dN P + N dP) (I - K + 1 pi)^-1 + O(error^2): halving the noise quarters what is left."""
    rng = np.random.default_rng(1)
    joint = rng.dirichlet(0.3 * np.ones(400)).reshape(20, 20)
    pi, n, p = conditionals(joint)
    noise_n, noise_p = rng.standard_normal((20, 20)), rng.standard_normal((20, 20))
    known = {0.2: (7.5e-3, 6.1e-2), 0.1: (1.9e-3, 3.2e-2), 0.05: (4.9e-4, 1.6e-2), 0.025: (1.2e-4, 8.1e-3)}
    left = []
    for sd, (remainder, whole) in known.items():
        n_hat, p_hat = (
            t * np.exp(sd * e) / (t * np.exp(sd * e)).sum(-1, keepdims=True) for t, e in ((n, noise_n), (p, noise_p))
        )
        k_hat = n_hat @ p_hat
        values, vectors = np.linalg.eig(k_hat.T)
        pi_hat = np.real(vectors[:, np.argmax(np.real(values))])
        pi_hat /= pi_hat.sum()
        first = pi @ ((n_hat - n) @ p + n @ (p_hat - p)) @ np.linalg.inv(np.eye(20) - n @ p + np.ones((20, 1)) * pi)
        assert np.abs(pi_hat - pi).sum() == pytest.approx(whole, rel=0.05)
        left.append(np.abs(pi_hat - pi - first).sum())
        assert left[-1] == pytest.approx(remainder, rel=0.05)
    assert all(3.5 < a / b < 4.5 for a, b in zip(left, left[1:], strict=False))


@pytest.mark.parametrize("schedule", ["two_slot", "plain"])
@pytest.mark.parametrize("k", [0, 0.5, 1, 1.5])
@pytest.mark.parametrize("accept", ["gibbs", "argmax_threshold"])
def test_forwards_are_counted_by_changes(monkeypatch, k, schedule, accept):
    """Of N tokens: k = 0 costs N forwards; k = 0.5 in two slots one more at the start, and one for each change that is
    followed by another token; k = 1 one more for each newest token that is drawn anew and differs."""
    redrawn, put = {}, Resampler._put

    def counting_put(self, place, token, raw):
        newest = len(self.sequence.tokens) + 1
        if newest == place < len(self.text) and self.text[place] != token and len(self.text) < self.sequence.limit:
            redrawn[self.sequence.index] = redrawn.get(self.sequence.index, 0) + 1
        put(self, place, token, raw)

    joint, *tables = next(iter(acceptance_toys(0.25)))
    decoder = ResampleDecoder(iterations=k, schedule=schedule, accept=accept, threshold=0.35)
    count = 60
    plain = sample_table(replace(decoder, schedule="plain"), tables, 4, count)
    monkeypatch.setattr(Resampler, "_put", counting_put)
    for sequence, twin in zip(sample_table(decoder, tables, 4, count), plain, strict=True):
        assert sequence.new_tokens == twin.new_tokens  # schedules differ in forwards, not in text
        windows, changes = count - 1, sum(sequence.revisions)
        last = sequence.revisions[count - 2]
        if k:
            assert changes > 3
        if k == 0:
            assert sequence.forwards == count
        elif schedule == "two_slot":
            # In the last window nothing is drawn from the distribution that a change at its end asks for.
            expected = {0.5: changes - last, 1: changes + redrawn.get(sequence.index, 0)}
            assert (
                sequence.forwards == 2 + windows + expected[k] if k in expected else sequence.forwards < twin.forwards
            )
        elif k == 0.5:
            assert sequence.forwards == 1 + 2 * windows


def test_threshold_above_one_keeps_every_token():
    _, *tables = next(iter(acceptance_toys(0.25)))
    decoder = ResampleDecoder(iterations=0.5, accept="argmax_threshold", threshold=1.01)
    plain = sample_table(ResampleDecoder(iterations=0), tables, 8, 50)
    for sequence, reference in zip(sample_table(decoder, tables, 8, 50), plain, strict=True):
        assert sequence.new_tokens == reference.new_tokens and not any(sequence.revisions)
    never = ResampleDecoder(iterations=1.5, accept="argmax_threshold", threshold=1.01)
    greedy = [sample_table(d, tables, 1, 50, greedy=True)[0].new_tokens for d in (never, ResampleDecoder(iterations=0))]
    assert greedy[0] == greedy[1]


def test_greedy_resampling_ends_and_is_deterministic():
    _, *tables = next(iter(acceptance_toys(0.5)))
    runs = [sample_table(ResampleDecoder(iterations=64), tables, 1, 60, seed=s, greedy=True)[0] for s in (0, 9)]
    assert runs[0].new_tokens == runs[1].new_tokens
    assert runs[0].forwards < 60 * 12  # a state that repeats ends its window
