"""``setflow eval``: scores of lm-eval tasks and what each answer cost; sweeps with a report; the trace of one answer."""

import logging
from pathlib import Path
from typing import Annotated

import typer

from decoding.inputs.checks import check_count, check_range
from eval import variations
from eval.files import in_folder
from eval.known_tasks import expand_tasks, find_data
from setflow.commands.settings import (
    DecoderSpec,
    Dtype,
    MaxNewTokens,
    Model,
    Prompt,
    Seed,
    Temperature,
    TrustRemoteCode,
    check_device,
    check_names,
    make_settings,
    need_extra,
    note,
    open_model,
    parse_dtype,
    read_prompt,
    screen,
    typed_command,
)
from setflow.loading import default_spec, find_source

OWN_TASKS = "additions,next_statement"
# At least one decoder of each kind, and the bounds around the paper's; as many more as you like by --decoder.
SWEPT = (
    "ntp",
    "sbd:block_size=16,entropy_bound=0.1",
    "sbd:block_size=16,entropy_bound=0.35",
    "sbd:block_size=16,entropy_bound=0.03,anchor=true,commit=prefix",
    "sbd:block_size=16,entropy_bound=0.3,anchor=true,commit=prefix",
    "sbd-lossless:block_size=8",
    "sbd-lossless:block_size=8,draft=both",
    "prompt-lookup:block_size=8",
)
TRACE_WIDTH = 110  # where there is no terminal

app = typer.Typer(help="Evaluate a model with a decoder on lm-eval tasks.", rich_markup_mode=None)

Tasks = Annotated[
    str, typer.Option("--tasks", help="Names, separated by commas: lm-eval's, or ours (eval/tasks/own.py).")
]
Data = Annotated[
    Path | None, typer.Option("--data", help="Folder of local data sets; else SETFLOW_DATA, else the hub.")
]
Limit = Annotated[float | None, typer.Option("--limit", help="Problems of each task; a share if below 1.")]
Fewshot = Annotated[
    int | None, typer.Option("--num-fewshot", min=0, help="Examples in the prompt, if the task lets you choose.")
]
MaxGenToks = Annotated[
    int | None, typer.Option("--max-gen-toks", min=1, help="Most new tokens of an answer; a task may ask for fewer.")
]
BatchSize = Annotated[str, typer.Option("--batch-size", help='Answers at a time; "auto": as many as fit.')]
Device = Annotated[str | None, typer.Option("--device", help="cpu, cuda, ...; by default what there is.")]
Consent = Annotated[
    bool, typer.Option("--confirm-run-unsafe-code", help="Agree to run code that the model writes, in a sandbox.")
]
WeakConsent = Annotated[
    bool, typer.Option("--confirm-weak-sandbox", help="Agree to that also where a sandbox cannot hide your files.")
]


@app.callback(invoke_without_command=True)
def evaluate(
    context: typer.Context,
    model: Model = None,
    decoder: DecoderSpec = None,
    tasks: Tasks = OWN_TASKS,
    data: Data = None,
    limit: Limit = None,
    num_fewshot: Fewshot = None,
    max_gen_toks: MaxGenToks = None,
    temperature: Temperature = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="For sampling.")] = 0,
    batch_size: BatchSize = "1",
    dtype: Dtype = None,
    device: Device = None,
    apply_chat_template: Annotated[bool, typer.Option(help="Put prompts into the model's chat template.")] = False,
    confirm_run_unsafe_code: Consent = False,
    trust_remote_code: TrustRemoteCode = False,
    confirm_weak_sandbox: WeakConsent = False,
    out: Annotated[Path | None, typer.Option(help="Folder for results; a killed run goes on from there.")] = None,
) -> None:
    """Evaluate a model with a decoder on lm-eval tasks: scores, and what the answers cost.

    With --out, lm-eval's own files, and beside them decoding_DATE.json (tokens, forwards, tokens per forward, tokens per
    second, acceptance lengths, in all and by task) and decoding_samples_DATE.jsonl (the same for each answer).
    """
    if context.invoked_subcommand:
        _refuse_options(context)
        return
    _need_lm_eval()
    check_names(model, decoder, dtype)
    names, limit = _check_settings(tasks, data, limit, batch_size, device)
    from eval.model import SetflowLM
    from eval.run import evaluate, sampling
    from eval.tasks import load_tasks

    # What they lack is said before the model is loaded.
    load_tasks(names, data, confirm_run_unsafe_code, confirm_weak_sandbox)
    path, dtype = _source(model, dtype)
    finished = out / "finished.jsonl" if out else None
    trusted = {"trust_remote_code": True} if trust_remote_code else {}
    loaded = SetflowLM(path, decoder or "ntp", finished, device=device, batch_size=batch_size, dtype=dtype, **trusted)
    loaded.use(decoder or default_spec(loaded.model, trust_remote_code), seed)
    evaluation = evaluate(
        names,
        loaded,
        data=data,
        output=out,
        limit=limit,
        num_fewshot=num_fewshot,
        apply_chat_template=apply_chat_template,
        max_gen_toks=max_gen_toks,
        gen_kwargs=sampling(temperature),
        confirm_run_unsafe_code=confirm_run_unsafe_code,
    )
    print(evaluation.table())
    if evaluation.folder:
        note(f"written to {evaluation.folder}")


@app.command()
def sweep(
    model: Model = None,
    control: Annotated[
        str | None,
        typer.Option(help="A model of as many steps with next-token loss only; it runs ntp.", metavar="PATH"),
    ] = None,
    decoder: Annotated[
        list[str] | None, typer.Option(metavar="SPEC", help="May be given several times; one of each kind by default.")
    ] = None,
    vary: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=V,V", help="Each decoder that has this key, with each value; several times."),
    ] = None,
    temperature: Annotated[list[float] | None, typer.Option(min=0.0, help="Several times; 0 by default.")] = None,
    seed: Annotated[list[int] | None, typer.Option(min=0, help="Several times, for sampling; 0 by default.")] = None,
    tasks: Tasks = OWN_TASKS,
    data: Data = None,
    limit: Limit = None,
    num_fewshot: Fewshot = None,
    max_gen_toks: MaxGenToks = None,
    batch_size: BatchSize = "8",
    dtype: Dtype = None,
    device: Device = None,
    confirm_run_unsafe_code: Consent = False,
    confirm_weak_sandbox: WeakConsent = False,
    out: Annotated[Path, typer.Option(help="Folder for the sweep and the report.")] = Path("build/report"),
    name: Annotated[str, typer.Option(help="Name of the JSONL file in it.")] = "sweep",
) -> None:
    """Every decoder at every setting on every task: a line of JSON for each, and a report with tables and figures.

    A sweep that was killed goes on where it was. With --control, the table is that of arXiv 2509.04185: a model trained
    with next-token loss against one trained for set blocks, NTP mode and bounds, with the speed-up in forwards. Sampling
    is from the plain distribution: no top-k, no top-p.
    """
    _need_lm_eval()
    need_extra("eval", ("matplotlib",))
    file = in_folder(out, name, "jsonl")
    specs = list(decoder or SWEPT)
    for spec in specs:
        check_names(model, spec, dtype)
    for text in vary or ():
        key, _, values = text.partition("=")
        specs = variations.vary(specs, key, values.split(","))
    names, limit = _check_settings(tasks, data, limit, batch_size, device)
    if control is not None:
        find_source(control)
    from eval.report import check_report, write_report
    from eval.sweep import Settings, make_cells, run_sweep

    path, weights = _source(model, dtype)
    models = {_name(model): (path, specs)}
    if control is not None:
        name_of_control = control if _name(control) in models else _name(control)
        models = {name_of_control: (_source(control, None)[0], ["ntp"]), **models}
    cells = make_cells(models, names, temperature or [0.0], seed or [0])
    consent = confirm_run_unsafe_code, confirm_weak_sandbox
    settings = Settings(data, limit, num_fewshot, max_gen_toks, batch_size, weights, device, *consent)
    check_report(out)
    for number, row in enumerate(run_sweep(cells, settings, file, typed_command()), 1):
        costs, scores = row["decoding"], row["scores"]
        note(
            f"[{number}/{len(cells)}] {row['model']}, {row['decoder']}, temperature {row['temperature']:g}, "
            f"seed {row['seed']}, {row['task']}: {next(iter(scores.values())):.3f}, "
            f"{costs['tokens_per_forward']:.2f} tokens per forward, {costs['tokens_per_second']:.0f} tokens per second"
        )
    print(write_report(out))


@app.command()
def report(folder: Annotated[Path, typer.Argument(help="Folder of sweeps.")] = Path("build/report")) -> None:
    """Write report.md and its figures anew from the sweeps and traces in a folder."""
    need_extra("eval", ("matplotlib",))
    if not folder.is_dir():
        raise ValueError(f"folder {str(folder)!r} does not exist, so it has no sweep")
    from eval.report import find_sweeps, write_report

    if not find_sweeps(folder):
        raise ValueError(f"folder {str(folder)!r} has no sweep, that is no *.jsonl file of one")
    print(write_report(folder))


@app.command()
def trace(
    prompt: Prompt,
    model: Model = None,
    decoder: DecoderSpec = None,
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = 0.0,
    seed: Seed = None,
    dtype: Dtype = None,
    trust_remote_code: TrustRemoteCode = False,
    width: Annotated[int | None, typer.Option(min=20, help="Characters in a line; by default the terminal's.")] = None,
    out: Annotated[Path | None, typer.Option(help="Also write an SVG picture.", metavar="FILE.svg")] = None,
) -> None:
    """Show how one answer came about: a line for each forward, colours for what each has decided."""
    from setflow.lineage import lineage_lines
    from setflow.run import run
    from setflow.text import split_text
    from setflow.trace import trace_lines, trace_svg

    if out is not None and out.suffix.lower() != ".svg":
        raise ValueError(f"out must be a file that ends in .svg, got {str(out)!r}: the picture is SVG")
    prompt = read_prompt(prompt)
    settings = make_settings(max_new_tokens, temperature, seed)
    console = screen()
    opened = open_model(model, decoder, dtype, console, trust_remote_code)
    ids = opened.encode(prompt)
    result = run(opened.model, opened.tokenizer, ids, opened.decoder, settings)
    width = width or (console.width if console.is_terminal else TRACE_WIDTH)
    lines = list(trace_lines(split_text(opened.tokenizer, result.tokens), result.trace, width))
    if result.steered is not None:
        lines += lineage_lines(result.steered, opened.tokenizer, len(ids), width)
    for line in lines:
        console.print(line)
    note(f"{opened.spec}: {len(result.tokens)} tokens in {result.forwards} forwards")
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        title = f"{opened.spec}: {len(result.tokens)} tokens in {result.forwards} forwards"
        out.write_text(trace_svg(title, lines, width), encoding="utf-8")


def _source(model: str | None, dtype: str | None) -> tuple[str, str]:
    """Path or hub name, and dtype in transformers' words."""
    found = find_source(model)
    path = Path(found).expanduser()
    if path.is_relative_to(Path.cwd()):  # what is written down should not name this machine's folders
        path = path.relative_to(Path.cwd())
    weights = parse_dtype(dtype) or ("auto" if found == model else "float32")
    return str(path) if path.exists() else found, str(weights).removeprefix("torch.")


def _name(model: str | None) -> str:
    return "embedded" if model is None else Path(model).name


def _check_settings(
    tasks: str, data: Path | None, limit: float | None, batch_size: str, device: str | None
) -> tuple[list[str], int | float | None]:
    """The names of the tasks, groups taken apart, and the limit. Raises ValueError for what shows without torch."""
    find_data(data)
    if limit is not None:
        check_range("limit", limit, 0, include_low=False)
    if batch_size != "auto":
        check_count("batch_size", int(batch_size) if batch_size.isdigit() else batch_size)
    check_device(device)
    return expand_tasks(tasks.split(",")), int(limit) if limit is not None and limit >= 1 else limit


def _need_lm_eval() -> None:
    need_extra("eval", ("lm_eval", "datasets"))
    # Its warnings repeat what was asked for, or tell of cut prompts, which are counted here.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)


def _refuse_options(context: typer.Context) -> None:
    """Options that stand before the name of a command are not the command's."""
    for name in context.params:
        if context.get_parameter_source(name).name == "COMMANDLINE":
            raise ValueError(
                f"--{name.replace('_', '-')} must stand behind {context.invoked_subcommand!r}, which does not see it here"
            )
