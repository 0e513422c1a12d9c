"""``report.md``: for every sweep in a folder its command, its tables and its figures."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.files import write_whole
from eval.finished import read_records
from eval.plots import plot_acceptance, plot_speed_quality
from eval.summary import Figure, Point, summarise
from eval.tables import markdown_table

REPORT = "report.md"
TITLE = "# What decoders cost and what their answers are worth\n\nEvery file here was written by the commands below.\n"
NOTE = (
    "Score in percent ± two standard errors, over seeds where several have run, else over samples. In parentheses the "
    "speed-up in forwards (NFE): tokens per forward, counted up to the first stop and without the prefill, where "
    "next-token decoding has 1; its mean is that over tasks."
)
COST_NOTE = (
    "Seconds are those inside `generate`, of cells that ran one after the other: for claims of speed use `setflow bench "
    "speed`, which takes turns. Accepted: tokens of a draft, on average."
)


def write_report(folder: Path) -> Path:
    """Write ``report.md`` anew from the ``*.jsonl`` files of ``folder``, and two figures for each; returns its path.

    SVG files that are there besides are shown at the end.
    """
    check_report(folder)
    text, drawn = TITLE, set()
    for path, rows in find_sweeps(folder).items():
        points = summarise(rows)
        figures = {"Quality against speed": (plot_speed_quality, "speed-quality")}
        if any(point.acceptance for point in points):
            figures["How far drafts are accepted"] = plot_acceptance, "acceptance"
        text += f"\n## {path.stem}\n\n{_commands(rows)}\n\n{_conditions(rows, points)}\n\n{NOTE}\n\n"
        text += f"{score_table(points)}\n\n{COST_NOTE}\n\n{cost_table(points)}\n"
        for title, (plot, name) in figures.items():
            picture = folder / f"{path.stem}-{name}.svg"
            plot(points, picture)
            drawn.add(picture)
            text += f"\n![{title}]({picture.name})\n"
    for picture in sorted(set(folder.glob("*.svg")) - drawn):
        text += f"\n## {picture.stem}\n\n![{picture.stem}]({picture.name})\n"
    report = check_report(folder)
    write_whole(report, text)
    return report


def check_report(folder: Path) -> Path:
    """Where the report of ``folder`` is; raises ValueError if what stands there is no report of ours."""
    report = folder / REPORT
    if report.exists() and not report.read_bytes().startswith(TITLE.partition("\n")[0].encode()):
        raise ValueError(f"{str(report)!r} is not a report of sweeps and would be replaced; give another folder")
    return report


def find_sweeps(folder: Path) -> dict[Path, list[dict[str, Any]]]:
    """The lines of each sweep in ``folder``; other JSONL files, such as finished answers, have none."""
    read = {path: [row for row in read_records(path) if "decoding" in row] for path in sorted(folder.glob("*.jsonl"))}
    return {path: rows for path, rows in read.items() if rows}


def score_table(points: Sequence[Point]) -> str:
    """A line for each model, decoder and temperature, a column for each task: table 1 of arXiv 2509.04185."""
    tasks = {point.task: point.metric for point in points}
    heads = [
        "model",
        "decoder",
        "temperature",
        *(f"{task}, {metric.partition(',')[0]}" for task, metric in tasks.items()),
    ]
    lines: dict[tuple, dict[str, Point]] = {}
    for point in points:
        line = point.model, _decoder(point), point.temperature
        lines.setdefault(line, {})[point.task] = point
    body = []
    for (model, decoder, temperature), of_task in lines.items():
        cells = [_score(of_task[task]) if task in of_task else "" for task in tasks]
        mean = sum(point.tokens_per_forward.mean for point in of_task.values()) / len(of_task)
        body.append([model, decoder, f"{temperature:g}", *cells, f"{mean:.2f}x"])
    return markdown_table([*heads, "mean speed-up in forwards"], body)


def cost_table(points: Iterable[Point]) -> str:
    """Tokens, forwards and seconds of each point."""
    heads = ["task", "model", "decoder", "temperature", "seeds", "answers", "tokens", "forwards", "tokens per forward"]
    body = [
        [
            point.task,
            point.model,
            _decoder(point),
            f"{point.temperature:g}",
            str(point.seeds),
            str(point.samples),
            f"{point.tokens:,}",
            f"{point.forwards:,}",
            _figure(point.tokens_per_forward, 2),
            f"{point.seconds:.1f}",
            _figure(point.tokens_per_second, 0),
            _mean_accepted(point.acceptance),
        ]
        for point in points
    ]
    return markdown_table([*heads, "seconds", "tokens per second", "accepted"], body)


def _decoder(point: Point) -> str:
    return f"`{point.decoder}`" + (f", {point.setting}" if point.setting else "")


def _score(point: Point) -> str:
    score = Figure(100 * point.score.mean, 100 * point.score.error)
    return f"{_figure(score, 1)} ({point.tokens_per_forward.mean:.2f}x)"


def _figure(figure: Figure, digits: int) -> str:
    return f"{figure.mean:.{digits}f}" + (f" ± {figure.error:.{digits}f}" if figure.error else "")


def _mean_accepted(acceptance: Sequence[int]) -> str:
    return f"{sum(n * count for n, count in enumerate(acceptance)) / sum(acceptance):.2f}" if acceptance else ""


def _commands(rows: Iterable[Mapping[str, Any]]) -> str:
    return "```\n" + "\n".join(dict.fromkeys(row["command"] for row in rows)) + "\n```"


def _conditions(rows: Sequence[Mapping[str, Any]], points: Sequence[Point]) -> str:
    """One paragraph on where and how the rows were measured; where they differ, every value is named."""

    def values(part: str, name: str) -> str:
        return " / ".join(dict.fromkeys(str(row[part][name]) for row in rows if row[part][name] is not None))

    text = (
        f"{values('conditions', 'device')}, {values('conditions', 'dtype')}, batch {values('settings', 'batch_size')}"
    )
    text += f", {values('conditions', 'parameters')} parameters, attention {values('conditions', 'attention')}"
    text += f", torch {values('conditions', 'torch')}, transformers {values('conditions', 'transformers')}"
    text += f", Python {values('conditions', 'python')}."
    models = {row["model"]: row["pretrained"] for row in rows}
    text += " Models: " + ", ".join(f"{name} = `{path}`" for name, path in models.items()) + "."
    if limit := values("settings", "limit"):
        text += f" The first {limit} problems of each task."
    if length := values("settings", "max_gen_toks"):
        text += f" At most {length} new tokens."
    if any(point.cut_prompts for point in points):
        cut = dict.fromkeys(
            f"{p.cut_prompts // p.seeds} of {p.samples // p.seeds} ({p.task})" for p in points if p.cut_prompts
        )
        text += f" Prompts that did not fit into the context and lost their beginning: {', '.join(cut)}."
    return text
