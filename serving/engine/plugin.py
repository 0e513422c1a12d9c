"""The entry point of group ``vllm.general_plugins``: vLLM calls it in every process, perhaps more than once."""

from serving.engine.config import FAMILIES, install_hooks


def register() -> None:
    """Make our models known, and the hook that chooses them."""
    from vllm import ModelRegistry

    for architecture in FAMILIES:
        ModelRegistry.register_model(f"Setflow{architecture}", f"serving.engine.models:Setflow{architecture}")
    install_hooks()
