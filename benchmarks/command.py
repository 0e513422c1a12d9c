"""What the commands of this package share: options, and how a module becomes a command."""

from collections.abc import Callable, Sequence
from typing import Annotated

import typer

from setflow.cli import run
from setflow.commands.bench import OUT, Name, Out, Overwrite, results_in

__all__ = ["OUT", "Judge", "Name", "Out", "Overwrite", "main", "results_in"]

Judge = Annotated[str | None, typer.Option(help="Next-token model that judges samples; the embedded model by default.")]


def main(command: Callable, name: str, arguments: Sequence[str] | None = None) -> int:
    """Run the function ``command`` as ``python -m benchmarks.NAME``; returns the exit code, as setflow's does."""
    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    app.command()(command)
    return run(app, f"python -m benchmarks.{name}", arguments)
