"""Infilling: whole texts of which some tokens are given, on any side of those to be found."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from decoding.engine import Engine
from decoding.inputs.checks import check_range
from dfm.flow_run import FlowRun, make_draws
from dfm.networks import Bidirectional
from dfm.sampling.loop import FlowSample, Posterior, sample


def infill(
    model: PreTrainedModel,
    run: FlowRun,
    input_ids: Tensor,
    fixed: Tensor,
    *,
    attention_mask: Tensor | None = None,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> FlowSample:
    """Fill the positions of ``input_ids`` [B, L] that are not ``fixed`` [B, L] bool, whatever ids they hold.

    attention_mask: [B, L], 0 where a sequence is padded, on any side. temperature 0 takes likeliest tokens. Sequence i
    draws from its own generator, ``seed`` + i. Returns tokens [B, L] and the number of evaluations [B].
    """
    Engine.for_model(model).check()
    check_texts(model, input_ids, fixed, attention_mask)
    check_range("temperature", temperature, 0)
    real = torch.ones_like(fixed) if attention_mask is None else attention_mask.bool()
    frozen = fixed | ~real
    sampler = run.make_sampler(int((~frozen).sum(-1).max()))
    draws = make_draws(
        sampler, [torch.Generator().manual_seed(seed + i) for i in range(len(input_ids))], temperature == 0
    )
    if temperature == 0 and sampler.ranks_positions:
        temperature = 1.0  # the draws take the likeliest token
    network = Bidirectional(model, real, run.traits, run.path.scheduler)
    posterior = Posterior(network, run.path.source, temperature=temperature, top_p=top_p)
    return sample(posterior, sampler, input_ids, frozen, draws)


def check_texts(model: PreTrainedModel, input_ids: Tensor, fixed: Tensor, attention_mask: Tensor | None) -> None:
    """Raise ValueError unless shapes, dtypes and ids are those of texts that the model can fill."""
    shape = tuple(input_ids.shape)
    if input_ids.dim() != 2:
        raise ValueError(f"input_ids must be [B, L], got shape {shape}")
    if fixed.dtype != torch.bool or fixed.shape != input_ids.shape:
        raise ValueError(f"fixed must be bool of shape {shape}, got {fixed.dtype} of shape {tuple(fixed.shape)}")
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise ValueError(f"attention_mask must have shape {shape}, got {tuple(attention_mask.shape)}")
    vocabulary = model.config.vocab_size
    if bool(((input_ids < 0) | (input_ids >= vocabulary))[fixed].any()):
        raise ValueError(f"input_ids must be from 0 to {vocabulary - 1} where they are fixed")
