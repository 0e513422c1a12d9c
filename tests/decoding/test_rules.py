"""Reveal rules: pure functions of scores, checked against brute force and against transformers' own sampler."""

import itertools
import math

import pytest
import torch
from transformers.models.diffusion_gemma.generation_diffusion_gemma import (
    EntropyBoundSampler,
    EntropyBoundSamplerConfig,
)

from decoding.rules import ORDERS, ConfidenceFactor, ConfidenceThreshold, EntropyBound, RowScores, TopK

RULES = (
    EntropyBound(0.0),
    EntropyBound(0.7),
    EntropyBound(0.7, order="confidence"),
    EntropyBound(2.0, order="margin", max_reveal=2),
    EntropyBound(math.inf),
    ConfidenceThreshold(0.5),
    ConfidenceThreshold(1.0),
    ConfidenceThreshold(0.1, max_reveal=3),
    ConfidenceFactor(0.0),
    ConfidenceFactor(1.0),
    ConfidenceFactor(math.inf, max_reveal=2),
    TopK(1),
    TopK(3, order="entropy"),
    TopK(99, order="margin"),
)


def random_logits(seed: int, *shape: int, spread: float = 4.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    scale = spread * torch.rand(*shape[:-1], 1, generator=generator) ** 2
    return torch.randn(shape, generator=generator) * scale


def random_masked(seed: int, batch: int, rows: int) -> torch.Tensor:
    """Each sequence has at least one masked row."""
    generator = torch.Generator().manual_seed(seed)
    masked = torch.rand(batch, rows, generator=generator) < torch.rand(batch, 1, generator=generator)
    masked[torch.arange(batch), torch.randint(rows, (batch,), generator=generator)] = True
    return masked


def with_entropies(entropy: list[float]) -> RowScores:
    entropy = torch.tensor([entropy])
    return RowScores(entropy, 1 - entropy / 10, 1 - entropy / 10)


def test_scores_are_those_of_the_softmax():
    logits = random_logits(0, 3, 5, 11)
    scores = RowScores.of(logits)
    distribution = torch.distributions.Categorical(logits=logits)
    top = distribution.probs.sort(-1, descending=True).values
    torch.testing.assert_close(scores.entropy, distribution.entropy())
    torch.testing.assert_close(scores.confidence, top[..., 0])
    torch.testing.assert_close(scores.margin, top[..., 0] - top[..., 1])


def test_entropy_is_in_nats_and_float32_with_impossible_tokens():
    logits = torch.full((1, 1, 9), -torch.inf, dtype=torch.bfloat16)
    logits[..., :4] = 1.0
    scores = RowScores.of(logits)
    assert scores.entropy.dtype == torch.float32
    assert scores.entropy.item() == pytest.approx(math.log(4), rel=1e-6)
    logits[..., 1:] = -torch.inf
    assert RowScores.of(logits).entropy.item() == 0.0


@pytest.mark.parametrize("bound", [1e-9, 1e-3, 0.01, 0.1, 0.35, 0.6, 1.5, 5.0, 30.0, 1e9])
def test_entropy_bound_equals_transformers_sampler_when_all_is_masked(bound):
    logits = random_logits(1, 32, 16, 13)
    sampler = EntropyBoundSampler(EntropyBoundSamplerConfig(bound), 16, 13, 1)
    sampler.accept_canvas(torch.zeros(32, 16), torch.ones(32, 16), logits, 0)
    reveal = EntropyBound(bound)(RowScores.of(logits), torch.ones(32, 16, dtype=torch.bool))
    assert torch.equal(reveal, sampler.accepted_token_mask)
    assert bound < 1e9 or reveal.all()


def brute_force(cost: list[float], entropy: list[float], masked: list[bool], bound: float) -> set[int]:
    """The longest prefix, in order of cost, whose entropies sum to at most the bound without the largest of them."""
    order = sorted((i for i, m in enumerate(masked) if m), key=lambda i: (cost[i], i))
    fitting = [s for s in range(1, len(order) + 1) if _sum_without_max([entropy[i] for i in order[:s]]) <= bound]
    return set(order[: max(fitting, default=1)])


def _sum_without_max(values: list[float]) -> float:
    return sum(values) - max(values)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("bound", [0.0, 1e-3, 0.1, 0.4, 1.0, 3.0, math.inf])
def test_entropy_bound_equals_brute_force_on_masked_subsets(order, bound):
    logits, masked = random_logits(2, 40, 9, 7), random_masked(3, 40, 9)
    scores = RowScores.of(logits)
    double = RowScores(scores.entropy.double(), scores.confidence.double(), scores.margin.double())
    reveal = EntropyBound(bound, order=order)(double, masked)
    for b in range(40):
        cost = {"entropy": double.entropy, "confidence": -double.confidence, "margin": -double.margin}[order][b]
        expected = brute_force(cost.tolist(), double.entropy[b].tolist(), masked[b].tolist(), bound)
        assert set(reveal[b].nonzero().flatten().tolist()) == expected


def test_orders_differ():
    logits, masked = random_logits(2, 40, 9, 7), torch.ones(40, 9, dtype=torch.bool)
    reveals = [EntropyBound(0.5, order=order)(RowScores.of(logits), masked) for order in ORDERS]
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(reveals, 2))


def test_bound_is_without_the_largest_entropy_of_the_revealed():
    masked = torch.ones(1, 4, dtype=torch.bool)
    scores = with_entropies([0.3, 0.05, 5.0, 0.1])
    # sorted: .05 | .05+.1 | .05+.1+.3 | + 5; without the largest: 0, .05, .15, .45
    for bound, count in ((0.04, 1), (0.06, 2), (0.14, 2), (0.16, 3), (0.44, 3), (0.46, 4)):
        assert EntropyBound(bound)(scores, masked).sum() == count


def test_bound_zero_reveals_one_and_infinity_all():
    logits, masked = random_logits(4, 30, 8, 11), random_masked(5, 30, 8)
    scores = RowScores.of(logits)
    assert (scores.entropy > 0).all()
    assert EntropyBound(0.0)(scores, masked).sum(1).eq(1).all()
    assert torch.equal(EntropyBound(math.inf)(scores, masked), masked)


def test_exactly_certain_tokens_come_for_nothing_unless_capped():
    masked = torch.ones(1, 4, dtype=torch.bool)
    scores = with_entropies([0.0, 0.2, 0.0, 0.0])
    assert EntropyBound(0.0)(scores, masked).tolist() == [[True, True, True, True]]
    scores = with_entropies([0.0, 0.2, 0.3, 0.0])
    assert EntropyBound(0.0)(scores, masked).tolist() == [[True, True, False, True]]
    assert EntropyBound(0.0, max_reveal=1)(scores, masked).tolist() == [[True, False, False, False]]


def test_ties_keep_the_left_one():
    masked = torch.tensor([[False, True, True, True]])
    scores = with_entropies([0.5] * 4)
    for rule in (EntropyBound(0.0), TopK(1), TopK(1, order="margin"), ConfidenceThreshold(1.0), ConfidenceFactor(0.0)):
        assert rule(scores, masked).tolist() == [[False, True, False, False]]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("cap", [1, 2, 5, 100])
def test_max_reveal_keeps_the_best(order, cap):
    logits, masked = random_logits(6, 30, 8, 11), random_masked(7, 30, 8)
    scores = RowScores.of(logits)
    for rule in (EntropyBound(5.0, order, cap), ConfidenceThreshold(0.2, cap), ConfidenceFactor(6.0, cap)):
        capped, free = rule(scores, masked), type(rule)(*list(vars(rule).values())[:-1])(scores, masked)
        assert torch.equal(capped.sum(1), free.sum(1).clamp_max(cap))
        cost = scores.cost(order if isinstance(rule, EntropyBound) else "confidence")
        best_left_out = cost.masked_fill(~free | capped, math.inf).amin(1)
        assert (cost.masked_fill(~capped, -math.inf).amax(1) <= best_left_out).all()
        assert (free | ~capped).all()


@pytest.mark.parametrize("factor", [0.0, 0.2, 0.5, 1.0, 2.0, 9.0])
def test_confidence_factor_equals_a_literal_loop(factor):
    logits, masked = random_logits(8, 60, 8, 5, spread=9), random_masked(9, 60, 8)
    scores = RowScores.of(logits)
    double = RowScores(scores.entropy.double(), scores.confidence.double(), scores.margin.double())
    reveal = ConfidenceFactor(factor)(double, masked)
    for b in range(60):
        order = sorted(masked[b].nonzero().flatten().tolist(), key=lambda i: (-double.confidence[b, i].item(), i))
        count = 0
        for n in range(1, len(order) + 1):
            if (n + 1) * (1 - double.confidence[b, order[n - 1]].item()) < factor:
                count = n
        assert set(reveal[b].nonzero().flatten().tolist()) == set(order[: max(1, count)])


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.6, 0.9, 1.0])
def test_confidence_threshold_is_per_token_and_at_least_one(threshold):
    logits, masked = random_logits(10, 60, 8, 5, spread=9), random_masked(11, 60, 8)
    scores = RowScores.of(logits)
    reveal = ConfidenceThreshold(threshold)(scores, masked)
    above = (scores.confidence > threshold) & masked
    best = scores.confidence.masked_fill(~masked, -1).argmax(1)
    expected = torch.where(above.any(1, keepdim=True), above, torch.nn.functional.one_hot(best, 8).bool())
    assert torch.equal(reveal, expected)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("k", [1, 2, 4, 50])
def test_top_k_takes_k(order, k):
    logits, masked = random_logits(12, 40, 8, 11), random_masked(13, 40, 8)
    scores = RowScores.of(logits)
    reveal = TopK(k, order)(scores, masked)
    assert torch.equal(reveal.sum(1), masked.sum(1).clamp_max(k))
    cost = scores.cost(order)
    worst_taken = cost.masked_fill(~reveal, -math.inf).amax(1)
    best_left = cost.masked_fill(~masked | reveal, math.inf).amin(1)
    assert (worst_taken <= best_left).all()


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_only_masked_rows_and_at_least_one(rule):
    for seed in range(20):
        logits, masked = random_logits(seed, 16, 7, 6, spread=12), random_masked(seed, 16, 7)
        masked[3] = False
        reveal = rule(RowScores.of(logits), masked)
        assert not (reveal & ~masked).any()
        assert torch.equal(reveal.any(1), masked.any(1))


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_scores_of_decided_rows_do_not_matter(rule):
    logits, masked = random_logits(20, 16, 7, 6), random_masked(21, 16, 7)
    other = torch.where(masked[..., None], logits, random_logits(22, 16, 7, 6, spread=50))
    assert torch.equal(rule(RowScores.of(logits), masked), rule(RowScores.of(other), masked))


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_at_least_one_even_of_a_broken_model(rule):
    logits, masked = torch.full((2, 4, 6), math.nan), torch.tensor([[False, True, False, True], [True] * 4])
    reveal = rule(RowScores.of(logits), masked)
    assert reveal.any(1).all() and not (reveal & ~masked).any()


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_rows_in_first_are_revealed_and_count_before_the_others(rule):
    logits, masked = random_logits(23, 30, 7, 6), random_masked(24, 30, 7)
    first = torch.zeros_like(masked)
    first[:, 2] = masked[:, 2]
    scores = RowScores.of(logits)
    reveal = rule(scores, masked, first)
    assert (reveal | ~first).all() and not (reveal & ~masked).any()
    if rule in (TopK(1), ConfidenceFactor(0.0), ConfidenceThreshold(1.0), EntropyBound(0.0)):
        assert reveal.sum(1).eq(1).all()
    assert torch.equal(rule(scores, masked, torch.zeros_like(masked)), rule(scores, masked))


def test_dependence_is_below_sum_without_max():
    """KL(joint || product of marginals) = sum H_i - H <= sum H_i - max H_i."""
    generator = torch.Generator().manual_seed(0)
    for trial in range(200):
        sizes = [2, 3, 2, 3][: 2 + trial % 3]
        joint = torch.rand(sizes, generator=generator, dtype=torch.float64) ** (1 + trial % 9)
        joint /= joint.sum()
        marginals = [joint.sum([j for j in range(len(sizes)) if j != i]) for i in range(len(sizes))]
        entropies = [RowScores.of(marginal.log()).entropy.double() for marginal in marginals]
        product = marginals[0]
        for marginal in marginals[1:]:
            product = product[..., None] * marginal
        divergence = torch.where(joint > 0, joint * (joint / product).log(), 0).sum()
        total = sum(entropies)
        assert divergence.item() == pytest.approx((total - torch.special.entr(joint).sum()).item(), abs=1e-5)
        assert divergence <= total - max(entropies) + 1e-6
        scores = RowScores(torch.stack(entropies)[None], *[torch.zeros(1, len(sizes))] * 2)
        revealed = EntropyBound(0.3)(scores, torch.ones(1, len(sizes), dtype=torch.bool))[0]
        kept = [i for i in range(len(sizes)) if revealed[i]]
        part = joint.sum([j for j in range(len(sizes)) if j not in kept]) if len(kept) < len(sizes) else joint
        assert sum(entropies[i] for i in kept) - torch.special.entr(part).sum() <= 0.3 + 1e-5


def test_forwards_do_not_increase_with_the_bound():
    bounds = [0.0, 0.01, 0.1, 0.2, 0.4, 0.8, 1.5, 3.0, math.inf]
    fewer = 0
    for seed in range(20):
        scores = RowScores.of(random_logits(seed, 1, 16, 11))
        forwards = []
        for bound in bounds:
            masked, count = torch.ones(1, 16, dtype=torch.bool), 0
            while masked.any():
                masked = masked & ~EntropyBound(bound)(scores, masked)
                count += 1
            forwards.append(count)
        assert forwards == sorted(forwards, reverse=True)
        assert (forwards[0], forwards[-1]) == (16, 1)
        fewer += len(set(forwards)) > 3
    assert fewer > 10


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EntropyBound(-0.1), r"entropy_bound must be a number in \[0, inf\].*got -0.1"),
        (lambda: EntropyBound(math.nan), "entropy_bound.*got nan"),
        (lambda: EntropyBound("0.1"), "entropy_bound.*got '0.1'"),
        (lambda: EntropyBound(0.1, order="size"), "order must be one of 'entropy', 'confidence', 'margin', got 'size'"),
        (lambda: EntropyBound(0.1, max_reveal=0), "max_reveal must be a whole number of at least 1, got 0"),
        (lambda: ConfidenceThreshold(1.5), r"confidence_threshold must be a number in \[0, 1\], got 1.5"),
        (lambda: ConfidenceThreshold(0.5, max_reveal=1.5), "max_reveal.*got 1.5"),
        (lambda: ConfidenceFactor(-1), "confidence_factor.*got -1"),
        (lambda: TopK(0), "top_k must be a whole number of at least 1, got 0"),
        (lambda: TopK(True), "top_k.*got True"),
        (lambda: TopK(2, order="random"), "order.*got 'random'"),
    ],
)
def test_impossible_settings_name_field_and_value(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_rules_are_values():
    assert EntropyBound(0.1) == EntropyBound() and hash(EntropyBound(0.1)) == hash(EntropyBound())
    assert repr(TopK(2)) == "TopK(top_k=2, order='confidence')"
    with pytest.raises(AttributeError):
        EntropyBound(0.1).entropy_bound = 2.0


def test_beside_an_exact_row_every_guess_counts_against_the_bound():
    """Without one, the dearest token is free; with one, it is that row, however certain or uncertain it is."""
    masked = torch.ones(1, 4, dtype=torch.bool)
    first = torch.tensor([[True, False, False, False]])
    for of_first in (0.0, 5.0):
        scores = with_entropies([of_first, 0.3, 0.1, 0.6])
        revealed = [EntropyBound(bound)(scores, masked, first)[0].tolist() for bound in (0.0, 0.15, 0.45, 0.95, 1.05)]
        assert [sum(row) for row in revealed] == [1, 2, 3, 3, 4]
        assert revealed[2] == [True, True, True, False]
    free = [EntropyBound(bound)(with_entropies([0.0, 0.3, 0.1, 0.6]), masked)[0].sum().item() for bound in (0.0, 0.15)]
    assert free == [2, 3]


@pytest.mark.parametrize("entropies", [(1e-8, 1.0), (1e-30, 50.0), (1e-12, 1e-12, 3.0), (0.5, 1e-9, 1e-9)])
def test_a_bound_of_zero_reveals_one_however_small_the_others_are(entropies):
    """sum(H) - max(H) must not be lost to rounding beside a large H."""
    entropy = torch.tensor([entropies])
    scores = RowScores(entropy, 1 - entropy / 100, entropy)
    masked = torch.ones_like(entropy, dtype=torch.bool)
    for order in ("entropy", "confidence", "margin"):
        assert EntropyBound(0.0, order=order)(scores, masked).sum() == 1
    smallest = min(entropies)
    assert EntropyBound(smallest)(scores, masked).sum() == 2
