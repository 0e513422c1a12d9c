"""One run of particles, or of a plain batch of as many sequences; alone in a process, its peak of memory."""

import json
import sys
import time
from typing import Any

import torch

from decoding import Decoder, decoder_from_spec
from eval.bench.memory import process_memory, start_counting
from eval.bench.prompts import worked_additions
from eval.repeatable import repeatable_engine
from setflow.loading import load_model
from steering import SteeredDecoder


def random_ids(completion_ids: list[list[int]], finished: list[bool]) -> list[float]:
    """A reward that differs from particle to particle, so that every judgement resamples."""
    return [float(sum(ids) % 7) for ids in completion_ids]


def run_once(
    model, prompt: list[int], decoder: Decoder, copies: int, new_tokens: int, seed: int = 0
) -> tuple[Any, float]:
    """The output for ``copies`` of a prompt, and seconds."""
    ids = torch.tensor([prompt] * copies)
    torch.manual_seed(seed)
    started = time.perf_counter()
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=True,
        temperature=2.0,  # so that particles differ
        top_k=0,
        max_new_tokens=new_tokens,
        custom_generate=decoder,
        engine=repeatable_engine(model),
        return_dict_in_generate=True,
    )
    return output, time.perf_counter() - started


def peak_of_one_run(who: str, spec: str, particles: int, new_tokens: int) -> int:
    """Bytes of one run above the idle process, after a short one that loads what is loaded late."""
    model, tokenizer = load_model(None, torch.float32)
    model.generation_config.eos_token_id = None
    prompt, decoder, copies = worked_additions(tokenizer, 1).ids[0], decoder_from_spec(spec), particles
    if who == "steered":
        decoder, copies = SteeredDecoder(decoder, random_ids, particles, ess_threshold=1.0), 1
    run_once(model, prompt, decoder, copies, 8)
    idle = start_counting("cpu")
    run_once(model, prompt, decoder, copies, new_tokens)
    return process_memory("VmHWM") - idle


if __name__ == "__main__":
    print(json.dumps(peak_of_one_run(*sys.argv[1:3], *map(int, sys.argv[3:]))))
