"""Quality against forwards for the samplers of flow matching, on whole texts behind a prompt.

python -m benchmarks.flow.sweep --mask FOLDER --uniform FOLDER
"""

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from benchmarks.command import OUT, Judge, Name, Out, Overwrite, main, results_in
from benchmarks.figures import plot_curves
from benchmarks.flow.fit import excess_rows, masked_loss_curve
from benchmarks.flow.judging import WARNING
from benchmarks.flow.task import Task, complete, judge_completions, make_task, reference_rows
from dfm import FlowDecoder
from dfm.paths.fit import fit_schedule
from eval.bench.results import progress, tell
from eval.files import in_folder, write_whole
from eval.tables import markdown_of
from setflow.commands.settings import typed_command
from setflow.loading import load_model

FITTED = "fitted"
ALL_STEPS = (8, 16, 32, 64, 128, 256)
# One curve each: source, sampler, schedule, steps (half of them where a step takes two evaluations).
CURVES: tuple[tuple[str, str, str, tuple[int, ...]], ...] = (
    ("mask", "exact", "linear", ALL_STEPS),
    ("mask", "exact", FITTED, (8, 16, 32, 64)),
    ("mask", "euler", "linear", (8, 32, 128)),
    ("mask", "euler_x1", "linear", (8, 16, 32, 64)),
    ("mask", "tau_leap", "linear", (8, 32, 128)),
    ("mask", "psi", "linear", (8, 32, 128)),
    ("mask", "corrector", "linear", (8, 32, 128)),
    ("mask", "adaptive", "linear", (8, 32, 128)),
    ("mask", "remdm", "linear", (8, 32, 128)),
    ("mask", "theta_trapezoidal", "linear", (4, 16, 32)),
    ("mask", "topk", "linear", (8, 16, 32, 64)),
    ("mask", "topk", FITTED, (8, 16, 32, 64)),
    ("mask", "p2", "linear", (8, 32, 128)),
    ("mask", "first_hitting", "linear", (0,)),
    ("uniform", "exact", "linear", ALL_STEPS),
    ("uniform", "d3pm", "linear", (8, 16, 32, 64)),
    ("uniform", "corrector", "linear", (8, 32, 128)),
    ("uniform", "uniformisation", "linear", (0,)),
    ("uniform", "gibbs", "linear", (4, 16, 64)),
)


def sweep(
    mask: Annotated[str | None, typer.Option(help="Folder of a whole-text model with the mask source.")] = None,
    uniform: Annotated[str | None, typer.Option(help="Folder of a whole-text model with the uniform source.")] = None,
    judge: Judge = None,
    count: Annotated[int, typer.Option(min=1, help="Held-out problems.")] = 24,
    most_steps: Annotated[int, typer.Option(min=1, help="Leave out points of more steps.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0)] = 1.0,
    seed: int = 0,
    out: Out = OUT,
    name: Name = "flow-samplers",
    overwrite: Overwrite = False,
) -> None:
    """Quality against forwards of each sampler, source and schedule, on additions; goes on where it was stopped."""
    folders = {source: folder for source, folder in (("mask", mask), ("uniform", uniform)) if folder is not None}
    if not folders:
        raise ValueError("give --mask FOLDER, --uniform FOLDER or both")
    settings = {"models": folders, "count": count, "temperature": temperature, "seed": seed, "judge": judge}
    measured = rows_of(in_folder(out, name, "json"), settings)
    with results_in(out, name, overwrite or bool(measured)) as results:
        models = {source: load_model(folder, torch.float32)[0] for source, folder in folders.items()}
        judging, tokenizer = load_model(judge, torch.float32)
        task = make_task(tokenizer, count)
        schedules, curve = [], None
        if "mask" in models:
            curve, score = (masked_loss_curve(models["mask"], tokenizer, held_out=held) for held in (False, True))
            schedules = list(excess_rows(curve, score, (4, 8, 16, 32)))
            for row in schedules:
                tell(row)
            fit_schedule(curve, 16).save(out / f"{name}-schedule-16.json")
        results.describe(judging, measured, **settings, schedules=schedules)
        if not any(row["source"] == "data" for row in measured):
            for row in list(reference_rows(judging, tokenizer, task, temperature, seed)):  # both or none
                results.take(row)
        points = [p for p in pending(CURVES, measured, tuple(models)) if p[3] <= most_steps]
        with progress(title="points", total=len(points)) as advance:
            for row in measure_sweep(models, judging, tokenizer, task, points, curve, temperature, seed):
                results.take(row)
                advance()
        draw(results.rows, schedules, out / name, typed_command())
    print(WARNING, file=sys.stderr)


def rows_of(file: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of an earlier run with these settings, to be gone on with; none if there was no such run."""
    old = json.loads(file.read_text()) if file.is_file() else {"settings": {}}
    return old["rows"] if old["settings"] | {"schedules": None} == settings | {"schedules": None} else []


def draw(rows: Sequence[dict[str, Any]], schedules: Sequence[dict[str, Any]], path: Path, command: str) -> None:
    """The figure and the tables for people: PATH.png and PATH.md."""
    points = [row for row in rows if "sampler" in row]
    panels = {"exact_match": "exact match", "generative_perplexity": "generative perplexity (judge)"}
    plot_curves(points, curve_of, "forwards", panels, Path(f"{path}.png"), True, ["generative_perplexity"])
    columns = ["source", "sampler", "schedule", "steps", "forwards", "exact_match", "generative_perplexity"]
    table = markdown_of(rows, [*columns, "corpus_generative_perplexity", "unigram_entropy_bits"])
    fits = markdown_of(schedules, ["rounds", "excess_nats_even", "excess_nats_fitted"])
    write_whole(Path(f"{path}.md"), f"`{command}`\n\n{table}\n\n{WARNING}\n\n{fits}\n")


def make_decoder(source: str, sampler: str, schedule: str, steps: int, curve: Tensor | None) -> FlowDecoder:
    """The decoder of one point; a fitted schedule has as many rounds as steps, at most one for each token."""
    if schedule != FITTED:
        return FlowDecoder(path=source, sampler=sampler, scheduler=schedule, steps=steps or None)
    rounds = min(steps, len(curve))
    return FlowDecoder(path=source, sampler=sampler, scheduler=fit_schedule(curve, rounds), steps=rounds)


def curve_of(row: dict[str, Any]) -> str:
    """The curve that a row of :func:`measure_sweep` is a point of."""
    return f"{row['source']}: {row['sampler']}" + (
        "" if row["schedule"] == "linear" else f", {row['schedule']} schedule"
    )


def pending(curves, done: Sequence[dict[str, Any]], sources: Sequence[str]) -> list[tuple[str, str, str, int]]:
    """The points of ``curves`` for these sources that are not among the rows ``done``."""
    known = {(row["source"], row["sampler"], row["schedule"], row["steps"]) for row in done if "sampler" in row}
    points = [(*curve[:3], steps) for curve in curves for steps in curve[3] if curve[0] in sources]
    return [point for point in points if point not in known]


def measure_sweep(
    models: dict[str, Any],
    judge,
    tokenizer,
    task: Task,
    points: Sequence[tuple[str, str, str, int]],
    curve: Tensor | None = None,
    temperature: float = 1.0,
    seed: int = 0,
) -> Iterator[dict[str, Any]]:
    """A row for each point (source, sampler, schedule, steps) on the model of its source.

    curve: L(j) for fitted schedules. All points have the same problems, seeds and temperature.
    """
    for source, sampler, schedule, steps in points:
        decoder = make_decoder(source, sampler, schedule, steps, curve)
        found = complete(models[source], decoder, task, temperature, seed)
        yield {
            "source": source,
            "sampler": sampler,
            "schedule": schedule,
            "steps": steps,
            "forwards": round(sum(found.forwards) / len(found.forwards), 1),
            **judge_completions(judge, tokenizer, task, found.tokens),
        }


if __name__ == "__main__":
    sys.exit(main(sweep, "flow.sweep"))
