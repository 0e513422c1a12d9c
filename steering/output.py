"""What a steered run gives: the chosen text of each prompt, and all of its particles."""

from dataclasses import dataclass

import torch
from torch import Tensor

from decoding import DecodeOutput
from steering.population import Judgement, Population

__all__ = ["Judgement", "SteeredOutput", "chosen_output"]


@dataclass
class SteeredOutput(DecodeOutput):
    """A DecodeOutput of the chosen particle of each prompt, and what is known of all. B prompts, N particles, T new tokens.

    forwards: [B] forward passes that any particle of the prompt took part in; particle_forwards: [B] the sum over particles.
    target: the distribution of the weighted particles, in words.
    chosen: [B] which particle the text is. particles: [B, N, prompt + T] token ids; particle_tokens: [B, N] new tokens.
    log_weights: [B, N] float64, normalised to sum 1. log_normaliser: [B] float64 estimate of log E[exp(potential)] over
        the decoder's own texts; its exponential is unbiased. -inf where all particles were ruled out.
    rewards: [B, N] float64, before scale; None without a reward. exhausted: [B] whether all particles were ruled out.
    judgements: for each prompt what happened at each look at its particles, among it the effective sample sizes.
    origins: for each prompt and particle, for each new token, the number of the particle that decided it.
    """

    target: str | None = None
    chosen: Tensor | None = None
    particles: Tensor | None = None
    particle_tokens: Tensor | None = None
    particle_forwards: Tensor | None = None
    log_weights: Tensor | None = None
    log_normaliser: Tensor | None = None
    rewards: Tensor | None = None
    exhausted: Tensor | None = None
    judgements: tuple[list[Judgement], ...] | None = None
    origins: tuple[list[list[int]], ...] | None = None


def chosen_output(
    output: DecodeOutput,
    populations: list[Population],
    choices: list[int],
    target: str,
    has_reward: bool,
    with_logprobs: bool,
) -> SteeredOutput:
    """The result for prompts whose particles are the rows of ``output`` [B * N, ...], one prompt after the other.

    choices: the particle of each that is its text.
    """
    assert output.sequences is not None and output.new_tokens is not None and output.trace is not None
    count = len(populations[0].sequences)
    chosen = torch.tensor(choices)
    rows = torch.arange(len(populations)) * count + chosen
    lengths = output.new_tokens[rows]
    spare = int(output.new_tokens.max() - lengths.max())
    forwards = torch.tensor([population.forwards for population in populations])
    weights = torch.stack([population.log_weights for population in populations])
    normaliser = weights.logsumexp(-1) - torch.tensor(count).double().log()
    earlier = torch.tensor([population.log_normaliser for population in populations], dtype=torch.float64)

    def of_chosen(values: tuple[list[int], ...] | None) -> tuple[list[int], ...] | None:
        return None if values is None else tuple(values[row] for row in rows.tolist())

    width = output.sequences.shape[1] - spare
    return SteeredOutput(
        sequences=output.sequences[rows.to(output.sequences.device), :width],
        forwards=forwards,
        tokens_per_forward=lengths / forwards.clamp_min(1),
        prefill_forwards=output.prefill_forwards,
        new_tokens=lengths,
        trace=of_chosen(output.trace),
        logprobs=output.logprobs[rows, : int(lengths.max())] if with_logprobs and output.logprobs is not None else None,
        acceptance_lengths=of_chosen(output.acceptance_lengths),
        revisions=of_chosen(output.revisions),
        past_key_values=output.past_key_values,
        target=target,
        chosen=chosen,
        particles=output.sequences.view(len(populations), count, -1),
        particle_tokens=output.new_tokens.view(len(populations), count),
        particle_forwards=torch.tensor([population.particle_forwards for population in populations]),
        log_weights=weights.log_softmax(-1),
        log_normaliser=earlier + normaliser,
        rewards=torch.tensor([p.rewards for p in populations], dtype=torch.float64) if has_reward else None,
        exhausted=torch.tensor([population.is_exhausted for population in populations]),
        judgements=tuple(population.history for population in populations),
        origins=tuple([population.origins(i) for i in range(count)] for population in populations),
    )
