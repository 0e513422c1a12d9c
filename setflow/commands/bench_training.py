"""``setflow bench training`` and ``setflow bench options``: what a training step costs, and which options are best."""

from pathlib import Path
from typing import Annotated

import typer

from setflow.commands.bench import Device, Dtype, Model, Out, Results, progress, show
from setflow.commands.settings import need_extra, typed_command


def training(
    model: Model = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows of a batch.")] = 4,
    length: Annotated[int, typer.Option(min=2, help="Tokens of a row.")] = 512,
    block_size: Annotated[int, typer.Option(min=1)] = 8,
    rank: Annotated[int, typer.Option(min=1, help="Of the row-gated adapter.")] = 32,
    rounds: Annotated[int, typer.Option(min=1, help="Steps of each, by turns; medians are reported.")] = 5,
    dtype: Dtype = "fp32",
    device: Device = "cpu",
    out: Out = Path("build/bench"),
    name: Annotated[str, typer.Option(help="Name of the JSON file.")] = "training",
) -> None:
    """Cost of a set-block training step, all weights or a gated adapter, against a next-token step on the same batch."""
    need_extra("train", ("accelerate", "yaml", "datasets"))
    import torch

    from finetune.recipe import fastest_attention
    from finetune.step_cost import contenders, measure_steps, share_of_peak
    from setflow.commands.settings import parse_dtype
    from setflow.loading import EMBEDDED, load_model

    autocast = None if dtype == "fp32" else parse_dtype(dtype)
    loaded = load_model(model, torch.float32)[0].to(device)
    loaded.set_attn_implementation(fastest_attention(loaded.device, loaded.config))  # as recipes do
    tokens = torch.randint(
        loaded.config.vocab_size - 1, (batch_size, length), generator=torch.Generator().manual_seed(0)
    )
    batch = {"input_ids": tokens.to(device), "document_ids": torch.zeros_like(tokens).to(device)}
    with progress(3 * (rounds + 1)) as advance:
        rows = measure_steps(list(contenders(loaded, block_size, rank)), batch, rounds, autocast, advance)
    settings = {"batch_size": batch_size, "length": length, "block_size": block_size, "rank": rank, "rounds": rounds}
    settings["seconds_of"] = "the process on one thread" if device == "cpu" else "the clock"
    with Results(out / f"{name}.json", loaded, **settings) as results:
        for row in rows:
            if device != "cpu":
                gpu = torch.cuda.get_device_name(loaded.device)
                row["mfu"] = share_of_peak(row, gpu, model or str(EMBEDDED), block_size, rank, length)
            results.take(row)


def options(
    model: Annotated[str, typer.Option("--model", help="Folder of a small pretrained Llama.")],
    data: Annotated[str, typer.Option(help="JSONL file of its own texts, by `setflow finetune distill-data`.")],
    recipe: Annotated[str, typer.Option(help="What all runs share.")] = "stories260k-gated",
    steps: Annotated[int, typer.Option(min=1, help="Of each run.")] = 200,
    kind: Annotated[str, typer.Option(help="gated or full.")] = "gated",
    work: Annotated[Path, typer.Option(help="Folder for the runs; finished ones are not run again.")] = Path(
        "build/options"
    ),
    out: Out = Path("build/bench"),
    name: Annotated[str, typer.Option(help="Name of the JSON and Markdown files.")] = "training-options",
) -> None:
    """Train once for each option: all-mask share, scope of the masking rate, distillation, rank; equal steps."""
    need_extra("train", ("accelerate", "yaml", "datasets"))
    from eval.bench.report import write
    from finetune import load_recipe
    from finetune.option_table import VARIANTS, as_markdown, run_variants
    from setflow.commands.settings import note

    chosen = load_recipe(recipe, [f"model={model}", f"data=[{data}]", f"output={work}", "training.disable_tqdm=true"])
    done = []

    def told(row: dict) -> None:
        done.append(row)
        note(f"{len(done)} of {len(VARIANTS)}")
        show(row)

    rows = run_variants(chosen, steps, kind, told)
    settings = {"recipe": recipe, "steps": steps, "kind": kind, "training": dict(chosen.training)}
    write(out / f"{name}.json", {"command": typed_command(), "settings": settings, "rows": rows})
    title = f"`{kind}`, {steps} steps of each run, decoder `{chosen.decoder}`; written by `{typed_command()}`."
    (out / f"{name}.md").write_text(as_markdown(rows, title))
