"""Ways to generate, side by side: stock ``model.generate``, its assisted modes, and our decoders."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from decoding import Engine, decoder_from_spec
from eval.devices import clock
from eval.repeatable import repeatable_engine


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
    """A way to generate on ``model``.

    spec: a decoder spec, or "generate" for stock greedy decoding with ``arguments`` of ``generate``. engine: what decoders
    run on; by default one of this contender's own that plans by recorded costs, so that its forwards repeat.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        spec: str,
        name: str | None = None,
        engine: Engine | None = None,
        **arguments: Any,
    ):
        self.model = model
        self.name = name or spec
        self.decoder = None if spec == "generate" else decoder_from_spec(spec)
        self.arguments = arguments
        if self.decoder is not None:
            self.arguments |= {"engine": engine or repeatable_engine(model)}

    def run(self, prompts: list[list[int]], max_new_tokens: int, **settings: Any) -> Sample:
        """Decode a batch of prompts, padded on the left; ``settings`` go to ``generate``."""
        config, device = self.model.generation_config, self.model.device
        ids, mask = pad_left(prompts, config.pad_token_id or 0, device)
        # Stop strings of a generation config need a tokenizer, and nothing is read here.
        settings = {
            "do_sample": False,
            "max_new_tokens": max_new_tokens,
            "stop_strings": None,
            **self.arguments,
            **settings,
        }
        engine = self.arguments.get("engine")
        with _counting(self.model) if engine is None else metered(engine) as meter:
            started = clock(device)
            output = self.model.generate(
                ids, attention_mask=mask, custom_generate=self.decoder, return_dict_in_generate=True, **settings
            )
            seconds = clock(device) - started
        rows = output.sequences[:, ids.shape[1] :].tolist()
        if self.decoder is None:
            new = [until_end(row, config.eos_token_id) for row in rows]
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
    device = model.device  # asked once: the search for it would count as the decoder's time

    def before(*_):
        starts.append(clock(device))

    def after(module, *_):
        meter.seconds += clock(device) - starts.pop()
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


@contextmanager
def metered(engine: Engine) -> Iterator[_Meter]:
    """Count the forwards of ``engine``, and the seconds in them, masks included, and in its head."""
    meter, device = _Meter(), engine.device

    def timed(function, forwards: int):
        def run(*arguments):
            started = clock(device)
            result = function(*arguments)
            meter.seconds += clock(device) - started
            meter.forwards += forwards
            return result

        return run

    vars(engine).update(forward=timed(engine.forward, 1), head=timed(engine.head, 0))
    try:
        yield meter
    finally:
        for name in ("forward", "head"):
            vars(engine).pop(name)


def pad_left(prompts: Sequence[list[int]], pad: int, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask [B, P] of ragged prompts.

    >>> pad_left([[5, 6], [7]], 0)[0].tolist()
    [[5, 6], [0, 7]]
    """
    width = max(map(len, prompts))
    ids = [[pad] * (width - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def until_end(row: list[int], eos_token_id: int | list[int] | None) -> list[int]:
    """The row up to its first EOS, which stays; stock ``generate`` pads behind it.

    >>> until_end([5, 1, 0, 0], [1, 2])
    [5, 1]
    """
    ends = eos_token_id if isinstance(eos_token_id, list) else [eos_token_id]
    stop = next((i + 1 for i, token in enumerate(row) if token in ends), len(row))
    return row[:stop]
