"""Flow-matching samplers inside the blocks of a set-block model, next to its own decoders.

python -m benchmarks.flow.blocks
"""

import sys
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks.command import OUT, Name, Out, Overwrite, main, results_in
from benchmarks.figures import plot_curves
from eval.bench.prompts import prompt_set
from eval.bench.quality import measure_quality
from eval.bench.results import progress
from eval.files import write_whole
from eval.tables import markdown_of
from setflow.commands.settings import typed_command
from setflow.loading import load_model

# Samplers by what a token costs them; theta_trapezoidal takes two forwards a step.
FLOW_STEPS: dict[str, tuple[int, ...]] = {
    "exact": (2, 4, 8),
    "topk": (2, 4, 8),
    "theta_trapezoidal": (2, 4),
    "corrector": (4, 8),
    "remdm": (4, 8),
    "p2": (4, 8),
}
BOUNDS = (0.01, 0.1, 0.35, 1)


def blocks(
    model: Annotated[
        str | None, typer.Option("--model", help="A set-block model; the embedded one by default.")
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="Prompts.")] = 100,
    block_size: Annotated[int, typer.Option(min=2)] = 8,
    batch_size: Annotated[int, typer.Option(min=1)] = 8,
    out: Out = OUT,
    name: Name = "flow-blocks",
    overwrite: Overwrite = False,
) -> None:
    """Accuracy against tokens per forward of samplers inside blocks, next to the entropy bound and self-speculation."""
    specs = block_specs(block_size)
    with (
        results_in(out, name, overwrite) as results,
        progress(title="decoders", total=len(specs)) as advance,
    ):
        chosen, tokenizer = load_model(model, torch.float32)
        results.describe(chosen, count=count, batch_size=batch_size)
        torch.manual_seed(0)
        for row in measure_quality(chosen, tokenizer, prompt_set("additions", tokenizer, count), specs, batch_size):
            row.pop("acceptance_histogram", None)
            results.take(row | {"curve": specs[row["decoder"]]})
            advance()
    panels = {"exact_match": "worked additions, exact match"}
    plot_curves(results.rows, lambda row: row["curve"], "tokens_per_forward", panels, Path(f"{out / name}.png"))
    table = markdown_of(results.rows, ["decoder", "tokens_per_forward", "exact_match"])
    write_whole(Path(f"{out / name}.md"), f"`{typed_command()}`\n\n{table}\n")


def block_specs(block_size: int = 8) -> dict[str, str]:
    """Decoder specs, each with the name of its curve."""
    specs = {"ntp": "next token"}
    specs |= {f"sbd:block_size={block_size},entropy_bound={bound}": "sbd, entropy bound" for bound in BOUNDS}
    anchored = "anchor=true,commit=prefix"
    specs |= {f"sbd:block_size={block_size},entropy_bound={bound},{anchored}": "sbd, anchored" for bound in BOUNDS}
    specs[f"sbd-lossless:block_size={block_size}"] = "sbd-lossless (self-speculation)"
    for sampler, counts in FLOW_STEPS.items():
        for steps in counts:
            specs[f"dfm:block_size={block_size},sampler={sampler},steps={steps}"] = f"dfm, {sampler}"
    specs[f"dfm:block_size={block_size},sampler=first_hitting"] = "dfm, first_hitting"
    return specs


if __name__ == "__main__":
    sys.exit(main(blocks, "flow.blocks"))
