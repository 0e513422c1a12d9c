"""Which options of training drafts are best: small runs of equal steps, resumable run by run.

python -m benchmarks.training.ablation --model FOLDER --data FILE.jsonl
"""

import dataclasses
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Annotated, Any

import typer

from benchmarks.command import OUT, Name, Out, Overwrite, main, results_in
from decoding.forward.adapter import LINEAR_LAYERS
from eval.files import write_whole
from eval.tables import markdown_table
from finetune.measure import Measure
from finetune.recipe import Recipe, load_recipe
from finetune.report import TrainingReport
from finetune.run import finetune
from finetune.tuning import Tuning
from setflow.commands.settings import typed_command

# The default of each option, and what takes its place, one loss or one option at a time.
DEFAULTS: dict[str, Any] = {
    "matp_weight": 0.0,
    "distill": 1.0,
    "divergence": "hybrid",
    "position_weights": "dpace",
    "all_mask_share": 1.0,
    "copies": 1,
    "selector": 64,
    "rank": 64,
    "alpha_over_rank": 2,
    "targets": "all",
}
OF_TUNING = ("rank", "alpha_over_rank", "targets")
# Those that decide about a default are run with every seed, the others with the first.
DECIDING: tuple[dict[str, Any], ...] = (
    {},
    {"divergence": "kl", "matp_weight": 1.0},
    {"divergence": "tv"},
    {"position_weights": "uniform"},
    {"selector": 0},
)
VARIANTS: tuple[dict[str, Any], ...] = (
    *DECIDING,
    {"divergence": "kl"},
    {"divergence": "nla"},
    {"position_weights": "exponential"},
    {"all_mask_share": 0.5},
    {"copies": 2},
    {"selector": 16},
    {"rank": 16},
    {"alpha_over_rank": 16},
    {"alpha_over_rank": 64},
    {"targets": "o_proj"},
)
CANDIDATES = (None, 0, 4, 512)  # of the decoder, on the same weights; None is its default


def ablation(
    model: Annotated[str, typer.Option("--model", help="Folder of a small pretrained Llama.")],
    data: Annotated[str, typer.Option(help="JSONL file of its own texts, by `setflow finetune distill-data`.")],
    recipe: Annotated[str, typer.Option(help="What all runs share.")] = "stories260k-gated",
    steps: Annotated[int, typer.Option(min=1, help="Of each run.")] = 200,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of what decides about a default.")] = 3,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows of a step.")] = 16,
    prompts: Annotated[int, typer.Option(min=1, help="Held-out texts that are continued.")] = 64,
    kind: Annotated[str, typer.Option(help="gated or full.")] = "gated",
    work: Annotated[Path, typer.Option(help="Folder for the runs; finished ones are not run again.")] = Path(
        "build/options"
    ),
    out: Out = OUT,
    name: Name = "training-options",
    overwrite: Overwrite = False,
) -> None:
    """Train for equal steps with each loss, weighting, selector and adapter, and measure what drafts are worth."""
    sizes = [f"training.per_device_train_batch_size={batch_size}", f"measure.prompts={prompts}"]
    chosen = load_recipe(
        recipe, [f"model={model}", f"data=[{data}]", f"output={work}", "training.disable_tqdm=true", *sizes]
    )
    settings = {"recipe": recipe, "steps": steps, "kind": kind, "training": dict(chosen.training), "defaults": DEFAULTS}
    with results_in(out, name, overwrite) as results:
        results.describe(**settings)
        run_variants(chosen, steps, kind, seeds, results.take)
    title = f"`{kind}`, {steps} steps of each run, decoder `{chosen.decoder}`; written by `{typed_command()}`."
    write_whole(out / f"{name}.md", as_markdown(results.rows, title))


@dataclass(frozen=True)
class Variant:
    """A run that differs from the defaults in ``changes`` alone."""

    changes: Mapping[str, Any]
    seed: int = 1

    @property
    def name(self) -> str:
        return ", ".join(f"{key}={value}" for key, value in self.changes.items()) or "defaults"

    def of(self, recipe: Recipe, steps: int, kind: str) -> Recipe:
        """``recipe`` with these options, in a folder of its own."""
        options = DEFAULTS | dict(self.changes)
        rank, alpha_over_rank, targets = (options.pop(name) for name in OF_TUNING)
        folder = "-".join(f"{key}-{value}" for key, value in self.changes.items()) or "defaults"
        tuning = Tuning(kind, rank, rank * alpha_over_rank, targets=LINEAR_LAYERS if targets == "all" else (targets,))
        measure = recipe.measure or Measure()
        if not self.changes:
            decoders = [f"{recipe.decoder}{'' if count is None else f',candidates={count}'}" for count in CANDIDATES]
            measure = dataclasses.replace(measure, decoders=tuple(decoders))
        return dataclasses.replace(
            recipe,
            output=str(Path(recipe.output) / f"{kind}-{steps}" / folder / f"seed-{self.seed}"),
            objective_options=dict(recipe.objective_options) | options,
            tuning=Tuning("full") if kind == "full" else tuning,
            training=dict(recipe.training) | {"max_steps": steps, "seed": self.seed},
            measure=measure,
        )


def run_variants(
    recipe: Recipe,
    steps: int,
    kind: str = "gated",
    seeds: int = 1,
    told: Callable[[dict[str, Any]], None] = lambda row: None,
) -> list[dict[str, Any]]:
    """A row for each of VARIANTS, and for the defaults one for each of CANDIDATES: means over seeds on held-out text.

    A run that is finished is not run again, one that was stopped goes on; ``told`` hears of each row. Raises ValueError for
    a folder of runs of another recipe.
    """
    rows = []
    for changes in VARIANTS:
        if kind == "full" and any(name in OF_TUNING for name in changes):
            continue
        count = seeds if changes in DECIDING else 1
        reports = [finetune(Variant(changes, seed).of(recipe, steps, kind)) for seed in range(1, 1 + count)]
        for spec in _specs(reports[0]):
            name = Variant(changes).name if spec == recipe.decoder else f"candidates={spec.partition('candidates=')[2]}"
            rows.append({"options": name, "seeds": count, **_figures(reports, spec)})
            told(rows[-1])
    return rows


def _specs(report: TrainingReport) -> list[str]:
    names = [name.partition("/")[2] for name in report.measured if name.startswith("tokens_per_forward/")]
    return [spec for spec in names if spec != "ntp"]


def _figures(reports: list[TrainingReport], spec: str) -> dict[str, Any]:
    """Means of the reports, and how far apart their tokens per forward are."""
    speeds = [report.measured[f"tokens_per_forward/{spec}"] for report in reports]
    accepted = [
        mean(value for name, value in report.measured.items() if name.startswith("acceptance_")) for report in reports
    ]
    figures = {
        "tokens_per_forward": mean(speeds),
        "spread": max(speeds) - min(speeds),
        "acceptance": mean(accepted),
        "expected_tau": mean(report.measured["expected_tau"] for report in reports),
        "matp_loss": mean(report.measured["matp_loss"] for report in reports),
        "next_token_loss": mean(next(iter(report.held_out_next_token_loss_nats.values())) for report in reports),
        "steps": reports[0].steps,
        "minutes": sum(report.minutes_of_last_run for report in reports),
    }
    return {name: round(value, 4) for name, value in figures.items()}


def as_markdown(rows: list[dict[str, Any]], title: str) -> str:
    """The table for people."""
    heads = ["options", "seeds", "tokens per forward", "spread", "expected tau", "mean acceptance", "next-token loss"]
    digits = {"tokens_per_forward": 2, "spread": 2, "expected_tau": 2, "acceptance": 3, "next_token_loss": 3}
    body = [[row["options"], str(row["seeds"]), *(f"{row[n]:.{d}f}" for n, d in digits.items())] for row in rows]
    return f"{title}\n\n{markdown_table(heads, body)}\n"


if __name__ == "__main__":
    sys.exit(main(ablation, "training.ablation"))
