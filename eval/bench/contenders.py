"""Ways to generate, side by side: stock ``model.generate``, its assisted modes, and our decoders."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from decoding import decoder_from_spec


@dataclass
class Sample:
    """One call: new tokens of each row, forwards of the target model, seconds in all and inside the model.

    ``changes`` counts the tokens that were replaced after they had been chosen.
    """

    new_tokens: list[list[int]]
    forwards: int
    seconds: float
    model_seconds: float
    acceptance_lengths: list[int]
    changes: int = 0

    @property
    def tokens(self) -> int:
        return sum(map(len, self.new_tokens))


class Contender:
    """``spec`` is a decoder spec, or "generate" for stock greedy decoding with ``arguments`` of ``generate``."""

    def __init__(self, model: PreTrainedModel, spec: str, name: str | None = None, **arguments: Any):
        self.model = model
        self.name = name or spec
        self.decoder = None if spec == "generate" else decoder_from_spec(spec)
        self.arguments = arguments

    def run(self, prompts: list[list[int]], max_new_tokens: int, **settings: Any) -> Sample:
        """Decode a batch of prompts, padded on the left; ``settings`` go to ``generate``."""
        width = max(map(len, prompts))
        pad = self.model.generation_config.pad_token_id or 0
        ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=self.model.device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=self.model.device)
        settings = {"do_sample": False, "max_new_tokens": max_new_tokens, **self.arguments, **settings}
        with _counting(self.model) as meter:
            started = time.perf_counter()
            output = self.model.generate(
                ids, attention_mask=mask, custom_generate=self.decoder, return_dict_in_generate=True, **settings
            )
            _synchronize(self.model)
            seconds = time.perf_counter() - started
        rows = output.sequences[:, width:].tolist()
        if self.decoder is None:
            new = [_until_end(row, self.model.generation_config) for row in rows]
            return Sample(new, meter.forwards, seconds, meter.seconds, [])
        new = [row[:count] for row, count in zip(rows, output.new_tokens.tolist(), strict=True)]
        accepted = [length for lengths in output.acceptance_lengths or () for length in lengths]
        changes = sum(map(sum, output.revisions or ()))
        return Sample(new, int(output.forwards.sum()), seconds, meter.seconds, accepted, changes)


@dataclass
class _Meter:
    forwards: int = 0
    seconds: float = 0.0


@contextmanager
def _counting(model: PreTrainedModel) -> Iterator[_Meter]:
    """Count the forwards of the target model's trunk, and the seconds in trunk and head."""
    meter, starts = _Meter(), []

    def before(*_):
        starts.append(time.perf_counter())

    def after(module, *_):
        _synchronize(model)
        meter.seconds += time.perf_counter() - starts.pop()
        meter.forwards += module is trunk

    trunk, head = model.get_decoder(), model.get_output_embeddings()
    hooks = [
        f
        for module in (trunk, head)
        for f in (module.register_forward_pre_hook(before), module.register_forward_hook(after))
    ]
    try:
        yield meter
    finally:
        for hook in hooks:
            hook.remove()


def _synchronize(model: PreTrainedModel) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize()


def _until_end(row: list[int], config) -> list[int]:
    """The row up to its first EOS; stock ``generate`` pads behind it."""
    ends = config.eos_token_id
    ends = set() if ends is None else {ends} if isinstance(ends, int) else set(ends)
    stop = next((i + 1 for i, token in enumerate(row) if token in ends), len(row))
    return row[:stop]
