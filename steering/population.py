"""The particles of one prompt: their weights, who goes on, and how each came about.

Source: sequential Monte Carlo with adaptive, systematic resampling; log-weights are carried where nobody is resampled.
Intermediate target after t new tokens: q(x_1..t) exp(potential of x_1..t), with q what the decoder samples from. Shapes: N
particles.
"""

import math
import warnings
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

import torch
from torch import Tensor

from decoding import Sequence
from decoding.sampling import inverse_cdf
from steering.weights import effective_sample_size, log_mean, systematic


@dataclass(frozen=True)
class Judgement:
    """One look at the particles of a prompt.

    tokens: how many new tokens of each were judged. ess: effective sample size then, of N. ancestors: whose copy each
    particle became; None where all went on as they were.
    """

    tokens: int
    ess: float
    ancestors: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Target:
    """What weights are made of: the potential of a text is share * scale * reward + (1 + share (alpha - 1)) log p - log q.

    alpha: None leaves out p and q. share: 1 for finished texts, and min(1, t / ramp) after t new tokens, so that all of the
    reward, or of alpha, counts only after ``ramp`` tokens.
    """

    alpha: float | None
    scale: float
    ramp: int

    def potential(
        self, rewards: SequenceOf[float], log_p: SequenceOf[float], log_q: SequenceOf[float], tokens: int
    ) -> Tensor:
        """[N] for the rewards and log-probabilities of N texts; ``tokens`` is 0 for finished ones."""
        share = min(1.0, tokens / self.ramp) if self.ramp and tokens else 1.0
        value = share * self.scale * torch.tensor(rewards, dtype=torch.float64)
        if self.alpha is None:
            return value
        p, q = torch.tensor(log_p, dtype=torch.float64), torch.tensor(log_q, dtype=torch.float64)
        return value + (1 + share * (self.alpha - 1)) * p - q


@dataclass
class Population:
    """The particles of one prompt, ``sequences`` of the batch.

    every: new tokens between two judgements; None judges finished texts only. cuts_back: whether all is cut back to what was
    possible once no particle is. truncates: whether a copy begins right behind what was judged, because what its ancestor
    has drawn since is drawn anew; else it is a copy of all.
    potential, log_weights: [N], of what was judged last. log_normaliser: of the target, up to the last resampling.
    """

    sequences: list[Sequence]
    target: Target
    every: int | None
    ess_threshold: float
    generator: torch.Generator
    cuts_back: bool
    truncates: bool
    judged: int = 0
    forwards: int = 0
    particle_forwards: int = 0
    log_normaliser: float = 0.0
    is_exhausted: bool = False
    is_done: bool = False
    history: list[Judgement] = field(default_factory=list)
    rewards: list[float] = field(init=False)
    potential: Tensor = field(init=False)
    log_weights: Tensor = field(init=False)

    def __post_init__(self) -> None:
        count = len(self.sequences)
        self.rewards = [0.0] * count
        self.potential = torch.zeros(count, dtype=torch.float64)
        self.log_weights = torch.zeros(count, dtype=torch.float64)

    @property
    def next_judgement(self) -> float:
        """The number of new tokens at which particles wait for each other."""
        return math.inf if self.every is None else self.judged + self.every

    def count_forward(self) -> None:
        """Another forward has run; all that are not finished count it, whether they took part or waited."""
        running = sum(sequence.is_running for sequence in self.sequences)
        self.particle_forwards += running
        if running:
            self.forwards += 1
            for sequence in self.sequences:
                if not sequence.finished:
                    sequence.forwards = self.forwards

    def let_wait(self, may_fork: Callable[[Sequence], bool]) -> None:
        """Particles that have come as far as the next judgement wait for the others.

        One that is finished beyond it waits as well: for those who judge, it is not finished yet.
        """
        for sequence in self.sequences:
            count = len(sequence.new_tokens)
            if sequence.finished:
                sequence.waiting = count > self.next_judgement and not self.is_done
            else:
                sequence.waiting = count >= self.next_judgement and may_fork(sequence)

    @property
    def is_ready(self) -> bool:
        """Whether there is something to judge."""
        return not self.is_done and not any(sequence.is_running for sequence in self.sequences)

    def is_over(self, sequence: Sequence) -> bool:
        """Whether nothing follows what is to be judged of a particle."""
        return sequence.finished and len(sequence.new_tokens) <= self.next_judgement

    @property
    def has_ended(self) -> bool:
        """Whether that holds for all."""
        return all(map(self.is_over, self.sequences))

    def text(self, sequence: Sequence) -> list[int]:
        """What is to be judged of a particle."""
        return sequence.new_tokens if self.every is None else sequence.new_tokens[: self.judged + self.every]

    def weigh(self, rewards: list[float]) -> list[int] | None:
        """Take in the ``rewards`` [N] of the texts to be judged; returns the ancestors of the particles that go on.

        None if all go on as they are, or none goes on because all are finished or ruled out.
        """
        ends = self.has_ended
        tokens = max(len(self.text(sequence)) for sequence in self.sequences)
        log_p = [math.fsum(s.logprobs[: len(self.text(s))]) for s in self.sequences]
        log_q = [math.fsum(s.sampled_logprobs[: len(self.text(s))]) for s in self.sequences]
        potential = self.target.potential(rewards, log_p, log_q, 0 if ends else tokens)
        ruled_out = self.log_weights == -torch.inf
        log_weights = torch.where(ruled_out, -torch.inf, self.log_weights + potential - self.potential)
        ess = effective_sample_size(log_weights)
        if ess == 0:
            self._give_up(rewards)
            return None
        self.rewards, self.potential, self.log_weights = rewards, potential, log_weights
        ancestors = None
        if not ends and ess < self.ess_threshold * len(self.sequences):
            ancestors = systematic(log_weights, float(torch.rand((), generator=self.generator, dtype=torch.float64)))
            self.log_normaliser += log_mean(log_weights)
            self.log_weights = torch.zeros_like(log_weights)
            self.potential = potential[ancestors]
            self.rewards = [rewards[a] for a in ancestors]
        self.history.append(Judgement(tokens, ess, None if ancestors is None else tuple(ancestors)))
        self.is_done = ends
        if not ends and self.every is not None:
            self.judged += self.every
        return ancestors

    def copy(self, place: int, ancestor: int) -> Sequence:
        """Let particle ``place`` become what particle ``ancestor`` is, up to what was judged if it ``truncates``."""
        new, old = self.sequences[place], self.sequences[ancestor]
        count = min(len(old.new_tokens), self.judged) if self.truncates else len(old.new_tokens)
        is_whole = count == len(old.new_tokens)
        new.tokens = old.tokens[: old.prompt_length + count]
        for name in ("decided_at", "committed_at", "logprobs", "sampled_logprobs", "revisions"):
            setattr(new, name, getattr(old, name)[:count])
        new.acceptance_lengths = list(old.acceptance_lengths)
        # The last token's row decides the next one, so it has to run again.
        new.cached = old.cached if is_whole else min(old.cached, len(new.tokens) - 1)
        new.finished, new.forwards = old.finished and is_whole, old.forwards
        if not new.finished:
            new.forwards = self.forwards
        return new

    def draw(self) -> int:
        """A particle by weight."""
        uniform = torch.rand(1, generator=self.generator, dtype=torch.float64)
        return int(inverse_cdf(self.log_weights.softmax(-1)[None], uniform))

    def origins(self, place: int) -> list[int]:
        """For every new token of a particle the number that its ancestor had when the token was decided."""
        count = len(self.sequences[place].new_tokens)
        origins = [place] * count
        for judgement in reversed(self.history):
            if judgement.ancestors is not None:
                place = judgement.ancestors[place]
                origins[: judgement.tokens] = [place] * min(judgement.tokens, count)
        return origins

    def _give_up(self, rewards: list[float]) -> None:
        """All are ruled out: end with the weights that were last finite, of the texts that had them."""
        self.is_done = self.is_exhausted = True
        self.log_normaliser = -math.inf
        if not self.cuts_back:
            self.rewards = rewards
        for sequence in self.sequences:
            sequence.finished, sequence.waiting = True, False
            if self.cuts_back:
                del sequence.tokens[sequence.prompt_length + self.judged :]
                for name in ("decided_at", "committed_at", "logprobs", "sampled_logprobs", "revisions"):
                    del getattr(sequence, name)[self.judged :]
        prompt, count = self.sequences[0].index // len(self.sequences), len(self.sequences)
        kept = f"they are cut back to the {self.judged} tokens" if self.cuts_back else "they are kept with the weights"
        warnings.warn(
            f"the reward rules out all {count} particles of prompt {prompt} (-inf): {kept} before that; more particles help",
            stacklevel=2,
        )
