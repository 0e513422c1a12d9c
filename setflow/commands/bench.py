"""``setflow bench``: the measurements behind the README's table, each printed and written as one JSON file."""

from collections.abc import Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from setflow.commands.settings import typed_command

app = typer.Typer(
    help="Measure decoders on held-out prompts: quality, speed, losslessness, memory.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

PROMPTS_HELP = "additions, python, or a JSONL file with 'text' fields; the first two by default."

Model = Annotated[str | None, typer.Option("--model", help="Folder or hub name; the embedded model by default.")]
Dtype = Annotated[str, typer.Option("--dtype", help="fp32 or bf16.")]
Device = Annotated[str, typer.Option("--device", help="Where to run: cpu or cuda.")]
Decoders = Annotated[list[str] | None, typer.Option("--decoder", help="A decoder spec; may be given several times.")]
Prompts = Annotated[list[str] | None, typer.Option("--prompts", help=PROMPTS_HELP)]
Out = Annotated[Path, typer.Option("--out", help="Folder for the JSON file.")]

# The second of the set-block lines has a bound that costs no accuracy on the additions.
SPEED_SPECS = (
    "ntp",
    "sbd:block_size=16,entropy_bound=0.1",
    "sbd:block_size=16,entropy_bound=0.05,anchor=true,commit=prefix",
    "sbd-lossless:look_ahead=all",
    "sbd-lossless:look_ahead=auto",
    "sbd-lossless:look_ahead=auto,draft=both",
    "prompt-lookup:block_size=8",
)
LOSSLESS_SPECS = tuple(f"sbd-lossless:look_ahead={s}" for s in ("alternate", 0, 2, "all", "auto"))


@app.command()
def quality(
    model: Model = None,
    decoder: Decoders = None,
    prompts: Prompts = None,
    count: Annotated[int, typer.Option(min=1, help="Prompts of each kind.")] = 200,
    batch_size: Annotated[int, typer.Option(min=1)] = 8,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 decodes greedily.")] = 0.0,
    seed: int = 0,
    dtype: Dtype = "fp32",
    device: Device = "cpu",
    out: Out = Path("build/bench"),
    name: Annotated[str, typer.Option(help="Name of the JSON file.")] = "quality",
) -> None:
    """Exact match and tokens per forward of each decoder: the speed-quality curve."""
    import torch

    from eval.bench.quality import DEFAULT_SPECS, LOSSLESS_SPECS, measure_quality

    bench = Bench(model, dtype, device, prompts, count)
    settings = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {}
    with bench.results(out, name, batch_size=batch_size, temperature=temperature, seed=seed) as results:
        for prompt_set in bench.prompt_sets:
            torch.manual_seed(seed)
            # Without answers to judge, only decoders that keep the text can be compared by tokens per forward.
            judged = prompt_set.problems is not None and not temperature
            specs = decoder or (DEFAULT_SPECS if judged else LOSSLESS_SPECS)
            for row in measure_quality(bench.model, bench.tokenizer, prompt_set, specs, batch_size, **settings):
                results.take(row)


@app.command()
def speed(
    model: Model = None,
    decoder: Decoders = None,
    prompts: Prompts = None,
    count: Annotated[int, typer.Option(min=1, help="Prompts of each kind.")] = 20,
    rounds: Annotated[int, typer.Option(min=1, help="Runs over all prompts; medians are reported.")] = 3,
    assistant: Annotated[
        str | None, typer.Option(help="Folder of a smaller model for transformers' assisted generation.")
    ] = None,
    dtype: Dtype = "fp32",
    device: Device = "cpu",
    out: Out = Path("build/bench"),
    name: Annotated[str, typer.Option(help="Name of the JSON file.")] = "speed",
) -> None:
    """Tokens per second at batch 1, as a ratio to model.generate (KV cache, greedy) in the same run."""
    from eval.bench.contenders import Contender
    from eval.bench.speed import measure_speed
    from setflow.loading import load_model

    bench = Bench(model, dtype, device, prompts, count)
    contenders = [Contender(bench.model, "generate", "model.generate")]
    contenders += [Contender(bench.model, spec) for spec in decoder or SPEED_SPECS]
    contenders.append(Contender(bench.model, "generate", "transformers prompt lookup", prompt_lookup_num_tokens=10))
    if assistant is not None:
        helper = load_model(assistant, bench.model.dtype)[0].to(device)
        contenders.append(
            Contender(bench.model, "generate", "transformers assisted generation", assistant_model=helper)
        )
    with bench.results(out, name, batch_size=1, rounds=rounds) as results:
        for prompt_set in bench.prompt_sets:
            with progress(rounds * len(prompt_set.ids)) as advance:
                measured = measure_speed(contenders, prompt_set, rounds, advance)
            for row in measured:
                results.take(row)


@app.command()
def lossless(
    model: Model = None,
    decoder: Decoders = None,
    prompts: Prompts = None,
    count: Annotated[int, typer.Option(min=1, help="Prompts of each kind.")] = 150,
    batch_size: Annotated[
        list[int] | None, typer.Option(help="May be given several times; 1 and 8 by default.")
    ] = None,
    dtype: Dtype = "fp32",
    device: Device = "cpu",
    out: Out = Path("build/bench"),
    name: Annotated[str, typer.Option(help="Name of the JSON file.")] = "lossless",
) -> None:
    """Count the prompts on which self-speculation differs from model.generate(do_sample=False)."""
    from eval.bench.lossless import measure_losslessness

    bench = Bench(model, dtype, device, prompts, count)
    with bench.results(out, name) as results:
        for prompt_set in bench.prompt_sets:
            for row in measure_losslessness(bench.model, prompt_set, decoder or LOSSLESS_SPECS, batch_size or (1, 8)):
                results.take(row)


@app.command()
def memory(
    decoder: Decoders = None,
    new_tokens: Annotated[int, typer.Option(min=1)] = 2048,
    device: Device = "cpu",
    out: Out = Path("build/bench"),
) -> None:
    """Peak memory of one long generation relative to model.generate, on a model of random weights."""
    from eval.bench.memory import SHAPE, measure_memory
    from eval.bench.report import write

    specs = tuple(decoder or ("ntp", "sbd:block_size=16,entropy_bound=0.1", "sbd-lossless:look_ahead=all"))
    rows = measure_memory(specs, new_tokens, device)
    for row in rows:
        show(row)
    write(out / "memory.json", {"command": typed_command(), "model": SHAPE, "device": device, "rows": rows})


@app.command()
def resample(
    model: Annotated[str, typer.Option("--model", help="Folder of a model trained with the rpt or sbd+rpt objective.")],
    control: Annotated[
        str | None, typer.Option(help="Folder of a model of as many next-token steps: its loss, and judge of samples.")
    ] = None,
    texts: Annotated[
        list[str] | None, typer.Option(help="JSONL files of held-out 'text' for the likelihoods; may be repeated.")
    ] = None,
    decoder: Decoders = None,
    prompts: Prompts = None,
    count: Annotated[int, typer.Option(min=1, help="Prompts of each kind.")] = 100,
    documents: Annotated[int, typer.Option(min=1, help="Held-out documents of each file.")] = 100,
    exact: Annotated[
        int,
        typer.Option(min=0, help="Held-out tokens whose exact law is computed too, a row for each vocabulary entry."),
    ] = 0,
    temperature: Annotated[
        list[float] | None, typer.Option(min=0.0, help="May be repeated; 0, 0.5 and 1 by default.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=2, help="Runs at each temperature above 0.")] = 3,
    batch_size: Annotated[int, typer.Option(min=1)] = 8,
    block_size: Annotated[int, typer.Option(min=2, help="Of the set-block decoders of the last table.")] = 8,
    dtype: Dtype = "fp32",
    device: Device = "cpu",
    out: Out = Path("build/bench"),
    name: Annotated[str, typer.Option(help="Name of the JSON file.")] = "resample",
) -> None:
    """What revising tokens is worth: held-out likelihood, quality of samples, and all families at equal forwards."""
    from eval.bench.exact_previous import measure_exactness
    from eval.bench.resample import SPECS, equal_forwards, families, measure_likelihood, measure_samples
    from finetune.data import read_texts
    from setflow.commands.settings import parse_dtype
    from setflow.loading import load_model

    bench = Bench(model, dtype, device, prompts, count)
    judge = None if control is None else load_model(control, parse_dtype(dtype))[0].to(device)
    context = bench.model.config.max_position_embeddings

    def samples(chosen, specs, temperatures):
        return measure_samples(bench.model, bench.tokenizer, chosen, specs, temperatures, seeds, batch_size, judge)

    with bench.results(out, name, seeds=seeds, batch_size=batch_size, control=control) as results:
        for path in texts or ():
            ids = [i[:context] for i in bench.tokenizer(read_texts([path])[:documents])["input_ids"] if len(i) > 3]
            exactness = measure_exactness(bench.model, ids, exact) if exact else {}
            results.take({"texts": Path(path).stem} | measure_likelihood(bench.model, ids, judge) | exactness)
        for chosen in bench.prompt_sets:
            for row in samples(chosen, decoder or SPECS, temperature or (0.0, 0.5, 1.0)):
                results.take(row)
            if getattr(bench.model.generation_config, "trained_block_sizes", None):
                kinds = families(block_size)
                specs = [spec for kind in kinds.values() for spec in kind]
                measured = [results.take(row) for row in samples(chosen, specs, (0.0,))]
                quality = "exact_match" if chosen.problems is not None else "ntp_loss"
                for row in equal_forwards(measured, kinds, quality):
                    results.take({"prompts": chosen.name} | row)


class Bench:
    """Model, prompts and a screen for one benchmark."""

    def __init__(self, model: str | None, dtype: str, device: str, prompts: list[str] | None, count: int):
        from eval.bench.prompts import PROMPT_SETS, prompt_set
        from setflow.commands.settings import parse_dtype
        from setflow.loading import load_model

        self.model, self.tokenizer = load_model(model, parse_dtype(dtype))
        self.model.to(device)
        self.prompt_sets = [prompt_set(name, self.tokenizer, count) for name in prompts or PROMPT_SETS]

    def results(self, folder: Path, name: str, **settings) -> "Results":
        return Results(folder / f"{name}.json", self.model, **settings)


@contextmanager
def progress(total: int, title: str = "timing"):
    """A bar; gives a function to call after each of ``total`` steps."""
    from rich.progress import Progress

    with Progress(transient=True) as bar:
        task = bar.add_task(title, total=total)
        yield lambda: bar.advance(task)


class Results:
    """The rows of a benchmark, each printed and kept in a JSON file as soon as it is there, with where and how.

    Until the end of its ``with`` the file says "unfinished". ``model`` is None where no model runs; ``rows`` are those
    of an earlier run that is gone on with.
    """

    def __init__(self, path: Path, model, rows: Iterable[dict] = (), **settings):
        from eval.bench.report import conditions

        self.path, self.rows = path, list(rows)
        self._head = {"command": typed_command(), "conditions": conditions(model), "settings": settings}

    def take(self, row: dict) -> dict:
        show(row)
        self.rows.append(row)
        self._write({"unfinished": True})
        return row

    def _write(self, state: dict) -> None:
        from eval.bench.report import write

        write(self.path, self._head | state | {"rows": self.rows})

    def __enter__(self) -> "Results":
        return self

    def __exit__(self, error, *_) -> None:
        if error is None:
            self._write({})
            typer.echo(f"written to {self.path}")


def show(row: dict) -> None:
    """Print a row of results."""
    typer.echo("  ".join(f"{key}={value}" for key, value in row.items() if value is not None))
