"""Particles around a decoder: it proposes, weights say what its texts are worth, and resampling gives room to the better.

Every particle is a sequence of the batch; the decoder within does not know of the others. Every so many tokens particles
wait for each other and are judged; those with little weight become copies of others, keys and values and all. What is
judged are exactly the first t new tokens, however many a decoder has committed beyond, so over a lossless decoder the
weighted particles are those that next-token decoding would have.

Sources: SMC steering of language models (arXiv 2306.03081), Feynman-Kac steering (2501.06848), Power-SMC (2602.10273).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from decoding import Batch, DecodeOutput, Decoder, Engine, LogitsPipeline, NextTokenDecoder, RowList, Sequence, Step
from decoding.decoder import Resampling
from decoding.inputs.checks import check_choice, check_count, check_range
from steering.classifier import ClassifierReward
from steering.output import chosen_output
from steering.population import Population, Target
from steering.rewards import Reward, find_reward

EVERY = 16  # tokens between two judgements around a decoder without blocks


@dataclass(frozen=True)
class SteeredDecoder(Decoder):
    """``particles`` texts for each prompt by ``decoder``, weighted and resampled towards a target; one of them is the text.

    The target is q(x) exp(scale * reward(x)), with q what the decoder samples from; or, with ``alpha``, p(x)^alpha exp(scale
    * reward(x)), with p the model's own next-token distribution, at temperature 1 and before any processor, whatever
    temperature ``generate`` is asked to propose with (best is 1 / alpha; what top_k and the like exclude stays excluded).
    Around a lossless decoder, q is the next-token distribution as ``generate`` processes it, and the weighted particles
    have the target exactly as N grows. Around any other, q is the distribution of that decoder's texts: the output's
    ``target`` says which. alpha needs a lossless decoder, which has both log-probabilities anyway.

    reward: a function (:mod:`steering.rewards` says what it is asked), "module:function", or the name of a reward model or
        "name#label" of a classifier. One that has the parameter ``finished`` steers on the way, others judge finished texts.
    particles: N, sequences in the batch for each prompt. With 1 the text is the decoder's own, token for token.
    every: new tokens between two judgements; by default a block of the decoder, or 16.
    ess_threshold: resample where the effective sample size is below this share of N; 0 never does.
    ramp: new tokens over which reward and alpha come to count in full, linearly; finished texts always count in full.
    select: the text is a particle drawn by "weight", a sample of the target, or the "best" one, with the largest reward, or
        where there is none with the largest p(x).
    seed: of resampling; by default it follows torch.manual_seed, as all else that is drawn.
    """

    decoder: Decoder = field(default_factory=NextTokenDecoder)
    reward: str | Callable[..., Any] | None = None
    particles: int = 8
    alpha: float | None = None
    scale: float = 1.0
    every: int | None = None
    ess_threshold: float = 0.5
    ramp: int = 0
    select: Literal["weight", "best"] = "weight"
    seed: int | None = None

    def __post_init__(self) -> None:
        check_count("particles", self.particles)
        check_range("scale", self.scale, 0, float("inf"), include_low=False, include_high=False)
        check_range("ess_threshold", self.ess_threshold, 0, 1)
        check_count("ramp", self.ramp, 0)
        check_choice("select", self.select, ("weight", "best"))
        if self.alpha is not None:
            check_range("alpha", self.alpha, 0, float("inf"), include_low=False, include_high=False)
        if self.every is not None:
            check_count("every", self.every)
        if self.seed is not None:
            check_count("seed", self.seed, 0)
        if not isinstance(self.decoder, Decoder) or isinstance(self.decoder, SteeredDecoder):
            raise ValueError(f"decoder must be a Decoder that is not steered itself, got {self.decoder!r}")
        name = type(self.decoder).__name__
        if self.reward is None and self.alpha is None:
            raise ValueError("reward must be given, or alpha, else there is nothing to steer by")
        if self.alpha is not None and not self.decoder.is_lossless:
            raise ValueError(
                f"alpha needs a decoder that samples the next-token distribution, such as NextTokenDecoder or "
                f"SelfSpeculativeDecoder, got alpha={self.alpha!r} and {name}"
            )
        if self._judges_on_the_way and not self.decoder.can_fork:
            raise ValueError(
                f"reward judges unfinished texts, but {name} with these settings finishes a text all at once: give it a "
                f"block_size, or a reward without the parameter 'finished'"
            )

    @property
    def block_size(self) -> int | None:
        return getattr(self.decoder, "block_size", None)

    @property
    def mask_token_id(self) -> int | None:  # type: ignore[override]
        return self.decoder.mask_token_id

    @property
    def needs_mask_token(self) -> bool:
        return self.decoder.needs_mask_token

    @property
    def gives_logprobs(self) -> bool:
        return self.decoder.gives_logprobs

    @property
    def prefills(self) -> bool:
        return self.decoder.prefills

    @property
    def rows_ahead(self) -> int:
        return self.decoder.rows_ahead

    @property
    def target(self) -> str:
        """What distribution the weighted particles have, in words."""
        inner = type(self.decoder).__name__
        if self.alpha is not None:
            base = f"p(x)^{self.alpha:g}, p the model's next-token distribution: exact as particles grow"
        elif self.decoder.is_lossless:
            base = "q(x), q the next-token distribution as generate processes it: exact as particles grow"
        else:
            base = f"q(x), q the distribution of {inner}'s own texts, which is not the model's next-token distribution"
        scale = "" if self.scale == 1 else f"{self.scale:g} "
        return base if self.reward is None else f"exp({scale}reward(x)) {base}"

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        *,
        engine: Engine | None = None,
        output_logprobs: bool = False,
        **prepared: Any,
    ) -> Tensor | DecodeOutput:
        """A Decoder's, once the reward is known to have what it asks for."""
        reward = self._reward
        if reward is not None:
            reward.check_tokenizer(prepared.get("tokenizer"))
            if isinstance(reward.function, ClassifierReward):
                reward.function.check()
        return super().__call__(model, input_ids, engine=engine, output_logprobs=output_logprobs, **prepared)

    def check(self, model: PreTrainedModel, pipeline: LogitsPipeline) -> None:
        self.decoder.check(model, pipeline)
        if self.particles > 1:
            if not pipeline.do_sample:
                raise ValueError(
                    f"particles must be 1 where nothing is sampled, else all are the same text: set do_sample=True or a "
                    f"temperature above 0, got particles={self.particles}"
                )
            pipeline.check_stateless(type(self).__name__, model.config.get_text_config().vocab_size)

    def begin(self, batch: Batch, engine: Engine) -> None:
        asked_for_logprobs = batch.wants_logprobs
        if self.alpha is not None:
            batch.wants_logprobs = batch.wants_sampled_logprobs = True
        self.decoder.begin(batch, engine)
        reward, count = self._reward, self.particles
        on_the_way = self._judges_on_the_way and count > 1  # one particle can only go on
        populations = [
            Population(
                sequences=batch.sequences[start : start + count],
                target=Target(self.alpha, self.scale, self.ramp),
                every=(self.every or self.block_size or EVERY) if on_the_way else None,
                ess_threshold=self.ess_threshold,
                generator=self._generator(batch, start),
                cuts_back=reward is not None and reward.judges_prefixes and on_the_way,
                truncates=self.decoder.is_lossless,
            )
            for start in range(0, len(batch.sequences), count)
        ]
        batch.around = Steering(populations, reward, batch.tokenizer, asked_for_logprobs)

    def plan(self, batch: Batch) -> list[RowList]:
        return self.decoder.plan(batch)

    def absorb(self, batch: Batch, step: Step) -> None:
        for population in batch.around.populations:
            population.count_forward()
        self.decoder.absorb(batch, step)

    def resample(self, batch: Batch, engine: Engine) -> Resampling | None:
        steering: Steering = batch.around
        ancestors = list(range(len(batch.sequences)))
        shared = None
        self._let_wait(steering)
        while ready := [population for population in steering.populations if population.is_ready]:
            for population, rewards in zip(ready, steering.judge(ready), strict=True):
                own = population.weigh(rewards)
                first = population.sequences[0].index
                before = ancestors[first : first + self.particles]
                for place, ancestor in enumerate(own or ()):
                    if place != ancestor:
                        old = population.sequences[place]
                        tokens, cached = old.tokens, old.cached
                        copy = population.copy(place, ancestor)
                        common = min(_common_prefix(tokens, copy.tokens), cached)
                        shared = common if shared is None else min(shared, common)
                        ancestors[first + place] = before[ancestor]
                        if not copy.finished:
                            self.decoder.fork(batch, copy, population.sequences[ancestor], engine)
            self._let_wait(steering)
        return None if shared is None else Resampling(ancestors, shared)

    def settled(self, batch: Batch) -> list[int]:
        if self.particles == 1:
            return self.decoder.settled(batch)
        population: Population = batch.around.populations[0]
        texts = [sequence.new_tokens[: population.judged] for sequence in population.sequences]
        return texts[0][: min(_common_prefix(texts[0], text) for text in texts)]

    def preview(self, batch: Batch) -> list[int] | None:
        return self.decoder.preview(batch) if self.particles == 1 else None

    def finish(self, batch: Batch, output: DecodeOutput) -> DecodeOutput:
        steering: Steering = batch.around
        has_reward = self.reward is not None
        chosen = [self._choose(population) for population in steering.populations]
        return chosen_output(output, steering.populations, chosen, self.target, has_reward, steering.asked_for_logprobs)

    def _choose(self, population: Population) -> int:
        if self.select == "weight":
            return population.draw()
        of_model = [math.fsum(sequence.logprobs) for sequence in population.sequences]
        values = of_model if self.reward is None else population.rewards
        return max(range(self.particles), key=values.__getitem__)

    def _generator(self, batch: Batch, first: int) -> torch.Generator:
        """The random numbers of resampling for the prompt whose first particle is sequence ``first``."""
        of_particles = batch.sequences[first].generator.initial_seed()
        return torch.Generator().manual_seed(of_particles + 2**62 if self.seed is None else self.seed + first)

    @property
    def _reward(self) -> Reward | None:
        return None if self.reward is None else find_reward(self.reward)

    @property
    def _judges_on_the_way(self) -> bool:
        reward = self._reward
        return self.alpha is not None or reward is not None and reward.judges_prefixes

    def _let_wait(self, steering: "Steering") -> None:
        for population in steering.populations:
            population.let_wait(self.decoder.may_fork)


@dataclass
class Steering:
    """What is kept of a run: the particles of each prompt, and who judges them."""

    populations: list[Population]
    reward: Reward | None
    tokenizer: Any
    asked_for_logprobs: bool

    def judge(self, populations: list[Population]) -> list[list[float]]:
        """The rewards [N] of the particles of each, asked for in one call.

        Who is ruled out, or has ended and was judged before, is not judged again. 0 where the reward has nothing to say.
        """
        rewards = [list(population.rewards) for population in populations]
        reward = self.reward
        if reward is None:
            return rewards
        asked: list[tuple[int, int, Sequence, bool]] = []
        for p, population in enumerate(populations):
            for i, sequence in enumerate(population.sequences):
                ended = population.is_over(sequence)
                was_judged = ended and len(sequence.new_tokens) <= population.judged
                ruled_out = bool(population.log_weights[i] == -torch.inf)
                if not was_judged and not ruled_out and (reward.judges_prefixes or population.has_ended):
                    asked.append((p, i, sequence, ended))
        if asked:
            prompts = [sequence.tokens[: sequence.prompt_length] for _, _, sequence, _ in asked]
            texts = [populations[p].text(sequence) for p, _, sequence, _ in asked]
            values = reward(prompts, texts, [ended for *_, ended in asked], self.tokenizer)
            for (p, i, *_), value in zip(asked, values, strict=True):
                rewards[p][i] = value
        return rewards


def _common_prefix(first: list[int], second: list[int]) -> int:
    pairs = zip(first, second, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))
