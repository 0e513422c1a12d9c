"""Sources and paths: what is drawn has the distribution that is stated, and the ends are source and data."""

import pytest
import torch

from dfm.draws import Draws
from dfm.paths.beta_schedules import PowerBeta
from dfm.paths.given import draw_outside_span, draw_prefix, draw_share, keep_given
from dfm.paths.metric import EmbeddingDistance, MetricPath
from dfm.paths.mixture import ConvexSumPath, MixturePath
from dfm.paths.schedulers import CubicScheduler, KineticOptimalScheduler, PowerScheduler
from dfm.paths.sources import CouplingSource, MaskSource, UniformSource, UnigramSource
from tests.dfm.toys import dirichlet, times

V = 5
LIKE = torch.zeros((), dtype=torch.float64)
UNIGRAM = UnigramSource(dirichlet(V, seed=3))
DISTANCE = EmbeddingDistance(torch.randn(V, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
PATHS = {
    "mask": MixturePath(MaskSource(V, 4), PowerScheduler(2.0)),
    "uniform": MixturePath(UniformSource(V, excluded=(3,)), CubicScheduler()),
    "unigram-kinetic": MixturePath(UNIGRAM, KineticOptimalScheduler(UNIGRAM.distribution)),
    "convex-mask": ConvexSumPath.with_uniform_noise(MaskSource(V, 4), excluded=(4,)),
    "convex-unigram": ConvexSumPath.with_uniform_noise(UNIGRAM),
    "metric": MetricPath(UniformSource(V), PowerBeta(3.0, 0.9), DISTANCE),
    "metric-unigram": MetricPath(UNIGRAM, PowerBeta(1.0, 2.0), DISTANCE),
}
X1 = torch.tensor([[0, 1, 2]])


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_marginal_goes_from_source_to_data_with_its_slope(path):
    start, end = (path.marginal(X1, times(t)) for t in (0.0, 1.0))
    assert torch.allclose(start, path.source.probabilities(LIKE).expand_as(start))
    assert torch.allclose(end, torch.eye(V, dtype=torch.float64)[X1])
    t = times(0.37).requires_grad_()
    distribution = path.marginal(X1, t)
    assert torch.allclose(distribution.sum(-1), torch.ones((), dtype=torch.float64))
    slope = torch.stack([torch.autograd.grad(p, t, retain_graph=True)[0][0] for p in distribution.flatten()])
    assert torch.allclose(path.dmarginal(X1, t).flatten(), slope)


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_samples_follow_the_marginal(path):
    count = 4000
    generator = torch.Generator().manual_seed(0)
    draws, x1 = Draws([generator] * count), X1.expand(count, -1)
    noised = path.sample(path.source.sample(x1, draws), x1, times(0.4).expand(count), draws)
    share = torch.stack([(noised.tokens == v).double().mean(0) for v in range(V)], dim=-1)
    distribution = path.marginal(X1, times(0.4))[0]
    error = (share - distribution).abs() / (distribution * (1 - distribution) / count).sqrt().clamp_min(1e-9)
    assert error.max() < 4
    assert (noised.tokens == x1)[~noised.hidden].all()


@pytest.mark.parametrize("t", [-0.1, 1.1, float("nan")])
def test_time_out_of_range_is_refused(t):
    with pytest.raises(ValueError, match=r"t must be in \[0, 1\]"):
        PATHS["mask"].marginal(X1, times(t))


def test_each_position_may_have_its_own_time():
    path, x1 = PATHS["uniform"], torch.tensor([[0, 0], [1, 1]])
    both = path.marginal(x1, torch.tensor([[0.2, 0.9], [0.5, 0.5]], dtype=torch.float64))
    assert torch.equal(both[0, 1], path.marginal(x1[:1], times(0.9))[0, 1])
    assert torch.equal(both[1, 0], path.marginal(x1[1:], times(0.5))[0, 0])


def test_mask_source_hides_exactly_the_masked():
    path, x1 = PATHS["mask"], torch.tensor([[0, 4, 1, 4] * 50])  # the data holds the mask token as text
    noised = path.sample(path.source.sample(x1, Draws.seeded(0)), x1, times(0.6), Draws.seeded(1))
    assert (noised.tokens[noised.hidden] == 4).all()
    assert torch.equal(noised.tokens[~noised.hidden], x1[~noised.hidden])
    assert (x1[~noised.hidden] == 4).any()


def test_weights_of_a_convex_sum_are_checked():
    with pytest.raises(ValueError, match="weights must be 3 numbers"):
        ConvexSumPath(
            MaskSource(V, 4), lambda t: torch.stack([t, t, 1 - 2 * t], -1), lambda t: t, torch.full((1, V), 0.2)
        )


def test_embedding_distance_is_zero_at_the_token_and_small_in_memory():
    vocab_size = 100_000  # all pairs would take 40 GB
    distance = EmbeddingDistance(torch.randn(vocab_size, 2, generator=torch.Generator().manual_seed(0)))
    x1 = torch.tensor([[7, 50_000]])
    d = distance(x1)
    assert d.shape == (1, 2, vocab_size)
    assert (d.gather(-1, x1[..., None]) == 0).all() and (d >= 0).all()
    rows = torch.nn.functional.normalize(distance.embedding, dim=-1)
    assert torch.allclose(d[0, 0, 3], (rows[7] - rows[3]).norm() ** 4, atol=1e-5)


def test_source_settings_are_checked():
    with pytest.raises(ValueError, match="mask_id must be a whole number from 0 to 4, got 5"):
        MaskSource(V, 5)
    with pytest.raises(ValueError, match="excluded must leave at least one"):
        UniformSource(2, excluded=(0, 1))
    with pytest.raises(ValueError, match="distribution must be"):
        UnigramSource(torch.tensor([0.5, -0.5]))


def test_a_coupling_gives_pairs_but_no_distribution():
    source = CouplingSource(V, lambda x1, draws: (x1 + 1) % V)
    path = MixturePath(source, PowerScheduler())
    x0 = source.sample(X1, Draws.seeded(0))
    noised = path.sample(x0, X1, times(0.5), Draws.seeded(1))
    assert torch.equal(noised.tokens, torch.where(noised.hidden, (X1 + 1) % V, X1))
    with pytest.raises(ValueError, match="source must have independent tokens"):
        path.marginal(X1, times(0.5))


def test_given_tokens_come_from_the_data():
    given = torch.tensor([[True, False, True]])
    assert keep_given(torch.tensor([[4, 4, 4]]), X1, given).tolist() == [[0, 4, 2]]


@pytest.mark.parametrize("draw", [draw_prefix, draw_share, draw_outside_span])
def test_what_is_given_lies_in_the_text_and_leaves_something_to_predict(draw):
    tokens = torch.ones(300, 6, dtype=torch.bool)
    tokens[:, 0] = False  # padding on the left
    given = draw(tokens, Draws([torch.Generator().manual_seed(0)] * 300))
    assert not (given & ~tokens).any()
    hidden = tokens & ~given
    if draw is not draw_share:
        assert hidden.any(-1).all()
        starts = (hidden[:, 1:] & ~hidden[:, :-1]).sum(-1)
        assert (starts == 1).all()  # one span is hidden
    if draw is draw_outside_span:
        assert given[:, 1].any() and given[:, -1].any()
    if draw is draw_prefix:
        assert hidden[:, -1].all()
        assert given.sum(-1).bincount(minlength=5).min() > 300 / 5 * 0.6
    assert 0.2 < given[tokens].double().mean() < 0.8
