"""Which options of set-block training are best: one small run for each, equal steps, resumable run by run.

python -m benchmarks.training.ablation --model FOLDER --data FILE.jsonl
"""

import dataclasses
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.command import OUT, Name, Out, Overwrite, main, results_in
from eval.files import write_whole
from eval.tables import markdown_table
from finetune.recipe import Recipe, load_recipe
from finetune.report import TrainingReport
from finetune.run import finetune
from finetune.tuning import Tuning
from setflow.commands.settings import typed_command

# The default of each option, and what takes its place, one at a time.
DEFAULTS = {"all_mask_share": 0.5, "eta_scope": "block", "distill": 1.0, "rank": 32}
VARIANTS = (
    {},
    {"all_mask_share": 0.0},
    {"all_mask_share": 0.25},
    {"all_mask_share": 1.0},
    {"eta_scope": "sequence"},
    {"distill": 0.0},
    {"rank": 4},
    {"rank": 8},
    {"rank": 16},
    {"rank": 64},
)


def ablation(
    model: Annotated[str, typer.Option("--model", help="Folder of a small pretrained Llama.")],
    data: Annotated[str, typer.Option(help="JSONL file of its own texts, by `setflow finetune distill-data`.")],
    recipe: Annotated[str, typer.Option(help="What all runs share.")] = "stories260k-gated",
    steps: Annotated[int, typer.Option(min=1, help="Of each run.")] = 200,
    kind: Annotated[str, typer.Option(help="gated or full.")] = "gated",
    work: Annotated[Path, typer.Option(help="Folder for the runs; finished ones are not run again.")] = Path(
        "build/options"
    ),
    out: Out = OUT,
    name: Name = "training-options",
    overwrite: Overwrite = False,
) -> None:
    """Train once for each option: all-mask share, scope of the masking rate, distillation, rank; equal steps."""
    chosen = load_recipe(recipe, [f"model={model}", f"data=[{data}]", f"output={work}", "training.disable_tqdm=true"])
    settings = {"recipe": recipe, "steps": steps, "kind": kind, "training": dict(chosen.training)}
    with results_in(out, name, overwrite) as results:
        results.describe(**settings)
        run_variants(chosen, steps, kind, results.take)
    title = f"`{kind}`, {steps} steps of each run, decoder `{chosen.decoder}`; written by `{typed_command()}`."
    write_whole(out / f"{name}.md", as_markdown(results.rows, title))


@dataclass(frozen=True)
class Variant:
    """A run that differs from the defaults in ``changes`` alone."""

    changes: Mapping[str, Any]

    @property
    def name(self) -> str:
        return ", ".join(f"{key}={value}" for key, value in self.changes.items()) or "defaults"

    def of(self, recipe: Recipe, steps: int, kind: str) -> Recipe:
        """``recipe`` with these options, in a folder of its own."""
        options = DEFAULTS | dict(self.changes)
        rank = options.pop("rank")
        folder = "-".join(f"{key}-{value}" for key, value in self.changes.items()) or "defaults"
        return dataclasses.replace(
            recipe,
            output=str(Path(recipe.output) / f"{kind}-{steps}" / folder),
            objective_options=dict(recipe.objective_options) | options,
            tuning=Tuning("full") if kind == "full" else Tuning(kind, rank),
            training=dict(recipe.training) | {"max_steps": steps},
        )


def run_variants(
    recipe: Recipe, steps: int, kind: str = "gated", told: Callable[[dict[str, Any]], None] = lambda row: None
) -> list[dict[str, Any]]:
    """A row for each of VARIANTS: tokens per forward, mean acceptance, losses on held-out text.

    A run that is finished is not run again, one that was stopped goes on; ``told`` hears of each row. Raises ValueError for
    a folder of runs of another recipe.
    """
    rows = []
    for changes in VARIANTS:
        if kind == "full" and "rank" in changes:
            continue
        chosen = Variant(changes).of(recipe, steps, kind)
        rows.append({"options": Variant(changes).name, **_figures(finetune(chosen))})
        told(rows[-1])
    return rows


def _figures(report: TrainingReport) -> dict[str, Any]:
    measured, before = report.measured, report.held_out_before or {}
    accepted = [value for name, value in measured.items() if name.startswith("acceptance_")]
    speeds = {
        name.partition("/")[2]: value for name, value in measured.items() if name.startswith("tokens_per_forward/")
    }
    return {
        "tokens_per_forward": next((value for spec, value in speeds.items() if spec != "ntp"), None),
        "acceptance": round(sum(accepted) / len(accepted), 4),
        "matp_loss": measured["matp_loss"],
        "next_token_loss": next(iter(report.held_out_next_token_loss_nats.values())),
        "next_token_loss_before": next(iter(before.values()), None),
        "steps": report.steps,
        "minutes": report.minutes_of_last_run,
    }


def as_markdown(rows: list[dict[str, Any]], title: str) -> str:
    """The table for people."""
    heads = ["options", "tokens per forward", "mean acceptance", "masked loss", "next-token loss (before)"]
    body = []
    for row in rows:
        before = "-" if row["next_token_loss_before"] is None else f"{row['next_token_loss_before']:.3f}"
        figures = (f"{row['tokens_per_forward']:.2f}", f"{row['acceptance']:.3f}", f"{row['matp_loss']:.3f}")
        body.append([row["options"], *figures, f"{row['next_token_loss']:.3f} ({before})"])
    return f"{title}\n\n{markdown_table(heads, body)}\n"


if __name__ == "__main__":
    sys.exit(main(ablation, "training.ablation"))
