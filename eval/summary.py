"""From the lines of a sweep to points: one for each model, decoder, temperature and task, over all its seeds."""

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Figure:
    """A mean and two standard errors of it; ``error`` is 0 where there is nothing to estimate it from."""

    mean: float
    error: float = 0.0

    @classmethod
    def of(cls, values: list[float]) -> "Figure":
        several = len(values) > 1
        return cls(statistics.fmean(values), 2 * statistics.stdev(values) / len(values) ** 0.5 if several else 0.0)


@dataclass(frozen=True)
class Point:
    """model: its name, or its path where several have that name. setting: what differs from other lines, as text.

    score: the task's first metric, its error over seeds, or over samples where one seed has run.

    tokens_per_forward, tokens_per_second: with errors over seeds. acceptance: how many drafts had 0, 1, 2, ... of their
    tokens accepted. tokens, forwards, seconds, samples, cut_prompts: sums over seeds.
    """

    model: str
    decoder: str
    temperature: float
    setting: str
    task: str
    metric: str
    seeds: int
    score: Figure
    tokens_per_forward: Figure
    tokens_per_second: Figure
    tokens: int
    forwards: int
    seconds: float
    samples: int
    cut_prompts: int
    acceptance: tuple[int, ...]


def summarise(rows: Iterable[Mapping[str, Any]]) -> list[Point]:
    """Points in the order in which their first lines come."""
    rows = list(rows)
    paths, varied = {}, {}
    for row in rows:
        paths.setdefault(row["model"], set()).add(row["pretrained"])
        for name, value in row["settings"].items():
            varied.setdefault(name, set()).add(value)
    groups: dict[tuple, list[Mapping[str, Any]]] = {}
    for row in rows:
        model = row["pretrained"] if len(paths[row["model"]]) > 1 else row["model"]
        different = [
            f"default {name}" if value is None else f"{name} {value}"
            for name, value in row["settings"].items()
            if len(varied[name]) > 1
        ]
        place = model, row["decoder"], row["temperature"], ", ".join(different), row["task"]
        groups.setdefault(place, []).append(row)
    return [_point(*place, group) for place, group in groups.items()]


def _point(
    model: str, decoder: str, temperature: float, setting: str, task: str, rows: list[Mapping[str, Any]]
) -> Point:
    metric = next(name for name in rows[0]["scores"] if "_stderr," not in name)
    score = Figure.of([row["scores"][metric] for row in rows])
    if len(rows) == 1:
        score = Figure(score.mean, 2 * rows[0]["scores"].get(metric.replace(",", "_stderr,", 1), 0.0))
    costs = [row["decoding"] for row in rows]
    histograms = [cost.get("acceptance_lengths", []) for cost in costs]
    longest = max(map(len, histograms))
    return Point(
        model,
        decoder,
        temperature,
        setting,
        task,
        metric,
        len(rows),
        score,
        Figure.of([cost["tokens_per_forward"] for cost in costs]),
        Figure.of([cost["tokens_per_second"] for cost in costs]),
        **{
            name: sum(cost[name] for cost in costs)
            for name in ("tokens", "forwards", "seconds", "samples", "cut_prompts")
        },
        acceptance=tuple(sum(h[n] for h in histograms if n < len(h)) for n in range(longest)),
    )


def accepted_at_least(acceptance: Iterable[int]) -> list[float]:
    """For offset 1, 2, ...: the share of drafts of which at least so many tokens were accepted.

    >>> accepted_at_least([2, 1, 1])
    [0.5, 0.25]
    """
    counts = list(acceptance)
    return [sum(counts[n:]) / sum(counts) for n in range(1, len(counts))]


def pareto_front(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """The (speed, quality) pairs that no other pair beats in one and reaches in the other, by rising speed.

    >>> pareto_front([(1, 0.9), (2, 0.9), (3, 0.5), (2, 0.4)])
    [(2, 0.9), (3, 0.5)]
    """
    front: list[tuple[float, float]] = []
    for speed, quality in sorted(points, reverse=True):
        if not front or quality > front[-1][1]:
            front.append((speed, quality))
    return front[::-1]
