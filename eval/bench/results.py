"""Results of a benchmark: told as they come, kept in one JSON file, at the end a table and one line of JSON."""

import json
import os
import platform
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from eval.files import SoleWriter, write_whole
from eval.tables import screen_table

NO_TERMINAL = 400  # characters in a line where nobody's window limits them


class Results:
    """The rows of a benchmark, and how they came about; a ``with`` around all of its work.

    Each row is told on standard error and kept in the file as soon as it is there; until the end of the ``with`` the
    file says "unfinished". Then standard output gets a table for people and, as its last line, the file's contents.

    path: where to write. command: what the user typed. Raises ValueError before anything runs if ``path`` holds what
    another command wrote, unless that may be overwritten, and if another run is writing it.
    """

    def __init__(self, path: Path, command: str, overwrite: bool = False):
        self.path, self.rows, self._command = path, [], command
        self._sole = SoleWriter(path)
        if path.exists() and not overwrite and (old := _command_of(path)) != command:
            what = "something else" if old is None else f"the results of `{old}`"
            raise ValueError(
                f"{str(path)!r} holds {what}; give another --name or --out, or --overwrite to replace that"
            )

    def describe(self, model=None, rows: Iterable[dict] = (), **settings: Any) -> None:
        """Say what is measured, before the first row.

        model: None where that is no single model. rows: those of an earlier run that is gone on with. settings: what else
        decides the figures.
        """
        self.rows = list(rows)
        self._head = {"command": self._command, "conditions": conditions(model), "settings": settings}

    def take(self, row: dict[str, Any]) -> dict[str, Any]:
        """Keep a row; returns it."""
        tell(row)
        self.rows.append(row)
        self._write({"unfinished": True})
        return row

    def _write(self, state: dict[str, Any]) -> None:
        write_whole(self.path, json.dumps(self._head | state | {"rows": self.rows}, indent=1) + "\n")

    def __enter__(self) -> "Results":
        self._writing = self._sole.writing()
        self._writing.__enter__()
        return self

    def __exit__(self, error, *others) -> None:
        try:
            if error is None:
                self._write({})
        finally:
            self._writing.__exit__(error, *others)
        if error is None:
            print(f"written to {self.path}", file=sys.stderr)
            Console(width=None if sys.stdout.isatty() else NO_TERMINAL).print(screen_table(self.rows))
            print(json.dumps(self._head | {"rows": self.rows}))


def _command_of(path: Path) -> str | None:
    """What wrote a file of results; None if it is no such file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))["command"]
    except (ValueError, KeyError, TypeError):
        return None


def tell(row: dict[str, Any]) -> None:
    """A row that has come, on standard error."""
    print("  ".join(f"{key}={value}" for key, value in row.items() if value is not None), file=sys.stderr)


@contextmanager
def progress(total: int, title: str = "timing") -> Iterator[Callable[[], None]]:
    """A bar on standard error; gives a function to call after each of ``total`` steps."""
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=total)
        yield lambda: bar.advance(task)


def conditions(model=None) -> dict[str, Any]:
    """What a reader must know to judge a number; None where no model runs."""
    import torch
    import transformers

    on_gpu = model is not None and model.device.type == "cuda"
    of_model = {} if model is None else _of_model(model)
    return {
        "device": torch.cuda.get_device_name()
        if on_gpu
        else f"CPU, {torch.get_num_threads()} threads of {os.cpu_count()}",
        "processor": platform.processor() or platform.machine(),
        **of_model,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def _of_model(model) -> dict[str, Any]:
    return {
        "dtype": str(model.dtype).removeprefix("torch."),
        "parameters": sum(p.numel() for p in model.parameters()),
        "attention": model.config._attn_implementation,
    }
