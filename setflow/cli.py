"""The command line: one file in ``setflow/commands`` for each command, put together here.

Commands raise ValueError (or OSError) for what the user got wrong; here it becomes one sentence and exit code 2.
"""

import os
import sys
import warnings
from collections.abc import Sequence

import typer

import setflow
from setflow.commands import bench, chat, corpus, estimate, eval, fetch, finetune, generate, serve
from setflow.commands.settings import typed
from setflow.text import visible

app = typer.Typer(
    name="setflow",
    help="Decode several tokens per forward pass with Llama- and Qwen-type models.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.command("generate")(generate.generate)
app.command("chat")(chat.chat)
app.add_typer(bench.app, name="bench")
app.add_typer(estimate.app, name="estimate")
app.add_typer(eval.app, name="eval")
app.command("corpus")(corpus.corpus)
app.command("fetch")(fetch.fetch)
app.command("prompts")(fetch.prompts)
app.add_typer(finetune.app, name="finetune")
app.command("serve", context_settings=serve.PASSES_ON)(serve.serve)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"setflow {setflow.__version__}")
        raise typer.Exit()


@app.callback()
def options(
    version: bool = typer.Option(
        False, "--version", help="Print the version and exit.", callback=_print_version, is_eager=True
    ),
) -> None:
    """Decode several tokens per forward pass with Llama- and Qwen-type models."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return run(app, "setflow", arguments)


def run(command: typer.Typer, program: str, arguments: Sequence[str] | None = None) -> int:
    """Run a command that is started as ``program``: 0 when it ends, 2 for a user's mistake, 130 for Ctrl-C."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if os.getcwd() not in sys.path:  # where a user's module:Name is; last, so that it hides nothing
        sys.path.append(os.getcwd())
    with warnings.catch_warnings(), typed(program, arguments):
        for category in (DeprecationWarning, FutureWarning):  # about code, not about what the user asked for
            warnings.simplefilter("ignore", category)
        warnings.showwarning = _show_warning
        try:
            command(args=arguments, prog_name=program)
        except SystemExit as end:
            return end.code if isinstance(end.code, int) else int(end.code is not None)
        except KeyboardInterrupt:
            return 130
        except BrokenPipeError:  # the reader went away, as in `setflow generate ... | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        except (ValueError, OSError) as error:
            print(f"error: {_sentence(error)}", file=sys.stderr)
            return 2
    return 0


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename:
        return visible(f"{error.strerror}: {error.filename}")
    return visible(" ".join(str(error).split()))


def _show_warning(message, category, filename, lineno, file=None, line=None) -> None:
    print(f"warning: {visible(' '.join(str(message).split()))}", file=sys.stderr)
