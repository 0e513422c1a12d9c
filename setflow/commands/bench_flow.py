"""``setflow bench flow``: likelihood, samplers and blocks of flow-matching models, and the same work by flow_matching."""

from pathlib import Path
from typing import Annotated

import typer

from setflow.commands.bench import Results, progress, show
from setflow.commands.settings import typed_command

app = typer.Typer(
    help="Measure flow-matching models and samplers.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Judge = Annotated[str | None, typer.Option(help="Next-token model that judges samples; the embedded model by default.")]
Out = Annotated[Path, typer.Option("--out", help="Folder for the results.")]


@app.command()
def likelihood(
    model: Annotated[list[str], typer.Option("--model", help="Folder of a model trained on whole texts; repeatable.")],
    texts: Annotated[Path, typer.Option(help="JSONL file of held-out 'text'.")],
    judge: Judge = None,
    rows: Annotated[int, typer.Option(min=2, help="Held-out rows.")] = 16,
    length: Annotated[int, typer.Option(min=2, help="Tokens in a row: as in the training.")] = 104,
    times: Annotated[int, typer.Option(min=1, help="Noise levels in all, stratified.")] = 1024,
    steps: Annotated[int, typer.Option(min=1, help="Steps of the samples that are judged.")] = 64,
    batch_size: Annotated[int, typer.Option(min=1)] = 8,
    seed: int = 0,
    out: Out = Path("benchmarks"),
    name: Annotated[str, typer.Option(help="Name of the JSON file.")] = "flow-likelihood",
) -> None:
    """Held-out ELBO perplexity; generative perplexity and unigram entropy of whole rows; MAUVE if it is installed."""
    import torch

    from dfm import FlowDecoder
    from dfm.flow_config import FlowTraits
    from eval.bench import flow_likelihood as flow
    from finetune.data import Source, load_documents
    from finetune.packing import PackedDataset
    from setflow.loading import load_model

    judging, tokenizer = load_model(judge, torch.float32)
    held_out = PackedDataset(load_documents([Source(str(texts))], tokenizer), length)
    data = torch.stack([held_out[i]["input_ids"] for i in range(min(rows, len(held_out)))])
    given = torch.arange(length)[None].expand_as(data) == 0

    def judged(samples: torch.Tensor) -> dict:
        listed = samples.tolist()
        nats = flow.judged_nats(judging, listed, [1] * len(listed))
        return {
            **flow.generative_perplexity(nats),
            "unigram_entropy_bits": flow.unigram_entropy(listed),
            "mauve": flow.mauve(judging, listed, data.tolist()),
        }

    settings = {"warning": flow.WARNING, "texts": str(texts), "length": length, "seed": seed}
    with Results(out / f"{name}.json", judging, **settings) as results:
        results.take({"model": "held-out text", **judged(data)})
        for folder in model:
            chosen, _ = load_model(folder, torch.float32)
            with progress(title="noise levels", total=flow.bound_batches(len(data), times, batch_size)) as advance:
                bound = flow.likelihood_bound(chosen, data, times, batch_size, seed, advance)
            decoder = FlowDecoder(path=FlowTraits.of(chosen.config).source, steps=steps)
            samples = decoder.infill(chosen, data, given, seed=seed).tokens
            results.take({"model": folder, **bound, "steps": steps, **judged(samples)})
    typer.echo(flow.WARNING)


@app.command()
def samplers(
    mask: Annotated[str | None, typer.Option(help="Folder of a whole-text model with the mask source.")] = None,
    uniform: Annotated[str | None, typer.Option(help="Folder of a whole-text model with the uniform source.")] = None,
    judge: Judge = None,
    count: Annotated[int, typer.Option(min=1, help="Held-out problems.")] = 24,
    most_steps: Annotated[int, typer.Option(min=1, help="Leave out points of more steps.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0)] = 1.0,
    seed: int = 0,
    out: Out = Path("benchmarks"),
    name: Annotated[str, typer.Option(help="Name of the JSON, PNG and MD files.")] = "flow-samplers",
) -> None:
    """Quality against forwards of each sampler, source and schedule, on additions; goes on where it was stopped."""
    import json

    import torch

    from dfm.paths.fit import fit_schedule
    from eval.bench import flow_sweep as sweep
    from eval.bench.flow_figures import markdown_table, plot_curves
    from eval.bench.flow_likelihood import WARNING
    from setflow.loading import load_model

    folders = {source: folder for source, folder in (("mask", mask), ("uniform", uniform)) if folder is not None}
    if not folders:
        raise ValueError("give --mask FOLDER, --uniform FOLDER or both")
    models = {source: load_model(folder, torch.float32)[0] for source, folder in folders.items()}
    judging, tokenizer = load_model(judge, torch.float32)
    task = sweep.make_task(tokenizer, count)
    settings = {"models": folders, "count": count, "temperature": temperature, "seed": seed, "judge": judge}
    file, measured, schedules, curve = out / f"{name}.json", [], [], None
    if file.is_file() and (old := json.loads(file.read_text()))["settings"] | {"schedules": None} == settings | {
        "schedules": None
    }:
        measured = old["rows"]
    if "mask" in models:
        curve, score = (sweep.masked_loss_curve(models["mask"], tokenizer, held_out=held) for held in (False, True))
        schedules = list(sweep.excess_rows(curve, score, (4, 8, 16, 32)))
        for row in schedules:
            show(row)
        fit_schedule(curve, 16).save(out / "flow-schedule-16.json")
    points = [p for p in sweep.pending(sweep.CURVES, measured, tuple(models)) if p[3] <= most_steps]
    with (
        Results(file, judging, measured, **settings, schedules=schedules) as results,
        progress(title="points", total=len(points)) as advance,
    ):
        if not any(row["source"] == "data" for row in measured):
            for row in list(sweep.reference_rows(judging, tokenizer, task, temperature, seed)):  # both or none
                results.take(row)
        for row in sweep.measure_sweep(models, judging, tokenizer, task, points, curve, temperature, seed):
            results.take(row)
            advance()
    measured = results.rows
    points = [row for row in measured if "sampler" in row]
    panels = {"exact_match": "exact match", "generative_perplexity": "generative perplexity (judge)"}
    plot_curves(points, sweep.curve_of, "forwards", panels, out / f"{name}.png", True, ["generative_perplexity"])
    columns = ["source", "sampler", "schedule", "steps", "forwards", "exact_match", "generative_perplexity"]
    table = markdown_table(measured, [*columns, "corpus_generative_perplexity", "unigram_entropy_bits"])
    fits = markdown_table(schedules, ["rounds", "excess_nats_even", "excess_nats_fitted"])
    (out / f"{name}.md").write_text(f"`{typed_command()}`\n\n{table}\n{WARNING}\n\n{fits}")
    typer.echo(WARNING)


@app.command()
def blocks(
    model: Annotated[
        str | None, typer.Option("--model", help="A set-block model; the embedded one by default.")
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="Prompts.")] = 100,
    block_size: Annotated[int, typer.Option(min=2)] = 8,
    batch_size: Annotated[int, typer.Option(min=1)] = 8,
    out: Out = Path("benchmarks"),
    name: Annotated[str, typer.Option(help="Name of the JSON, PNG and MD files.")] = "flow-blocks",
) -> None:
    """Accuracy against tokens per forward of samplers inside blocks, next to the entropy bound and self-speculation."""
    import torch

    from eval.bench.flow_blocks import block_specs
    from eval.bench.flow_figures import markdown_table, plot_curves
    from eval.bench.prompts import prompt_set
    from eval.bench.quality import measure_quality
    from setflow.loading import load_model

    chosen, tokenizer = load_model(model, torch.float32)
    specs = block_specs(block_size)
    torch.manual_seed(0)
    with (
        Results(out / f"{name}.json", chosen, count=count, batch_size=batch_size) as results,
        progress(title="decoders", total=len(specs)) as advance,
    ):
        for row in measure_quality(chosen, tokenizer, prompt_set("additions", tokenizer, count), specs, batch_size):
            row.pop("acceptance_histogram", None)
            results.take(row | {"curve": specs[row["decoder"]]})
            advance()
    panels = {"exact_match": "worked additions, exact match"}
    plot_curves(results.rows, lambda row: row["curve"], "tokens_per_forward", panels, out / f"{name}.png")
    table = markdown_table(results.rows, ["decoder", "tokens_per_forward", "exact_match"])
    (out / f"{name}.md").write_text(f"`{typed_command()}`\n\n{table}")


@app.command()
def peer(
    folder: Annotated[
        Path, typer.Option(help="Where flow_matching 1.0.10 and torchdiffeq are installed by pip --target.")
    ],
    vocab_size: Annotated[
        list[int] | None, typer.Option(min=2, help="Repeatable; 32,768 and 131,072 by default.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 1,
    length: Annotated[int, typer.Option(min=1, help="Tokens of each text.")] = 128,
    steps: Annotated[int, typer.Option(min=2)] = 32,
    rounds: Annotated[int, typer.Option(min=1, help="Runs of each, in turn; medians are reported.")] = 3,
    out: Out = Path("benchmarks"),
    name: Annotated[str, typer.Option(help="Name of the JSON file.")] = "flow-peer",
) -> None:
    """The Euler sampler of flow_matching and ours on one posterior: the same law, our time and memory over theirs."""
    from eval.bench.flow_peer import measure_peer

    sizes = tuple(vocab_size or (32768, 131072))
    settings = {"rounds": rounds, "peer": "flow_matching 1.0.10", "dtype": "float32"}
    with (
        Results(out / f"{name}.json", None, **settings) as results,
        progress(title="runs", total=4 * rounds * len(sizes)) as advance,
    ):
        for row in measure_peer(folder, sizes, batch_size, length, steps, rounds, advance):
            results.take(row)
