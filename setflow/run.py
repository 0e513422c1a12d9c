"""One prompt through one decoder, with what it took."""

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from decoding.inputs.checks import check_count, check_range
from setflow.text import coloured, split_text

if TYPE_CHECKING:  # settings are checked without them
    from transformers import PreTrainedModel

    from decoding import Decoder, SlotCache
    from setflow.live import LiveView
    from steering import SteeredOutput

DEFAULT_NEW_TOKENS = 256


@dataclass(frozen=True)
class Settings:
    """How to decode. temperature: 0 is greedy. max_new_tokens: None for 256, fewer where the model's context ends."""

    max_new_tokens: int | None = None
    temperature: float = 0.0
    seed: int = 0

    def __post_init__(self):
        check_range("temperature", self.temperature, 0)
        if self.max_new_tokens is not None:
            check_count("max_new_tokens", self.max_new_tokens)

    def room(
        self, model: "PreTrainedModel", prompt_length: int, decoder: "Decoder | None" = None, at_most: bool = False
    ) -> int:
        """How many new tokens a prompt of this length may get from ``decoder``, or from the model's own ``generate``.

        at_most: take ``max_new_tokens`` for the most that is wanted, not for what there must be room for.
        Raises ValueError if they leave the model's context.
        """
        from decoding.forward.rope import context_length, steady_length

        context, steady = context_length(model.config), steady_length(model.config)
        if context is None:
            return self.max_new_tokens or DEFAULT_NEW_TOKENS
        room = context - prompt_length
        if room < 1:
            raise ValueError(
                f"the prompt is too long: it has {prompt_length} tokens, and the model's context is {context} tokens"
            )
        if self.max_new_tokens is not None and not at_most:
            if self.max_new_tokens > room:
                raise ValueError(
                    f"max_new_tokens must be from 1 to {room}, the model's context of {context} tokens less "
                    f"{prompt_length} of the prompt, got {self.max_new_tokens}"
                )
            return self.max_new_tokens
        if decoder is not None and steady is not None:  # what is beyond, it would have to refuse
            room = max(1, min(room, steady - decoder.rows_ahead - prompt_length))
        return min(self.max_new_tokens or DEFAULT_NEW_TOKENS, room)


@dataclass(frozen=True)
class Run:
    """What came of it. trace: the forward that decided each token; None for the model's own ``generate``.

    steered: all particles, where the decoder steers.
    """

    tokens: list[int]
    text: str
    forwards: int
    prefill_forwards: int
    seconds: float
    trace: list[int] | None
    steered: "SteeredOutput | None" = None

    @property
    def tokens_per_forward(self) -> float:
        return len(self.tokens) / max(1, self.forwards)

    @property
    def tokens_per_second(self) -> float:
        return len(self.tokens) / self.seconds

    def coloured(self, tokenizer, prompt: str):
        """Rich text in which tokens of one colour were decided by the same forward."""
        # The live view counts the prefill's forwards too; so do we, and no colour changes at the end.
        forwards = [forward + self.prefill_forwards for forward in self.trace]
        return coloured(prompt, zip(split_text(tokenizer, self.tokens), forwards, strict=True))

    def figures(self) -> dict[str, float]:
        return {
            "tokens": len(self.tokens),
            "forwards": self.forwards,
            "prefill_forwards": self.prefill_forwards,
            "tokens_per_forward": round(self.tokens_per_forward, 3),
            "seconds": round(self.seconds, 4),
            "tokens_per_second": round(self.tokens_per_second, 1),
        }


def run(
    model: "PreTrainedModel",
    tokenizer,
    prompt: list[int],
    decoder: "Decoder | None",
    settings: Settings,
    view: "LiveView | None" = None,
    cache: "SlotCache | None" = None,
) -> Run:
    """Continue the tokens ``prompt`` with ``decoder``, or with the model's own ``generate`` where it is None."""
    import torch

    from decoding.forward.loading import one_sentence
    from eval.repeatable import repeatable_engine

    rows = model.get_input_embeddings().weight.shape[0]
    if max(prompt, default=0) >= rows:
        raise ValueError(f"the tokenizer does not fit the model: it gives token {max(prompt)}, the model has {rows}")
    arguments = {"do_sample": False}
    if settings.temperature > 0:
        arguments = {"do_sample": True, "temperature": settings.temperature}
        if decoder is not None:  # measured costs would let the load of the machine decide what a seed draws
            arguments["engine"] = repeatable_engine(model)
    if model.generation_config.pad_token_id is None:
        arguments["pad_token_id"] = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    if (model.generation_config.num_beams or 1) > 1:
        view = None  # stock generate has no beams and a streamer at once, and a decoder says that it has no beams
    for name, value in (("streamer", view), ("past_key_values", cache), ("custom_generate", decoder)):
        if value is not None:
            arguments[name] = value
    ids = torch.tensor([prompt], device=model.device)
    room = settings.room(model, len(prompt), decoder)
    torch.manual_seed(settings.seed)
    started = time.perf_counter()
    with one_sentence(f"model {model.name_or_path!r}", "run", keep=(ValueError,)):  # what its files say may be absurd
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=room,
            return_dict_in_generate=True,
            tokenizer=tokenizer,  # for stop strings, which a generation config may have
            **arguments,
        )
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    tokens = output.sequences[0, len(prompt) :].tolist()
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    if decoder is None:
        return Run(tokens, text, len(tokens), 0, seconds, None)
    steered = output if hasattr(output, "log_weights") else None
    return Run(tokens, text, int(output.forwards[0]), output.prefill_forwards, seconds, list(output.trace[0]), steered)
