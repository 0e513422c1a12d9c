"""``setflow corpus``: the data on which the embedded model is trained."""

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from setflow.commands.settings import note, screen


def corpus(
    folder: Annotated[Path, typer.Argument(help="Where to write; it is made if need be.")],
) -> None:
    """Write the embedded model's training data.

    That is Python source of this machine's standard library, generated additions, and a tokenizer made from both.
    """
    from setflow.corpus import write_corpus

    console = screen()
    with console.status(f"writing {folder}") if console.is_terminal else nullcontext():
        write_corpus(folder)
    for path in sorted(folder.glob("*.jsonl")):
        with path.open("rb") as lines:
            note(f"{path}: {sum(1 for _ in lines):,} texts, {path.stat().st_size / 1e6:.1f} MB")
    note(f"{folder / 'tokenizer'}: the tokenizer")
