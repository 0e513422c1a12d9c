"""The figures of a sweep: quality against speed, and how far drafts are accepted."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402 - the backend comes first

from eval.summary import Point, accepted_at_least, pareto_front  # noqa: E402

MARKERS = "osD^vP*X<>hpd8"
SPEEDS = {"tokens_per_forward": "tokens per forward", "tokens_per_second": "tokens per second"}
# The same rows give the same file, byte for byte.
STYLE = {"svg.hashsalt": "setflow", "font.size": 9, "axes.grid": True, "grid.alpha": 0.3, "legend.fontsize": 8}


def label(point: Point, several_models: bool) -> str:
    """How a point is named in legends and tables."""
    name = f"{point.model}: {point.decoder}" if several_models else point.decoder
    name += f", temperature {point.temperature:g}" if point.temperature else ""
    return f"{name}, {point.setting}" if point.setting else name


def plot_speed_quality(points: Sequence[Point], path: Path) -> None:
    """A row for each task: its score against tokens per forward and against tokens per second.

    Bars are two standard errors, over seeds where several have run, else over samples; the line joins the points that no
    other beats in both.
    """
    tasks = list(dict.fromkeys(point.task for point in points))
    names = _names(points)
    with plt.rc_context(STYLE):
        figure, grid = plt.subplots(len(tasks), 2, figsize=(9, 3.2 * len(tasks)), squeeze=False, sharey="row")
        for axes, task in zip(grid, tasks, strict=True):
            of_task = [point for point in points if point.task == task]
            for ax, (field, title) in zip(axes, SPEEDS.items(), strict=True):
                for point in of_task:
                    speed, score = getattr(point, field), point.score
                    index = list(names).index(names_key(point))
                    ax.errorbar(
                        speed.mean,
                        100 * score.mean,
                        xerr=speed.error or None,
                        yerr=100 * score.error or None,
                        fmt=MARKERS[index % len(MARKERS)],
                        color=f"C{index % 10}",
                        label=names[names_key(point)],
                        capsize=2,
                    )
                front = pareto_front((getattr(p, field).mean, 100 * p.score.mean) for p in of_task)
                ax.plot(*zip(*front, strict=True), color="0.6", linewidth=1, zorder=0)
                ax.set(xlabel=title, xlim=(0, None), ylim=(-3, 103))
            axes[0].set_ylabel(f"{task}, {of_task[0].metric.partition(',')[0]} (%)")
        _legend(figure, grid.flat)
        _save(figure, path)


def plot_acceptance(points: Sequence[Point], path: Path) -> None:
    """For each task, the share of drafts of which at least 1, 2, 3, ... tokens were accepted."""
    drafting = [point for point in points if point.acceptance]
    tasks = list(dict.fromkeys(point.task for point in drafting))
    names = _names(drafting)
    with plt.rc_context(STYLE):
        figure, grid = plt.subplots(1, len(tasks), figsize=(4.5 * len(tasks), 3.2), squeeze=False, sharey=True)
        for ax, task in zip(grid[0], tasks, strict=True):
            for point in (point for point in drafting if point.task == task):
                shares = accepted_at_least(point.acceptance)
                index = list(names).index(names_key(point))
                places = range(1, len(shares) + 1)
                style = {"marker": MARKERS[index % len(MARKERS)], "color": f"C{index % 10}"}
                ax.plot(places, shares, label=names[names_key(point)], markersize=4, **style)
            ax.set(title=task, xlabel="offset in the draft", ylim=(0, 1.03))
        grid[0, 0].set_ylabel("accepted at least so far")
        _legend(figure, grid.flat)
        _save(figure, path)


def names_key(point: Point) -> tuple:
    """What tells points of one task apart."""
    return point.model, point.decoder, point.temperature, point.setting


def _names(points: Sequence[Point]) -> dict[tuple, str]:
    several = len({point.model for point in points}) > 1
    return {names_key(point): label(point, several) for point in points}


def _legend(figure, axes) -> None:
    entries: dict[str, object] = {}
    for ax in axes:
        handles, labels = ax.get_legend_handles_labels()
        entries |= dict(zip(labels, handles, strict=True))
    figure.legend(entries.values(), entries.keys(), loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=2)


def _save(figure, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)
