"""Figures of the benchmarks."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from eval.plots import MARKERS, STYLE, plt

SMALL = STYLE | {"legend.fontsize": 7, "savefig.dpi": 110}
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
    with plt.rc_context(SMALL):
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
