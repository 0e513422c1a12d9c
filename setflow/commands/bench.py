"""``setflow bench``: what a decoder is worth on your machine, printed as a table and written as one JSON file."""

from pathlib import Path
from typing import Annotated

import typer

from decoding.inputs.checks import check_choice
from eval.bench.shapes import SHAPES, check_shape, find_shape, random_model
from setflow.adapters import AUTO
from setflow.commands.bench_inputs import check_bench, open_bench, results_in
from setflow.commands.bench_serve import serve
from setflow.commands.settings import Adapter, Static, parse_dtype
from setflow.loading import find_source

app = typer.Typer(
    help="Measure decoders on held-out prompts: quality, speed, losslessness, memory.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.command("serve")(serve)

PROMPTS_HELP = "additions, python, or a JSONL file with 'text' or 'messages' fields; the first two by default."

Model = Annotated[str | None, typer.Option("--model", help="Folder or hub name; the embedded model by default.")]
Dtype = Annotated[str, typer.Option("--dtype", help="fp32 or bf16.")]
Device = Annotated[str, typer.Option("--device", help="Where to run: cpu or cuda.")]
Decoders = Annotated[list[str] | None, typer.Option("--decoder", help="A decoder spec; may be given several times.")]
Prompts = Annotated[list[str] | None, typer.Option("--prompts", help=PROMPTS_HELP)]
Chat = Annotated[
    bool, typer.Option("--chat", help="A 'text' of a file of prompts is a turn of the user, to be answered.")
]
NewTokens = Annotated[
    int | None,
    typer.Option("--max-new-tokens", min=1, help="New tokens of a prompt; 96 of those of a file by default."),
]
Out = Annotated[Path, typer.Option("--out", help="Folder for the JSON file.")]
Name = Annotated[str, typer.Option("--name", help="Name of the file, without its ending.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what another command has written there.")]
OUT = Path("build/bench")

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
    adapter: Adapter = AUTO,
    decoder: Decoders = None,
    prompts: Prompts = None,
    chat: Chat = False,
    max_new_tokens: NewTokens = None,
    count: Annotated[int, typer.Option(min=1, help="Prompts of each kind.")] = 200,
    batch_size: Annotated[int, typer.Option(min=1)] = 8,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 decodes greedily.")] = 0.0,
    seed: int = 0,
    dtype: Dtype = "fp32",
    device: Device = "cpu",
    out: Out = OUT,
    name: Name = "quality",
    overwrite: Overwrite = False,
) -> None:
    """Exact match and tokens per forward of each decoder: the speed-quality curve."""
    check_bench(model, dtype, device, decoder, prompts, adapter)
    results = results_in(out, name, overwrite)
    import torch

    from eval.bench.quality import DEFAULT_SPECS, LOSSLESS_SPECS, measure_quality

    settings = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {}
    with results:
        loaded, tokenizer, prompt_sets = open_bench(model, dtype, device, prompts, count, chat, max_new_tokens, adapter)
        results.describe(loaded, batch_size=batch_size, temperature=temperature, seed=seed)
        for prompt_set in prompt_sets:
            torch.manual_seed(seed)
            # Without answers to judge, only decoders that keep the text can be compared by tokens per forward.
            judged = prompt_set.problems is not None and not temperature
            specs = decoder or (DEFAULT_SPECS if judged else LOSSLESS_SPECS)
            for row in measure_quality(loaded, tokenizer, prompt_set, specs, batch_size, **settings):
                results.take(row)


@app.command()
def speed(
    model: Model = None,
    adapter: Adapter = AUTO,
    decoder: Decoders = None,
    prompts: Prompts = None,
    chat: Chat = False,
    max_new_tokens: NewTokens = None,
    count: Annotated[int, typer.Option(min=1, help="Prompts of each kind.")] = 20,
    rounds: Annotated[int, typer.Option(min=1, help="Runs over all prompts; medians are reported.")] = 3,
    assistant: Annotated[
        str | None, typer.Option(help="Folder of a smaller model for transformers' assisted generation.")
    ] = None,
    row_costs: Annotated[
        str, typer.Option(help="What look_ahead=auto plans by: recorded, so that runs repeat, or measured here.")
    ] = "recorded",
    dtype: Dtype = "fp32",
    device: Device = "cpu",
    out: Out = OUT,
    name: Name = "speed",
    overwrite: Overwrite = False,
) -> None:
    """Tokens per second at batch 1, as a ratio to model.generate (KV cache, greedy) in the same run."""
    check_bench(model, dtype, device, decoder, prompts, adapter)
    check_choice("row_costs", row_costs, ("recorded", "measured"))
    if assistant is not None:
        find_source(assistant)
    results = results_in(out, name, overwrite)
    from decoding import Engine
    from eval.bench.contenders import Contender
    from eval.bench.results import progress
    from eval.bench.speed import measure_speed
    from setflow.loading import load_model

    with results:
        loaded, _, prompt_sets = open_bench(model, dtype, device, prompts, count, chat, max_new_tokens, adapter)
        contenders = [Contender(loaded, "generate", "model.generate")]
        engine = Engine(loaded) if row_costs == "measured" else None
        contenders += [Contender(loaded, spec, engine=engine) for spec in decoder or SPEED_SPECS]
        contenders.append(Contender(loaded, "generate", "transformers prompt lookup", prompt_lookup_num_tokens=10))
        if assistant is not None:
            helper = load_model(assistant, loaded.dtype)[0].to(device)
            named = "transformers assisted generation"
            contenders.append(Contender(loaded, "generate", named, assistant_model=helper))
        results.describe(loaded, batch_size=1, rounds=rounds, row_costs=row_costs)
        for prompt_set in prompt_sets:
            with progress(rounds * len(prompt_set.ids)) as advance:
                measured = measure_speed(contenders, prompt_set, rounds, advance)
            for row in measured:
                results.take(row)


@app.command()
def lossless(
    model: Model = None,
    adapter: Adapter = AUTO,
    decoder: Decoders = None,
    prompts: Prompts = None,
    chat: Chat = False,
    max_new_tokens: NewTokens = None,
    count: Annotated[int, typer.Option(min=1, help="Prompts of each kind.")] = 150,
    batch_size: Annotated[
        list[int] | None, typer.Option(help="May be given several times; 1 and 8 by default.")
    ] = None,
    finished: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Keep what is finished in this JSONL file, and go on from there."),
    ] = None,
    dtype: Dtype = "fp32",
    device: Device = "cpu",
    out: Out = OUT,
    name: Name = "lossless",
    overwrite: Overwrite = False,
) -> None:
    """Count the prompts on which self-speculation differs from model.generate(do_sample=False)."""
    check_bench(model, dtype, device, decoder, prompts, adapter)
    results = results_in(out, name, overwrite)
    from eval.bench.lossless import count_batches, measure_losslessness
    from eval.bench.results import progress
    from eval.finished import Finished

    kept, sizes, specs = Finished(finished), batch_size or [1, 8], decoder or LOSSLESS_SPECS
    with results:
        loaded, _, prompt_sets = open_bench(model, dtype, device, prompts, count, chat, max_new_tokens, adapter)
        results.describe(loaded)
        for prompt_set in prompt_sets:
            with progress(count_batches(prompt_set, len(specs), sizes), "decoding") as advance:
                for row in measure_losslessness(loaded, prompt_set, specs, sizes, kept, advance):
                    results.take(row)


@app.command()
def memory(
    decoder: Decoders = None,
    new_tokens: Annotated[int, typer.Option(min=1)] = 2048,
    device: Device = "cpu",
    out: Out = OUT,
    name: Name = "memory",
    overwrite: Overwrite = False,
) -> None:
    """Peak memory of one long generation relative to model.generate, on a model of random weights."""
    check_bench(None, "fp32", device, decoder, None)
    results = results_in(out, name, overwrite)
    from eval.bench.memory import SHAPE, measure_memory

    specs = tuple(decoder or ("ntp", "sbd:block_size=16,entropy_bound=0.1", "sbd-lossless:look_ahead=all"))
    with results:
        results.describe(shape=SHAPE, device=device)
        for row in measure_memory(specs, new_tokens, device):
            results.take(row)


@app.command()
def engine(
    shape: Annotated[
        str, typer.Option(help=f"{', '.join(SHAPES)}, or a folder or hub name with a config.json.")
    ] = "embedded",
    batch_size: Annotated[
        list[int] | None, typer.Option(min=1, help="May be given several times; 1, 8 and 32 by default.")
    ] = None,
    context: Annotated[
        list[int] | None,
        typer.Option(
            min=1,
            help="Tokens in the cache; may be given several times; 256 and 2048 by default, where the model has room.",
        ),
    ] = None,
    rows: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Rows of a sequence; may be given several times; powers of 2 to 128 by default."),
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Most runs of each forward; medians are reported.")] = 10,
    new_tokens: Annotated[int, typer.Option(min=1, help="Of the texts that are timed.")] = 64,
    rounds: Annotated[int, typer.Option(min=1, help="Runs of each text; medians are reported.")] = 3,
    compile: Annotated[
        bool, typer.Option("--compile", help="Also time model.generate with a static cache, compiled.")
    ] = False,
    static: Static = False,
    replay: Annotated[
        str | None,
        typer.Option(
            help="Also time decoders that draft, at recorded acceptance: a mean number of tokens per forward, or a JSON "
            "file with a list of accepted drafts."
        ),
    ] = None,
    decoder: Annotated[
        list[str] | None, typer.Option("--decoder", help="What to replay; may be given several times.")
    ] = None,
    quantize: Annotated[
        str | None, typer.Option("--quantize", metavar="int8", help="Round the weights; needs torchao.")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads of the CPU; as many as it has cores by default.")
    ] = None,
    dtype: Dtype = "fp32",
    device: Device = "cpu",
    out: Out = OUT,
    name: Name = "engine",
    overwrite: Overwrite = False,
) -> None:
    """Milliseconds of a forward by batch, context and rows, against the speed of memory, on random weights.

    Before that, tokens per second of texts; llama.cpp takes part where llama-cpp-python and gguf are installed.
    """
    check_shape(shape)
    check_bench(None, dtype, device, decoder, None)
    results = results_in(out, name, overwrite)
    import torch

    from decoding.forward.quantize import quantize as round_weights
    from eval.bench.engine import check_contexts, copy_speed, measure_forwards, weight_bytes
    from eval.bench.peers import installed_peers
    from eval.bench.replay import recorded_lengths
    from eval.bench.texts import REPLAYED, measure_texts

    place, config = torch.device(device), find_shape(shape)
    lengths = [] if replay is None else recorded_lengths(replay)
    if threads is not None:
        torch.set_num_threads(threads)
    counts = rows or (1, 2, 4, 8, 16, 32, 64, 128)
    room = config.max_position_embeddings - max(*counts, new_tokens)
    contexts = context or [known for known in (256, 2048) if known <= room]
    check_contexts(config, contexts, max(counts), "rows")
    check_contexts(config, contexts, new_tokens, "new tokens")
    with results:
        torch.manual_seed(0)
        model, copied = random_model(config, parse_dtype(dtype), place), copy_speed(place)
        if quantize is not None:
            round_weights(model, quantize)
        weights = {"weight_gigabytes": round(weight_bytes(model) / 1e9, 4), "copy_gigabytes_per_second": copied}
        results.describe(
            model,
            shape=shape,
            repeats=repeats,
            new_tokens=new_tokens,
            rounds=rounds,
            static=static,
            replay=replay,
            quantize=quantize,
            **weights,
        )
        peers = installed_peers() if quantize is None and place.type == "cpu" and config.model_type == "llama" else []
        specs = decoder or REPLAYED
        for row in measure_texts(model, contexts, copied, new_tokens, rounds, compile, static, lengths, specs, peers):
            results.take(row)
        for row in measure_forwards(model, batch_size or (1, 8, 32), contexts, counts, copied, repeats, static):
            results.take(row)
