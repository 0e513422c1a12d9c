"""``setflow serve``: an OpenAI-compatible server; vLLM's, with our decoders in it."""

import os
from typing import Annotated

import typer

from setflow.commands.settings import Model
from setflow.loading import find_source

PASSES_ON = {"allow_extra_args": True, "ignore_unknown_options": True}  # all other options are vLLM's
# On a machine without a GPU vLLM would otherwise compile for a minute, and take most of the memory for its cache.
SMALL = ("--dtype", "float32", "--enforce-eager", "--kv-cache-memory-bytes", "256M")


def serve(
    context: typer.Context,
    model: Model = None,
    decoder: Annotated[
        str | None,
        typer.Option(
            "--decoder",
            metavar="SPEC",
            help="What requests get that ask for none: sbd-lossless:block_size=8, sbd:block_size=16,entropy_bound=0.1, ntp; or "
            "none, which is vLLM's own decoding. By default the one that the model names.",
        ),
    ] = None,
    block_size_limit: Annotated[
        int | None,
        typer.Option("--block-size-limit", min=1, help="The largest block that a request may ask for.", metavar="N"),
    ] = None,
) -> None:
    """Serve a model through vLLM, on this machine's address 127.0.0.1 unless --host says otherwise.

    All options of `vllm serve` may follow, such as --port, --max-model-len or --tensor-parallel-size. Requests choose a decoder
    by "vllm_xargs": {"decoder": "sbd", "entropy_bound": 0.3}.
    """
    source = find_source(model)

    from serving.launch import server_command

    packaged = source != model
    given = {argument.partition("=")[0] for argument in context.args}
    small = [] if not packaged or given & {*SMALL} else [*SMALL]
    name = [] if not packaged or "--served-model-name" in given else ["--served-model-name", model or "embedded"]
    command, environment = server_command(source, decoder, block_size_limit, [*small, *name, *context.args])
    os.execve(command[0], command, environment)  # signals go to the server itself
