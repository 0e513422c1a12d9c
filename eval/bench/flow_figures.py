"""Figures and tables of the flow-matching benchmarks."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402 - the backend comes first

MARKERS = "osD^vP*X<>hpd8"
STYLE = {"font.size": 9, "axes.grid": True, "grid.alpha": 0.3, "legend.fontsize": 7, "savefig.dpi": 110}
Row = dict[str, Any]


def plot_curves(
    rows: Sequence[Row],
    name_of: Callable[[Row], str],
    x: str,
    ys: dict[str, str],
    path: Path,
    log_x: bool = False,
    log_y: Sequence[str] = (),
) -> None:
    """A panel for each field of ``ys`` (to its title) against the field ``x``, a line for each name."""
    names = list(dict.fromkeys(map(name_of, rows)))
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(1, len(ys), figsize=(4.6 * len(ys), 3.6), squeeze=False)
        for ax, (field, title) in zip(panels[0], ys.items(), strict=True):
            for i, name in enumerate(names):
                points = [(row[x], row[field]) for row in rows if name_of(row) == name and row.get(field) is not None]
                if points:
                    style = {
                        "marker": MARKERS[i % len(MARKERS)],
                        "color": f"C{i % 10}",
                        "markersize": 4,
                        "linewidth": 1,
                    }
                    style["linestyle"] = "-" if i < 10 else "--"
                    ax.plot(*zip(*sorted(points), strict=True), label=name, **style)
            ax.set(xlabel=x.replace("_", " "), title=title)
            if field in log_y:
                ax.set_yscale("log")
            if log_x:
                ax.set_xscale("log", base=2)
                ax.xaxis.set_major_formatter("{x:g}")
        handles, labels = panels[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=3)
        figure.tight_layout()
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, bbox_inches="tight")
        plt.close(figure)


def markdown_table(rows: Sequence[Row], columns: Sequence[str]) -> str:
    """The fields ``columns`` of each row; empty where a row has none.

    >>> print(markdown_table([{"a_b": 1}, {"c": 2}], ["a_b", "c"]))
    | a b | c |
    |---|---|
    | 1 |  |
    |  | 2 |
    <BLANKLINE>
    """
    lines = [[column.replace("_", " ") for column in columns], None]
    lines += [["" if row.get(column) is None else str(row[column]) for column in columns] for row in rows]
    return "".join("|---" * len(columns) + "|\n" if line is None else f"| {' | '.join(line)} |\n" for line in lines)
