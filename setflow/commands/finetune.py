"""``setflow finetune``: train as a recipe says, estimate what that costs, and make the data for it."""

from importlib.resources import files
from pathlib import Path
from typing import Annotated

import typer
from typer.core import TyperGroup

from decoding.inputs.source import check_source
from setflow.commands.settings import need_extra, note, screen

TRAIN = ("accelerate", "yaml", "datasets", "peft")


class RecipeFirst(TyperGroup):
    """``setflow finetune RECIPE ...``: what is no command is a recipe."""

    def parse_args(self, ctx, args):
        if args and args[0] not in (*self.commands, "--help"):
            args = ["recipe", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=RecipeFirst,
    help="setflow finetune RECIPE [KEY=VALUE ...] trains as the recipe says; see `setflow finetune recipe --help`.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@app.command()
def recipe(
    recipe: Annotated[
        str,
        typer.Argument(help="A YAML file, or the name of a packaged recipe such as llama3.1-8b-gated."),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Change the recipe, for instance training.learning_rate=1e-4."),
    ] = None,
    estimate: Annotated[
        bool, typer.Option("--estimate", help="Train nothing: say what memory and how many hours it takes on a GPU.")
    ] = False,
    gpu: Annotated[str, typer.Option(help="For --estimate: a100, h100 or h200.")] = "h100",
    gpus: Annotated[int, typer.Option(metavar="N", help="For --estimate.")] = 1,
    mfu: Annotated[
        float, typer.Option(help="For --estimate: the share of its peak arithmetic that the GPU does.")
    ] = 0.4,
) -> None:
    """Train a model as a recipe says; the word "recipe" may be left out.

    Goes on from the last checkpoint of the output folder, if there is one. Writes the model or its adapter, the
    tokenizer, training.json and a model card into the recipe's output folder.
    """
    need_extra("train", TRAIN)
    from finetune.recipe_file import check_sources, read_recipe

    # What is mistyped is answered before torch is imported.
    values = read_recipe(recipe, overrides or ())
    if not estimate:
        check_sources(values.get("model"), values.get("tokenizer"), str(values.get("output", "")))
    import finetune as package

    chosen = package.load_recipe(recipe, overrides or ())
    if estimate:
        from finetune.estimate import Estimate

        print("\n".join(Estimate(chosen, gpu, gpus, mfu).lines()))
        return
    try:
        report = package.finetune(chosen)
    except KeyboardInterrupt as stop:
        note(str(stop) or "stopped")
        raise
    losses = report.held_out_next_token_loss_nats
    for name, loss in losses.items():
        note(f"{name}: {loss:.4f} nats per token, next-token loss on held-out text")
    for key, speed in report.measured.items():
        if key.startswith("tokens_per_forward/"):
            note(f"{key.partition('/')[2]}: {speed:.2f} tokens per forward on held-out prompts")
    note(f"{chosen.output}: what was trained, its tokenizer, training.json and a model card")


@app.command("list")
def list_recipes() -> None:
    """List the packaged recipes, with what each does."""
    need_extra("train", TRAIN)
    from rich.table import Table

    from finetune.recipe_file import packaged_recipes

    table = Table(box=None, show_header=False, pad_edge=False)
    for name, text in packaged_recipes().items():
        table.add_row(name, text)
    screen().print(table, soft_wrap=False)


@app.command()
def show(
    recipe: Annotated[str, typer.Argument(help="A YAML file, or the name of a packaged recipe.")],
) -> None:
    """Print a recipe, as the beginning of one of your own: setflow finetune show RECIPE > my.yaml."""
    need_extra("train", TRAIN)
    from finetune.recipe_file import find_recipe

    print(find_recipe(recipe).read_text(encoding="utf-8"), end="")


@app.command("distill-data")
def distill_data(
    model: Annotated[str, typer.Argument(help="Folder or hub name of the model whose text it is to be.")],
    output: Annotated[str, typer.Argument(help="The JSONL file to write; one that is there is continued.")],
    prompts: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="JSONL with 'messages', 'prompt' or 'text'; by default whole texts are sampled."
        ),
    ] = None,
    samples: Annotated[int, typer.Option(metavar="N", min=1, help="Number of texts.")] = 1000,
    prompt_tokens: Annotated[
        int, typer.Option(metavar="N", min=1, help="What is taken of a 'text' as its prompt.")
    ] = 16,
    max_new_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Of each text.")] = 256,
    temperature: Annotated[
        float, typer.Option(metavar="T", min=0.0, help="1 is the model's own distribution, 0 is greedy.")
    ] = 1.0,
    batch_size: Annotated[int, typer.Option(metavar="N", min=1, help="Texts that are sampled at once.")] = 32,
    seed: Annotated[int, typer.Option(metavar="S")] = 0,
    dtype: Annotated[
        str | None, typer.Option(metavar="bf16|fp32", help="By default bf16 where the machine is quicker at it.")
    ] = None,
) -> None:
    """Write a model's own texts as training data, so that its next-token mode does not move while it learns to draft.

    Uses vLLM where it is installed. Stop it at any time: the same command goes on from the last whole text.
    """
    need_extra("train", TRAIN)
    check_source(model)
    if prompts is not None and not Path(prompts).is_file():
        raise ValueError(f"prompts: the file {prompts!r} does not exist")
    import transformers
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from finetune.distill import Distillation, distill

    settings = Distillation(
        model, output, prompts, samples, prompt_tokens, max_new_tokens, temperature, batch_size, seed, dtype
    )
    transformers.logging.disable_progress_bar()
    columns = (TextColumn("texts"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("texts", total=samples)
        done = distill(settings, advance=lambda count: progress.advance(task, count))
    note(f"{output}: {samples} texts, {min(done, samples)} of them from before")


@app.command("fit-sampler")
def fit_sampler(
    model: Annotated[str, typer.Argument(help="Folder or hub name of a flow model of whole texts.")],
    output: Annotated[str, typer.Argument(help="The JSON file to write; decoders take it as dfm:sampler=FILE.")],
    texts: Annotated[
        str, typer.Option(metavar="FILE", help="JSONL with 'text', 'prompt' or 'messages' that it was not trained on.")
    ],
    steps: Annotated[int, typer.Option(metavar="K", min=1, help="Steps of the sampler.")] = 8,
    prompt_tokens: Annotated[
        int, typer.Option(metavar="N", min=1, help="What is taken of a 'text' as its prompt.")
    ] = 16,
    new_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Behind each prompt.")] = 64,
    count: Annotated[int, typer.Option(metavar="N", min=2, help="Prompts; half of them compare start and fit.")] = 32,
    share: Annotated[float, typer.Option(min=0.0, max=1.0, help="Correction with which every step begins.")] = 0.0,
    iterations: Annotated[int, typer.Option(metavar="N", min=1)] = 30,
    batch: Annotated[int, typer.Option(metavar="N", min=1, help="Prompts in an iteration.")] = 8,
    samples: Annotated[int, typer.Option(metavar="N", min=2, help="Texts of each prompt in an iteration.")] = 4,
    many_steps: Annotated[int, typer.Option(metavar="N", min=1, help="Steps of what is aimed at.")] = 64,
    seed: Annotated[int, typer.Option(metavar="S")] = 0,
) -> None:
    """Fit times, temperatures and corrections of a few-step sampler to what a model says in many steps.

    The model stays as it is. The result is never worse than even steps on prompts that the fit has not seen.
    """
    need_extra("train", TRAIN)
    check_source(model)
    if not Path(texts).is_file():
        raise ValueError(f"texts: the file {texts!r} does not exist")
    import transformers
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from dfm.fitting import Fit
    from finetune.fit_sampler import SamplerFit, fit_to_model

    fit = Fit(iterations, samples, batch, many_steps, seed=seed)
    settings = SamplerFit(model, texts, output, steps, prompt_tokens, new_tokens, count, share, fit)
    transformers.logging.disable_progress_bar()
    columns = (TextColumn("fit"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("fit", total=settings.parts)
        found = fit_to_model(settings, advance=lambda what: progress.advance(task))
    note(f"{output}: distance to {many_steps} steps on held-out prompts {found.start:.4f} -> {found.fitted:.4f}")


@app.command("accelerate-config")
def accelerate_config(
    name: Annotated[str, typer.Argument(help="one_gpu, ddp, fsdp2 or zero3.")],
) -> None:
    """Print the path of a configuration for several GPUs.

    accelerate launch --config_file $(setflow finetune accelerate-config fsdp2) -m finetune RECIPE
    """
    packaged = {path.name.removesuffix(".yaml"): path for path in files("finetune").joinpath("accelerate").iterdir()}
    if name not in packaged:
        raise ValueError(f"accelerate-config must be one of {', '.join(sorted(packaged))}, got {name!r}")
    print(packaged[name])
