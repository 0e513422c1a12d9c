"""Serve models through vLLM: the decoders of this project inside a real engine, with its server, batching and paged cache.

llm = serving.load(FOLDER, max_model_len=2048)                 # a vllm.LLM
setflow serve --model FOLDER [any option of vllm serve]        # an OpenAI-compatible server
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from serving.launch import load as load

__all__ = ["load"]


def __getattr__(name: str) -> Any:
    if name != "load":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from serving.launch import load

    return load
