"""``setflow finetune``: train as a recipe says."""

from importlib.resources import files
from pathlib import Path
from typing import Annotated

import typer

from setflow.commands.settings import need_extra, note


def finetune(
    recipe: Annotated[
        str,
        typer.Argument(help="A YAML file, or the name of a packaged recipe such as embedded-ntp."),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Change the recipe, for instance training.learning_rate=1e-4."),
    ] = None,
) -> None:
    """Train a model as a recipe says.

    Goes on from the last checkpoint of the output folder, if there is one. Writes the model, its tokenizer and
    training.json into the recipe's output folder.
    """
    need_extra("train", ("accelerate", "yaml"))
    import finetune as package
    from setflow.loading import check_source

    chosen = package.load_recipe(find_recipe(recipe), overrides or ())
    if chosen.model is not None:
        check_source(chosen.model)
    report = package.finetune(chosen)
    losses = report["held_out_next_token_loss_nats"]
    for name, loss in losses.items():
        note(f"{name}: {loss:.4f} nats per token, next-token loss on held-out text")
    note(f"{chosen.output}: the model, its tokenizer and training.json")


def find_recipe(name: str) -> Path:
    """The file ``name``, or the packaged recipe of that name."""
    if Path(name).is_file():
        return Path(name)
    packaged = {path.name.removesuffix(".yaml"): path for path in files("finetune").joinpath("recipes").iterdir()}
    if name in packaged:
        return Path(str(packaged[name]))
    raise ValueError(f"recipe {name!r} is no file and no packaged recipe; those are {', '.join(sorted(packaged))}")
