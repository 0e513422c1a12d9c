"""``setflow generate``: continue a prompt, watch the order in which tokens are decided, see what it took."""

import json
import time
from contextlib import nullcontext
from dataclasses import replace
from statistics import median
from typing import TYPE_CHECKING, Annotated

import typer

from setflow.adapters import AUTO
from setflow.commands.settings import (
    Adapter,
    Compile,
    DecoderSpec,
    Dtype,
    MaxNewTokens,
    Model,
    NoLive,
    Opened,
    Particles,
    Prompt,
    Quantize,
    RewardName,
    Seed,
    Static,
    Temperature,
    TrustRemoteCode,
    make_settings,
    note,
    open_model,
    read_prompt,
    screen,
    show_text,
)
from setflow.lineage import steering_line, steering_report

if TYPE_CHECKING:
    from rich.console import Console

    from setflow.run import Run, Settings

STOCK = "model.generate"
ROUNDS = 3  # of a comparison, fewer where they take long
SECONDS_FOR_ROUNDS = 10


def generate(
    prompt: Prompt,
    model: Model = None,
    decoder: DecoderSpec = None,
    adapter: Adapter = AUTO,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--no-chat",
            help="Put the prompt through the model's chat template, or continue it as it stands; by default the first for "
            "models that were tuned to answer.",
        ),
    ] = None,
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = 0.0,
    seed: Seed = None,
    dtype: Dtype = None,
    reward: RewardName = None,
    particles: Particles = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Also run next-token decoding, and time all without the live view.")
    ] = False,
    no_live: NoLive = False,
    trust_remote_code: TrustRemoteCode = False,
    quantize: Quantize = None,
    static: Static = False,
    compile: Compile = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")] = False,
) -> None:
    """Continue a prompt. Tokens of one colour were decided by the same forward pass.

    The text goes to standard output and the figures to standard error. On a terminal the text appears as it is decided;
    elsewhere it is plain and printed at the end.
    """
    prompt = read_prompt(prompt)
    settings = make_settings(max_new_tokens, temperature, seed)
    console = screen()
    opened = open_model(model, decoder, dtype, console, trust_remote_code, adapter, reward, particles, quantize)
    if static or compile:
        from decoding import Engine

        engine = Engine.for_model(opened.model)
        engine.static, engine.compile = static, compile or "auto"
    if chat and opened.tokenizer.chat_template is None:
        raise ValueError(f"model {opened.name!r} has no chat template; leave --chat out")
    asked = opened.is_chat_model if chat is None else chat
    ids = opened.encode_chat([{"role": "user", "content": prompt}]) if asked else opened.encode(prompt)
    shown = "" if asked else prompt  # of an answer the question is no part
    watched = console.is_terminal and not as_json
    result = _watch(opened, shown, ids, settings, console, live=watched and not no_live, quiet=as_json)
    if watched:
        show_text(result.coloured(opened.tokenizer, shown), console)
    elif not as_json:
        show_text(shown + result.text, console)

    # The first run was slowed by the terminal and by first calls, so a comparison runs it anew.
    runs = {opened.spec: result}
    if compare:
        runs = _measure(opened, ids, settings)
        result = runs[opened.spec]
    if as_json:
        report = _report(opened, prompt, ids, settings, result, runs if compare else None) | {"chat": asked}
        print(json.dumps(report, ensure_ascii=console.is_terminal))  # a terminal obeys some characters
    else:
        if asked:
            note("the prompt went through the model's chat template; --no-chat continues it as it stands")
        if opened.adapter is not None:
            note(f"drafts by the adapter {opened.adapter!r}, which leaves the model's text as it is")
        note(_table(runs) if compare else _line(opened.spec, result))
        if result.steered is not None:
            note(steering_line(result.steered))
        if compare and opened.spec != "ntp":
            note(_difference(opened, result, runs["ntp"], settings))


def _watch(
    opened: Opened, prompt: str, ids: list[int], settings: "Settings", console: "Console", live: bool, quiet: bool
) -> "Run":
    """Run, with a ``live`` view or without. What is committed when Ctrl-C comes is shown and stays, unless ``quiet``."""
    from setflow.live import LiveView
    from setflow.run import run
    from steering import RewardError

    view = LiveView(opened.tokenizer, prompt, opened.mask_token_id)
    try:
        with view.shown(console, opened.model) if live else nullcontext():
            return run(opened.model, opened.tokenizer, ids, opened.decoder, settings, view)
    except RewardError as error:
        if not quiet:
            output = error.output
            tokens = output.sequences[0, len(ids) :][: int(output.new_tokens[0])].tolist()
            show_text(prompt + opened.tokenizer.decode(tokens, skip_special_tokens=True), console)
        raise
    except KeyboardInterrupt:
        view.end()
        if view.tokens and not quiet:
            show_text(view.text() if console.is_terminal else prompt + view.committed_text, console)
        note("[stopped]")
        raise


def _measure(opened: Opened, ids: list[int], settings: "Settings") -> "dict[str, Run]":
    """The decoder, next-token decoding in the same engine, and the model's own generate, in turns; median seconds."""
    from decoding import NextTokenDecoder
    from setflow.run import run

    decoders = {opened.spec: opened.decoder, "ntp": NextTokenDecoder(), STOCK: None}
    runs = {name: [] for name in decoders}
    started = time.perf_counter()
    while not runs[STOCK] or len(runs[STOCK]) < ROUNDS and time.perf_counter() - started < SECONDS_FOR_ROUNDS:
        for name, decoder in decoders.items():
            runs[name].append(run(opened.model, opened.tokenizer, ids, decoder, settings))
    return {name: replace(rounds[0], seconds=median(r.seconds for r in rounds)) for name, rounds in runs.items()}


def _line(spec: str, run: "Run") -> str:
    return (
        f"{spec}: {len(run.tokens)} tokens, {run.forwards} forwards, {run.tokens_per_forward:.2f} tokens per forward, "
        f"{run.tokens_per_second:.0f} tok/s"
    )


def _table(runs: "dict[str, Run]") -> str:
    """One line for each run; speed-up is against the model's own generate."""
    base = runs[STOCK].tokens_per_second
    rows = [("decoder", "tokens", "forwards", "tokens/forward", "tok/s", "speed-up")]
    for name, run in runs.items():
        ratio = run.tokens_per_second / base
        figures = (str(len(run.tokens)), str(run.forwards), f"{run.tokens_per_forward:.2f}")
        rows.append((name, *figures, f"{run.tokens_per_second:.0f}", f"{ratio:.2f}x"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for name, *figures in rows:
        cells = [name.ljust(widths[0]), *(f.rjust(w) for f, w in zip(figures, widths[1:], strict=True))]
        lines.append("  ".join(cells))
    return "\n".join(lines)


def _first_difference(run: "Run", other: "Run") -> int | None:
    """The number (from 1) of the first token that differs, None if both are the same."""
    if run.tokens == other.tokens:
        return None
    pairs = enumerate(zip(run.tokens, other.tokens, strict=False), 1)
    return next((i for i, (a, b) in pairs if a != b), min(len(run.tokens), len(other.tokens)) + 1)


def _difference(opened: Opened, run: "Run", reference: "Run", settings: "Settings") -> str:
    from sbd import SelfSpeculativeDecoder

    if settings.temperature > 0:
        return "text: sampled, so not compared; each decoder draws its own"
    place = _first_difference(run, reference)
    if place is None:
        return "text: the same as next-token decoding's"
    text = f"text: differs from next-token decoding's from token {place} on"
    if isinstance(opened.decoder, SelfSpeculativeDecoder) and opened.dtype != "float32":
        text += (
            f"; {opened.dtype} rounds a forward of more rows otherwise, so that ties fall otherwise: see --dtype fp32"
        )
    return text


def _report(
    opened: Opened, prompt: str, ids, settings: "Settings", result: "Run", runs: "dict[str, Run] | None"
) -> dict:
    report = {
        "model": opened.name,
        "decoder": opened.spec,
        "dtype": opened.dtype,
        "device": str(opened.model.device),
        "temperature": settings.temperature,
        "seed": settings.seed,
        "prompt": prompt,
        "prompt_tokens": len(ids),
        "text": result.text,
        **result.figures(),
    }
    if result.steered is not None:
        report["steering"] = steering_report(result.steered, opened.tokenizer, len(ids))
    if runs is not None:
        stock = runs[STOCK]
        report["compare"] = {name: run.figures() for name, run in runs.items() if name != opened.spec or name == "ntp"}
        report["speed_up"] = round(result.tokens_per_second / stock.tokens_per_second, 3)
        same = _first_difference(result, runs["ntp"]) is None
        report["same_text"] = same if settings.temperature == 0 else None
    return report
