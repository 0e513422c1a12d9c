"""The random tests of speculative sampling: their exact algebra on small tables, and the code against that algebra."""

import itertools

import pytest
import torch
from scipy.stats import chisquare

from decoding.verification import verify_greedy, verify_sampled

V, LENGTH = 5, 3


@pytest.fixture
def tables():
    """p(x_i | x_<i) for every prefix, and draft distributions q_i that know nothing of each other."""
    generator = torch.Generator().manual_seed(0)

    def distribution():
        return torch.rand(V, generator=generator, dtype=torch.float64).pow(3).add(1e-3).div_(1)

    p = {prefix: distribution() for n in range(LENGTH + 1) for prefix in itertools.product(range(V), repeat=n)}
    p = {prefix: weights / weights.sum() for prefix, weights in p.items()}
    q = [distribution() for _ in range(LENGTH)]
    return p, [weights / weights.sum() for weights in q]


def chain_distribution(p):
    """The distribution of the first LENGTH tokens under p."""
    distribution = torch.zeros((V,) * LENGTH, dtype=torch.float64)
    for x in itertools.product(range(V), repeat=LENGTH):
        distribution[x] = torch.stack([p[x[:i]][x[i]] for i in range(LENGTH)]).prod()
    return distribution


def emitted_distribution(p, drafts_with_odds, q):
    """Exact distribution of the first LENGTH tokens when drafts are verified, and all that follow are drawn from p.

    ``drafts_with_odds``: pairs (draft, its probability). With ``q`` the ratio test, with None the point-mass test.
    """
    distribution = torch.zeros((V,) * LENGTH, dtype=torch.float64)

    def spread(prefix, weight):
        if len(prefix) >= LENGTH:
            distribution[prefix[:LENGTH]] += weight
            return
        for x in range(V):
            spread((*prefix, x), weight * p[prefix][x])

    for draft, odds in drafts_with_odds:
        weight = odds
        for j, d in enumerate(draft):
            here = p[draft[:j]]
            accept = here[d] if q is None else torch.clamp(here[d] / q[j][d], max=1)
            rest = here.clone()
            if q is None:
                rest[d] = 0
            else:
                rest = (here - q[j]).clamp_min(0)
            if accept < 1:
                for x in range(V):
                    spread((*draft[:j], x), weight * (1 - accept) * rest[x] / rest.sum())
            weight = weight * accept
        spread(tuple(draft), weight)
    return distribution


def independent(q):
    for draft in itertools.product(range(V), repeat=LENGTH):
        yield draft, torch.stack([q[j][d] for j, d in enumerate(draft)]).prod()


def cut_by_value(q):
    """Drafts end before the first drawn token that was unlikely: a cut that looks at values."""
    for draft, odds in independent(q):
        kept = next((j for j, d in enumerate(draft) if q[j][d] < 0.3), LENGTH)
        yield draft[:kept], odds


def total_variation(a, b):
    return float((a - b).abs().sum() / 2)


def test_ratio_test_on_independent_drafts_gives_the_distribution_exactly(tables):
    p, q = tables
    assert total_variation(emitted_distribution(p, independent(q), q), chain_distribution(p)) < 1e-12


def test_ratio_test_on_drafts_cut_by_their_values_does_not(tables):
    p, q = tables
    assert total_variation(emitted_distribution(p, cut_by_value(q), q), chain_distribution(p)) > 0.01


def test_point_mass_test_is_exact_for_drafts_from_anywhere(tables):
    p, q = tables
    assert total_variation(emitted_distribution(p, cut_by_value(q), None), chain_distribution(p)) < 1e-12
    assert total_variation(emitted_distribution(p, [((4, 0, 1), 1.0)], None), chain_distribution(p)) < 1e-12


def refined(joint, p):
    """Drafts of two tokens, the second drawn first and the first given it: any-order refinement of a joint distribution."""
    for d in itertools.product(range(V), repeat=2):
        yield d, joint[d]


def test_ratio_test_on_drafts_drawn_in_another_order_does_not(tables):
    p, q = tables
    generator = torch.Generator().manual_seed(1)
    joint = torch.rand(V, V, generator=generator, dtype=torch.float64).pow(3)
    joint /= joint.sum()
    # The second token was drawn from its own distribution, the first from its distribution given the second: those
    # are the q's it has.
    second, first_given_second = joint.sum(0), joint / joint.sum(0)
    distribution = torch.zeros((V,) * LENGTH, dtype=torch.float64)
    for d, odds in refined(joint, p):
        distribution += emitted_distribution(p, [(d, odds)], [first_given_second[:, d[1]], second])
    assert total_variation(distribution, chain_distribution(p)) > 0.01
    assert total_variation(emitted_distribution(p, refined(joint, p), None), chain_distribution(p)) < 1e-12


# Drafts that depend on each other: q_j holds given the drafts before it.


@pytest.fixture
def dependent(tables):
    """p, and q(d_j | d_<j) for every prefix, a distribution of its own each time."""
    p, _ = tables
    generator = torch.Generator().manual_seed(4)
    prefixes = [prefix for n in range(LENGTH) for prefix in itertools.product(range(V), repeat=n)]
    return p, {
        prefix: torch.randn(V, generator=generator, dtype=torch.float64).mul(2).softmax(0) for prefix in prefixes
    }


def emitted_by_dependent(p, q, length_of):
    """Exact distribution where the first ``length_of(draft, realised)`` tokens of a draft meet the ratio test."""
    emitted = torch.zeros((V,) * LENGTH, dtype=torch.float64)
    for draft in itertools.product(range(V), repeat=LENGTH):
        odds = torch.stack([q[draft[:j]][d] for j, d in enumerate(draft)]).prod()
        realised = [q[draft[:j]] for j in range(LENGTH)]
        emitted += emitted_distribution(p, [(draft[: length_of(draft, realised)], odds)], realised)
    return emitted


def stopping_rule(draft, realised):
    """Stop before the first draft whose distribution, given the ones before it, is not sure enough."""
    return next((j for j, q in enumerate(realised) if q.max() < 0.5), LENGTH)


def later_distribution(draft, realised):
    """Nothing where the second draft's distribution is not sure enough, which the first draft decides."""
    return 0 if realised[1].max() < 0.7 else LENGTH


def test_ratio_test_on_dependent_drafts_is_exact_under_a_stopping_rule(dependent):
    p, q = dependent
    assert total_variation(emitted_by_dependent(p, q, lambda *_: LENGTH), chain_distribution(p)) < 1e-12
    lengths = {stopping_rule(d, [q[d[:j]] for j in range(3)]) for d in itertools.product(range(V), repeat=3)}
    assert len(lengths) > 2
    assert total_variation(emitted_by_dependent(p, q, stopping_rule), chain_distribution(p)) < 1e-12


def test_ratio_test_on_dependent_drafts_counted_by_a_later_distribution_is_not(dependent):
    p, q = dependent
    assert total_variation(emitted_by_dependent(p, q, later_distribution), chain_distribution(p)) > 0.01


def many(count: int, p, draft: list[int], q):
    """The same drafts for ``count`` sequences, as ``verify_sampled`` takes them."""
    drafts, lengths = torch.tensor([draft]).expand(count, -1), torch.full((count,), len(draft))
    return p.expand(count, -1, -1), drafts, lengths, None if q is None else q.expand(count, -1, -1)


@pytest.mark.parametrize("with_distributions", [True, False])
def test_verify_sampled_follows_the_algebra(tables, with_distributions):
    p, q = tables
    draft = [0, 3, 2]
    scores = torch.stack([p[tuple(draft[:j])] for j in range(LENGTH + 1)]).log()
    distributions = torch.stack(q).log() if with_distributions else None
    expected = torch.zeros(LENGTH + 1, V, dtype=torch.float64)
    reached = torch.ones((), dtype=torch.float64)
    for j, d in enumerate(draft):
        here = p[tuple(draft[:j])]
        accept = torch.clamp(here[d] / q[j][d], max=1) if with_distributions else here[d]
        rest = (here - q[j]).clamp_min(0) if with_distributions else here.clone().index_fill(0, torch.tensor(d), 0)
        if accept < 1:
            expected[j] = reached * (1 - accept) * rest / rest.sum()
        reached = reached * accept
    expected[LENGTH] = reached * p[tuple(draft)]

    runs, seen = 20_000, torch.zeros(LENGTH + 1, V)
    uniform = torch.rand(runs, LENGTH + 1, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    accepted, token = verify_sampled(
        *many(runs, scores.exp(), draft, distributions if distributions is None else distributions.exp()), uniform
    )
    seen.index_put_((accepted, token), torch.ones(runs), accumulate=True)
    possible = expected > 0
    assert seen[~possible].sum() == 0
    assert chisquare(seen[possible], runs * expected[possible] / expected.sum()).pvalue > 1e-4


@pytest.mark.parametrize(
    ("likeliest", "drafts", "expected"),
    [([5, 6, 7], [5, 6], (2, 7)), ([5, 6, 7], [5, 9], (1, 6)), ([5, 6, 7], [4, 6], (0, 5)), ([5], [], (0, 5))],
)
def test_verify_greedy(likeliest, drafts, expected):
    drafts = torch.tensor([drafts], dtype=torch.long)
    accepted, token = verify_greedy(torch.tensor([likeliest]), drafts, torch.tensor([drafts.shape[1]]))
    assert (int(accepted), int(token)) == expected


def test_a_certain_draft_is_never_rejected():
    p = torch.zeros(2, V)
    p[:, 1] = 1.0
    for q in (p[:1], None):
        accepted, token = verify_sampled(*many(100, p, [1], q), torch.rand(100, 2, dtype=torch.float64))
        assert (accepted == 1).all() and (token == 1).all()


def ragged(lengths: list[int], most: int):
    """Random p, q, drafts and numbers for sequences of these many drafts, and garbage behind them."""
    generator = torch.Generator().manual_seed(3)
    shape = len(lengths), most

    def distributions(rows: int):
        return (2 * torch.randn(shape[0], rows, V, generator=generator, dtype=torch.float64)).softmax(-1)

    drafts = torch.randint(V, shape, generator=generator)
    uniform = torch.rand(shape[0], most + 1, generator=generator, dtype=torch.float64)
    return distributions(most + 1), drafts, torch.tensor(lengths), distributions(most), uniform


@pytest.mark.parametrize("kind", ["ratio", "point mass", "greedy"])
def test_ragged_drafts_are_verified_as_one_by_one(kind):
    p, drafts, lengths, q, uniform = ragged([0, 3, 1, 2, 3, 0, 2], 3)
    for b, count in enumerate(lengths.tolist()):  # what lies behind a sequence's own must not matter
        p[b, count + 1 :], q[b, count:] = torch.nan, 0
        drafts[b, : b // 2] = p[b, : b // 2].argmax(-1)[: len(drafts[b, : b // 2])]
    together, alone = [], []
    for rows in [slice(None), *(slice(b, b + 1) for b in range(len(lengths)))]:
        own = 3 if rows == slice(None) else int(lengths[rows])
        if kind == "greedy":
            likeliest = p[rows, : own + 1].nan_to_num().argmax(-1)
            got = verify_greedy(likeliest, drafts[rows, :own], lengths[rows])
        else:
            numbers = torch.cat([uniform[rows, :own], uniform[rows, -1:]], dim=1)
            given = q[rows, :own] if kind == "ratio" else None
            got = verify_sampled(p[rows, : own + 1], drafts[rows, :own], lengths[rows], given, numbers)
        (together if rows == slice(None) else alone).append(torch.stack(got))
    assert torch.equal(together[0], torch.cat(alone, dim=1))
    assert (together[0][0] <= lengths).all() and together[0][0].unique().numel() > 1


def test_a_draft_from_anywhere_is_one_whose_distribution_is_all_at_it():
    p, drafts, lengths, _, uniform = ragged([3, 2, 0, 3], 3)
    certain = torch.zeros(4, 3, V, dtype=torch.float64).scatter_(2, drafts[..., None], 1)
    for with_q, without in zip(
        verify_sampled(p, drafts, lengths, certain, uniform),
        verify_sampled(p, drafts, lengths, None, uniform),
        strict=True,
    ):
        assert torch.equal(with_q, without)
