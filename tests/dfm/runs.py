"""Runs of FlowDecoder, with seeds, for tests."""

import torch

from dfm import FlowDecoder
from dfm.samplers import SAMPLERS


def flow(sampler: str, steps: int | None = 5, **settings) -> FlowDecoder:
    return FlowDecoder(sampler=sampler, steps=steps if SAMPLERS[sampler].on_grid else None, **settings)


def generate(model, inputs, decoder, count: int, do_sample: bool, seed: int = 3):
    torch.manual_seed(seed)
    arguments = {"do_sample": True, "top_k": 0} if do_sample else {"do_sample": False}
    return model.generate(
        **inputs, max_new_tokens=count, custom_generate=decoder, return_dict_in_generate=True, **arguments
    )


def first_seed(seed: int = 3) -> int:
    """The seed that ``generate`` gives to the first sequence after torch.manual_seed(seed)."""
    torch.manual_seed(seed)
    return int(torch.randint(2**62, ()))
