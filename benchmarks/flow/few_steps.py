"""How few forwards a text may take: a flow model, the one that it taught, and samplers fitted to it, on additions.

python -m benchmarks.flow.few_steps --teacher FOLDER --distilled FOLDER --fitted FILE --fitted FILE
"""

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.command import OUT, Judge, Name, Out, Overwrite, main, results_in
from benchmarks.figures import plot_curves
from benchmarks.flow.judging import WARNING
from benchmarks.flow.task import Task, complete, judge_completions, make_task
from dfm import FlowDecoder
from dfm.samplers.fitted import StepSettings
from dfm.samplers.glass import Glass
from eval.bench.results import progress
from eval.files import in_folder, write_whole
from eval.tables import markdown_of
from setflow.commands.settings import typed_command
from setflow.loading import load_model

ALL_STEPS = (1, 2, 4, 8, 16, 32, 64)
GLASS_STEPS = (8, 16, 32)
CORRELATIONS = (0.5,)
TEACHER, DISTILLED, FITTED = "teacher, ancestral", "distilled", "teacher, fitted"
Point = tuple[str, str, FlowDecoder]  # curve, which model, decoder


def few_steps(
    teacher: Annotated[str, typer.Option(help="Folder of a whole-text model with the mask source.")],
    distilled: Annotated[str | None, typer.Option(help="Folder of what it taught by dfm-transition.")] = None,
    fitted: Annotated[list[str] | None, typer.Option(help="File of setflow finetune fit-sampler.")] = None,
    judge: Judge = None,
    count: Annotated[int, typer.Option(min=1, help="Held-out problems.")] = 12,
    most_steps: Annotated[int, typer.Option(min=1, help="Leave out points of more forwards.")] = 64,
    temperature: Annotated[float, typer.Option(min=0.0)] = 1.0,
    seed: int = 0,
    out: Out = OUT,
    name: Name = "flow-few-steps",
    overwrite: Overwrite = False,
) -> None:
    """Quality against forwards, 1 to 64; goes on where it was stopped."""
    folders = {"teacher": teacher} | ({"distilled": distilled} if distilled else {})
    files = sorted(fitted or ())
    points = make_points(distilled is not None, [StepSettings.load(file) for file in files], most_steps)
    common = {"teacher": teacher, "count": count, "temperature": temperature, "seed": seed, "judge": judge}
    settings = common | {"distilled": distilled, "fitted": files}
    measured = rows_of(in_folder(out, name, "json"), settings)
    with results_in(out, name, overwrite or bool(measured)) as results:
        models = {role: load_model(folder, torch.float32)[0] for role, folder in folders.items()}
        judging, tokenizer = load_model(judge, torch.float32)
        task = make_task(tokenizer, count)
        results.describe(judging, measured, **settings)
        if not any(row["curve"] == "data" for row in measured):
            results.take({"curve": "data", **judge_completions(judging, tokenizer, task, task.solved)})
        known = {(row["curve"], row["steps"]) for row in results.rows if "steps" in row}
        left = [point for point in points if (point[0], steps_of(point[2])) not in known]
        with progress(title="points", total=len(left)) as advance:
            for row in measure(models, judging, tokenizer, task, left, temperature, seed):
                results.take(row)
                advance()
        draw(results.rows, out / name, typed_command())
    print(WARNING, file=sys.stderr)


def rows_of(file: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of an earlier run that are what these settings would give; models and files may have been added since."""
    old = json.loads(file.read_text()) if file.is_file() else {"settings": {}, "rows": []}
    before, changed = old["settings"], set()
    if before.get("distilled") != settings["distilled"]:
        changed.add(DISTILLED)
    if not set(before.get("fitted", ())) <= set(settings["fitted"]):
        changed.add(FITTED)
    same = all(before.get(key, ...) == value for key, value in settings.items() if key not in ("distilled", "fitted"))
    return [row for row in old["rows"] if same and row["curve"] not in changed]


def make_points(with_distilled: bool, fitted: Sequence[StepSettings], most_steps: int = 64) -> list[Point]:
    """What is measured: every curve at its numbers of steps."""
    points = [(TEACHER, "teacher", FlowDecoder(steps=steps)) for steps in ALL_STEPS]
    if with_distilled:
        points += [(DISTILLED, "distilled", FlowDecoder(sampler="transition", steps=steps)) for steps in ALL_STEPS]
    points += [(FITTED, "teacher", FlowDecoder(sampler=settings)) for settings in fitted]
    for correlation in CORRELATIONS:
        make = glass_of(correlation)
        points += [
            (f"teacher, GLASS {correlation}", "teacher", FlowDecoder(sampler=make, steps=steps))
            for steps in GLASS_STEPS
        ]
    return [point for point in points if steps_of(point[2]) <= most_steps]


def glass_of(correlation: float):
    """From a path and a grid of as many steps as forwards to transitions of four forwards each."""

    def make(path, grid) -> Glass:
        by_name = Glass.default(path, grid)
        return Glass(path, by_name.grid, correlation, by_name.inner_steps)

    return make


def steps_of(decoder: FlowDecoder) -> int:
    """How many steps were asked for."""
    return decoder.sampler.steps if isinstance(decoder.sampler, StepSettings) else decoder.steps or 0


def measure(
    models: dict[str, Any], judge, tokenizer, task: Task, points: Sequence[Point], temperature: float, seed: int
) -> Iterator[dict[str, Any]]:
    """A row for each point, all on the same problems with the same seeds."""
    for curve, role, decoder in points:
        found = complete(models[role], decoder, task, temperature, seed)
        yield {
            "curve": curve,
            "steps": steps_of(decoder),
            "forwards": round(sum(found.forwards) / len(found.forwards), 1),
            **judge_completions(judge, tokenizer, task, found.tokens),
        }


def draw(rows: Sequence[dict[str, Any]], path: Path, command: str) -> None:
    """The figure and the table for people: PATH.png and PATH.md."""
    points = [row for row in rows if "steps" in row]
    panels = {"generative_perplexity": "generative perplexity (judge)", "exact_match": "exact match"}
    plot_curves(
        points, lambda row: row["curve"], "forwards", panels, Path(f"{path}.png"), True, ["generative_perplexity"]
    )
    columns = ["curve", "steps", "forwards", "exact_match", "generative_perplexity", "corpus_generative_perplexity"]
    table = markdown_of(rows, [*columns, "unigram_entropy_bits"])
    write_whole(Path(f"{path}.md"), f"`{command}`\n\n{table}\n\n{WARNING}\n")


if __name__ == "__main__":
    sys.exit(main(few_steps, "flow.few_steps"))
