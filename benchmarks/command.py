"""What the commands of this package share: options, and how a module becomes a command."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import typer

from setflow.cli import run
from setflow.commands.settings import typed_command

Judge = Annotated[str | None, typer.Option(help="Next-token model that judges samples; the embedded model by default.")]
Out = Annotated[Path, typer.Option("--out", help="Folder for the results.")]
OUT = Path("build/bench")


def program(name: str) -> str:
    """How the command in ``benchmarks/NAME`` (with dots) is started."""
    return f"python -m benchmarks.{name}"


def typed(name: str) -> str:
    """What the user typed to start it, for files that say how they were made."""
    return typed_command(program(name))


def main(command: Callable, name: str, arguments: Sequence[str] | None = None) -> int:
    """Run the function ``command`` as a command line; returns the exit code, as setflow's does."""
    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    app.command()(command)
    return run(app, program(name), arguments)
