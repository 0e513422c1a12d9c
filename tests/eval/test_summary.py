import itertools
import random

import pytest

from eval.summary import Figure, accepted_at_least, pareto_front, summarise


def line(decoder="ntp", seed=0, task="additions", score=0.5, temperature=0.0, acceptance=None, **costs) -> dict:
    decoding = {"tokens": 100, "forwards": 50, "tokens_per_forward": 2.0, "seconds": 4.0, "tokens_per_second": 25.0}
    decoding |= {"samples": 10, "cut_prompts": 0, **costs}
    if acceptance is not None:
        decoding["acceptance_lengths"] = acceptance
    return {
        "model": "m",
        "pretrained": "build/m",
        "settings": {},
        "decoder": decoder,
        "temperature": temperature,
        "seed": seed,
        "task": task,
        "scores": {"exact_match,none": score, "exact_match_stderr,none": 0.1},
        "decoding": decoding,
    }


def test_seeds_of_one_place_become_one_point():
    rows = [
        line(seed=i, temperature=0.7, score=s, tokens_per_forward=t) for i, (s, t) in enumerate([(0.4, 2), (0.6, 3)])
    ]
    (point,) = summarise(rows)
    assert (point.metric, point.seeds, point.samples, point.tokens) == ("exact_match,none", 2, 20, 200)
    # The standard deviation of 0.4 and 0.6 is 0.1 * sqrt(2), the mean's error that by sqrt(2), and twice that is shown.
    assert point.score == Figure(pytest.approx(0.5), pytest.approx(0.2))
    assert point.tokens_per_forward == Figure(2.5, pytest.approx(1.0))


def test_one_seed_has_the_tasks_own_error():
    (point,) = summarise([line()])
    assert point.score == Figure(0.5, 0.2) and point.tokens_per_forward.error == 0


def test_places_are_told_apart_and_keep_their_order():
    rows = [line(), line("sbd"), line(task="other"), line(temperature=1.0), line("sbd", seed=1)]
    places = [(point.decoder, point.task, point.temperature) for point in summarise(rows)]
    assert places == [("ntp", "additions", 0), ("sbd", "additions", 0), ("ntp", "other", 0), ("ntp", "additions", 1)]


def test_acceptance_is_added_over_seeds():
    (point,) = summarise([line(acceptance=[1, 2]), line(seed=1, acceptance=[1, 0, 4])])
    assert point.acceptance == (2, 2, 4)
    assert accepted_at_least(point.acceptance) == [6 / 8, 4 / 8]
    assert summarise([line()])[0].acceptance == ()


def test_the_front_is_what_no_other_point_beats():
    draw = random.Random(0)
    for _ in range(200):
        points = [(draw.randrange(5), draw.randrange(5)) for _ in range(draw.randrange(1, 8))]
        beaten = {p for p, q in itertools.product(points, points) if q != p and q[0] >= p[0] and q[1] >= p[1]}
        assert pareto_front(points) == sorted(set(points) - beaten)
