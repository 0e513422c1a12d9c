"""The entry point of group ``vllm.general_plugins``: vLLM calls it in every process, perhaps more than once."""

import os
import threading
import time

from serving.engine.config import FAMILIES, install_hooks

SERVER = "SETFLOW_SERVER"  # in the environment: the process of `setflow serve`


def register() -> None:
    """Make our models known, and the hook that chooses them."""
    from vllm import ModelRegistry

    for architecture in FAMILIES:
        ModelRegistry.register_model(f"Setflow{architecture}", f"serving.engine.models:Setflow{architecture}")
    install_hooks()
    follow_server()


def follow_server() -> None:
    """End this process when the server that started it is gone, even killed: else it would keep its memory for nobody.

    vLLM's engine waits for requests and does not see that nobody can send any.
    """
    parent = os.getppid()
    watched = any(thread.name == SERVER for thread in threading.enumerate())
    if os.environ.get(SERVER) == str(parent) and not watched:
        threading.Thread(target=_outlive, args=(parent,), name=SERVER, daemon=True).start()


def _outlive(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
