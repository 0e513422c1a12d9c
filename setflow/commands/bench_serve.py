"""``setflow bench serve``: what the decoders are worth inside vLLM."""

import json
from pathlib import Path
from typing import Annotated

import typer

from setflow.commands.bench_inputs import check_bench, results_in
from setflow.loading import find_source

STREAMS = (1, 8, 32, 64)


def serve(
    model: Annotated[
        str | None, typer.Option("--model", help="Folder or hub name; the embedded model by default.")
    ] = None,
    decoder: Annotated[
        str | None, typer.Option("--decoder", help="Ours; by default the one that the model names.")
    ] = None,
    streams: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Texts at once; may be given several times; 1, 8, 32 and 64 by default."),
    ] = None,
    new_tokens: Annotated[int, typer.Option(min=1, help="Of each text.")] = 128,
    rounds: Annotated[int, typer.Option(min=1, help="Runs of each; medians are reported.")] = 3,
    prompts: Annotated[str, typer.Option("--prompts", help="additions, python, or a JSONL file.")] = "python",
    engine: Annotated[
        str, typer.Option("--engine", help="Further settings of vllm.LLM, as JSON.", metavar="JSON")
    ] = "{}",
    out: Annotated[Path, typer.Option("--out", help="Folder for the JSON file.")] = Path("build/bench"),
    name: Annotated[str, typer.Option("--name", help="Name of the file, without its ending.")] = "serve",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace what another command has written there.")
    ] = False,
) -> None:
    """Tokens per second of our decoders in vLLM, of vLLM alone and of vLLM with drafts from the text, on the same weights."""
    check_bench(model, "fp32", "cpu", None, [prompts])
    settings = parse_engine(engine)
    from serving.launch import check_installed

    check_installed()
    results = results_in(out, name, overwrite)
    from decoding.forward.loading import load_tokenizer
    from eval.bench.prompts import prompt_set
    from serving.streams import compare

    source = find_source(model)
    asked = prompt_set(prompts, load_tokenizer(source), 16).ids
    with results:
        results.describe(new_tokens=new_tokens, rounds=rounds, prompts=prompts, decoder=decoder, engine=settings)
        for row in compare(source, decoder, asked, streams or [*STREAMS], new_tokens, rounds, settings):
            results.take(row)


def parse_engine(text: str) -> dict:
    """Settings of an engine that were typed as JSON; ValueError if they are no mapping."""
    try:
        settings = json.loads(text)
    except ValueError as error:
        raise ValueError(f"engine must be a JSON object, got {text!r}: {error}") from None
    if not isinstance(settings, dict):
        raise ValueError(f"engine must be a JSON object, got {text!r}")
    return settings
