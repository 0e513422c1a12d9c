"""What a request cannot have is refused when it arrives, in one sentence: over HTTP with status 400.

vLLM asks the logits processors of a model about the parameters of each request, in whatever process receives it. Of ours
there is nothing but this question. vLLM asks classes, by their names, so the name holds the server's settings.
"""

import json
from functools import cache
from typing import Any

from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor

from serving.engine.settings import Settings
from serving.options import DecoderOptions

# Of SamplingParams: the field, and the value that asks for nothing.
NEEDS_TEXT = {"presence_penalty": 0.0, "frequency_penalty": 0.0, "repetition_penalty": 1.0}


class RequestCheck(LogitsProcessor):
    """Checks parameters and changes no logits."""

    settings: Settings

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        check_request(cls.settings.options(sampling_params.extra_args), sampling_params)

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        return False

    def apply(self, logits: Any, ctx: Any) -> Any:
        return logits


class _Checks:
    """Classes by attribute: ``checks.x<settings as JSON, in hexadecimal>``."""

    def __getattr__(self, name: str) -> type[RequestCheck]:
        try:
            settings = Settings(**json.loads(bytes.fromhex(name.removeprefix("x"))))
        except (ValueError, TypeError):
            raise AttributeError(name) from None
        return _check_for(settings)


checks = _Checks()


@cache
def _check_for(settings: Settings) -> type[RequestCheck]:
    return type("RequestCheck", (RequestCheck,), {"settings": settings})


def name_of_check(settings: Settings) -> str:
    """How vLLM finds the class for these settings, "module:attribute"."""
    return f"{__name__}:checks.x{json.dumps(settings.to_dict()).encode().hex()}"


def check_request(options: DecoderOptions, params: Any) -> None:
    """Raise ValueError for parameters that a decoder cannot honour."""
    if params.structured_outputs is not None:
        raise ValueError(
            f"structured outputs (response_format, guided decoding) cannot be honoured with decoder {options.kind}; serve the "
            f"model with --decoder none"
        )
    if options.kind != "sbd":
        return
    asked = [name for name, neutral in NEEDS_TEXT.items() if getattr(params, name) != neutral]
    asked += ["bad_words"] if params.bad_words else []
    asked += ["thinking_token_budget"] if params.thinking_token_budget is not None else []
    if asked:
        raise ValueError(
            f"{' and '.join(asked)} cannot be honoured with decoder sbd, where the text to the left may be undecided; "
            f"decoders sbd-lossless and ntp can"
        )
    if params.logprobs is not None:
        raise ValueError(
            "logprobs cannot be had with decoder sbd, which computes no next-token distributions; decoders sbd-lossless and "
            "ntp do"
        )
