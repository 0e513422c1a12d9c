"""The state of a run: for every sequence the tokens that are final, when it ends, and what the decoder remembers of it.

No model and no text in here, only token ids.
"""

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PretrainedConfig, StoppingCriteriaList
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria, StoppingCriteria

from decoding.forward.transfer import to_device
from decoding.sampling import LogitsPipeline


@dataclass
class Sequence:
    """One text in the making.

    tokens: prompt and every token that is final; committed tokens are never taken back.
    padding: the ids that stood left of the prompt in the user's batch; seen by logits processors and stopping criteria,
        as they are in ``generate``, and by nothing else.
    cached: how many of them have their keys and values in the cache; the rest is *pending* and rides in the next forward.
    limit: number of tokens at which the sequence ends.
    waiting: it takes part in no forward until others have come as far; its keys and values stay in the cache.
    forwards: forward passes it took part in, without the prefill.
    decided_at: for every new token the forward (1, 2, ...) that decided it; committed_at: the one that made it final.
    logprobs: for every new token its next-token log-probability in nats, where the decoder has it anyway.
    sampled_logprobs: the same under the distribution that it was drawn from, after all processors, where that is asked for.
    acceptance_lengths: for every verified draft the number of its tokens that were accepted.
    revisions: for every new token how often it was replaced before it became final, where the decoder replaces tokens.
    state: what the decoder keeps between forwards.
    """

    index: int
    tokens: list[int]
    limit: int
    generator: torch.Generator
    padding: list[int] = field(default_factory=list)
    cached: int = 0
    forwards: int = 0
    finished: bool = False
    waiting: bool = False
    prompt_length: int = field(init=False)
    decided_at: list[int] = field(default_factory=list)
    committed_at: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    sampled_logprobs: list[float] = field(default_factory=list)
    acceptance_lengths: list[int] = field(default_factory=list)
    revisions: list[int] = field(default_factory=list)
    state: Any = None

    def __post_init__(self):
        self.prompt_length = len(self.tokens)

    @property
    def pending(self) -> list[int]:
        return self.tokens[self.cached :]

    @property
    def new_tokens(self) -> list[int]:
        return self.tokens[self.prompt_length :]

    @property
    def is_running(self) -> bool:
        """Whether it takes part in the next forward."""
        return not self.finished and not self.waiting

    @property
    def holds_place(self) -> bool:
        """Whether its keys and values are still needed."""
        return not self.finished or self.waiting

    @property
    def room(self) -> int:
        """How many more tokens may be committed."""
        return self.limit - len(self.tokens)

    def end_after(self, count: int) -> None:
        """End the sequence behind its first ``count`` new tokens."""
        self.forwards = self.committed_at[count - 1]
        for column in (self.decided_at, self.committed_at, self.logprobs, self.sampled_logprobs, self.revisions):
            del column[count:]
        del self.tokens[self.prompt_length + count :]
        self.cached = min(self.cached, len(self.tokens))
        self.finished = True

    def left_of(self, drafts: SequenceOf[int] = ()) -> tuple[int, list[int]]:
        """The context of a row behind the tokens and ``drafts``, in the form that LogitsPipeline.scores asks for."""
        return self.index, [*self.padding, *self.tokens, *drafts]


@dataclass(frozen=True)
class Stopping:
    """When a sequence ends: EOS, stop strings and any other criteria, exact inside a block.

    ``eos_token_ids`` end a sequence and belong to it. Several tokens are committed at once, so ``criteria`` are asked
    about every prefix in turn, and the text is cut at the first that stops. ``foreign`` ones, which are not transformers'
    own, may keep a state or answer for all rows at once: they are asked once a step about the whole batch, as in
    ``generate`` (:meth:`Batch.stop_together`). So are all where nothing names an EOS (``goes_on``): ``generate`` then
    writes on in the rows that a criterion ended, until it has ended every row.
    """

    eos_token_ids: frozenset[int] = frozenset()
    criteria: tuple[StoppingCriteria, ...] = ()
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    foreign: tuple[StoppingCriteria, ...] = ()
    goes_on: bool = False

    @classmethod
    def from_generate(
        cls, config: GenerationConfig, criteria: StoppingCriteriaList | None, device: torch.device, particles: int = 1
    ) -> "Stopping":
        """What ``generate`` prepared. Its EOS and length criteria are counted here rather than asked.

        A user's own criterion of either kind counts too, as it does in transformers. With several ``particles`` for each
        prompt foreign criteria are asked as the others are: there is no one batch that goes on step by step.
        """
        given = [c.eos_token_id.flatten().tolist() for c in criteria or () if type(c) is EosTokenCriteria]
        eos = [] if config.eos_token_id is None else config.eos_token_id
        ids = frozenset(sum(given, []) if given else [eos] if isinstance(eos, int) else eos)
        own, foreign = [], []
        for criterion in criteria or ():
            is_limit = type(criterion) is MaxLengthCriteria and criterion.max_length == config.max_length
            if particles == 1 and not type(criterion).__module__.startswith("transformers."):
                foreign.append(criterion)
            elif not is_limit and type(criterion) is not EosTokenCriteria:
                own.append(criterion)
        if particles == 1 and not ids and not any(hasattr(criterion, "eos_token_id") for criterion in criteria or ()):
            return cls(ids, (), device, (*own, *foreign), goes_on=True)
        return cls(ids, tuple(own), device, tuple(foreign))

    def cut(
        self, tokens: SequenceOf[int], new_tokens: SequenceOf[int], index: int = 0, batch_size: int = 1
    ) -> int | None:
        """How many of ``new_tokens`` are left when they follow ``tokens``, or None if nothing stops.

        The criteria see the text in its place ``index`` of a batch of ``batch_size``, since they may hold values by place.
        """
        for count, token in enumerate(new_tokens, 1):
            if token in self.eos_token_ids:
                return count
            if self.criteria:
                prefix = torch.tensor([[*tokens, *new_tokens[:count]]], device=self.device)
                if self.ask(prefix.repeat(batch_size, 1))[index]:
                    return count
        return None

    def ask(self, texts: Tensor, foreign: bool = False) -> list[bool]:
        """Which of the texts [B, L] some criterion ends; one that answers for the whole batch ends all."""
        stops = torch.zeros(len(texts), dtype=torch.bool, device=texts.device)
        for criterion in self.foreign if foreign else self.criteria:
            stops = stops | torch.as_tensor(criterion(texts, None), device=texts.device)
        return stops.tolist()


class RunError(ValueError):
    """A run that cannot go on. ``output`` is a DecodeOutput of all that was final before."""

    output: Any = None


class UndecidableToken(RunError):
    """A model gave no distribution to choose from."""

    def __init__(self, index: int, position: int):
        super().__init__(
            f"no token can be chosen for position {position} of prompt {index}: its logits are nan, infinite or all -inf, "
            f"so the model, its dtype or a logits processor is at fault; what was decided before is in the error's output"
        )


@dataclass
class Batch:
    """The sequences of a run and what holds for all of them.

    ``config`` is the model's, where a method writes how the model was trained. ``tokenizer`` is what ``generate`` was given.
    ``particles``: sequences for each prompt, one prompt's after the other's.
    ``wants_logprobs``, ``wants_sampled_logprobs``: fill these fields of the sequences. ``state`` is what the decoder keeps
    of the whole batch, ``around`` what a decoder around that one keeps.
    """

    sequences: list[Sequence]
    pipeline: LogitsPipeline
    stopping: Stopping
    mask_token_id: int | None = None
    wants_logprobs: bool = False
    config: PretrainedConfig | None = None
    pad_token_id: int = 0
    particles: int = 1
    state: Any = None
    steps_judged: int = 0  # new tokens of each sequence that the foreign criteria were asked about
    tokenizer: Any = None
    wants_sampled_logprobs: bool = False
    around: Any = None
    stopped: set[int] = field(default_factory=set)  # sequences that foreign criteria have ended, or would have

    def masks(self, count: int) -> list[int]:
        """``count`` mask tokens; only for decoders that need one."""
        assert self.mask_token_id is not None
        return [self.mask_token_id] * count

    def texts(self, device: torch.device, steps: int | None = None) -> Tensor:
        """[B, L] what ``generate`` would hold, after ``steps`` of its own: ended sequences are filled with the pad token."""
        cuts = [None if steps is None else sequence.prompt_length + steps for sequence in self.sequences]
        texts = [sequence.padding + sequence.tokens[:cut] for sequence, cut in zip(self.sequences, cuts, strict=True)]
        longest = max(map(len, texts))
        return to_device([text + [self.pad_token_id] * (longest - len(text)) for text in texts], device)

    @property
    def unfinished(self) -> list[Sequence]:
        """The sequences of the next forward; those that wait are left out as well."""
        return [sequence for sequence in self.sequences if sequence.is_running]

    def commit(
        self,
        sequence: Sequence,
        tokens: SequenceOf[int],
        decided_at: SequenceOf[int] | None = None,
        logprobs: SequenceOf[float] | None = None,
        revisions: SequenceOf[int] | None = None,
        sampled_logprobs: SequenceOf[float] | None = None,
    ) -> None:
        """Make ``tokens`` final, cut at the first stop; the sequence is finished if there was one.

        ``decided_at`` defaults to the forward that is being absorbed. Raises UndecidableToken for a token below 0.
        """
        tokens = list(tokens[: sequence.room])
        self.check_decided(sequence, tokens)
        place = sequence.index // self.particles, len(self.sequences) // self.particles
        stop = self.stopping.cut(sequence.padding + sequence.tokens, tokens, *place)
        if stop is not None:
            tokens = tokens[:stop]
        count = len(tokens)
        sequence.tokens.extend(tokens)
        sequence.committed_at.extend([sequence.forwards] * count)
        sequence.decided_at.extend([sequence.forwards] * count if decided_at is None else decided_at[:count])
        if logprobs is not None:
            sequence.logprobs.extend(logprobs[:count])
        if sampled_logprobs is not None:
            sequence.sampled_logprobs.extend(sampled_logprobs[:count])
        if revisions is not None:
            sequence.revisions.extend(revisions[:count])
        sequence.finished = stop is not None or sequence.room == 0

    def commit_together(
        self,
        sequences: list[Sequence],
        tokens: list[int],
        logprobs: list[float] | None = None,
        sampled_logprobs: list[float] | None = None,
    ) -> None:
        """Make one token of each of ``sequences`` final; all criteria are asked about the whole batch, as in ``generate``."""
        for i, (sequence, token) in enumerate(zip(sequences, tokens, strict=True)):
            self.check_decided(sequence, [token])
            sequence.tokens.append(token)
            sequence.committed_at.append(sequence.forwards)
            sequence.decided_at.append(sequence.forwards)
            if logprobs is not None:
                sequence.logprobs.append(logprobs[i])
            if sampled_logprobs is not None:
                sequence.sampled_logprobs.append(sampled_logprobs[i])
        stops = self._stops() if self.stopping.criteria else None
        for sequence, token in zip(sequences, tokens, strict=True):
            ended = token in self.stopping.eos_token_ids or bool(stops is not None and stops[sequence.index])
            sequence.finished = ended or sequence.room == 0

    def _stops(self) -> list[bool]:
        """Which sequences some criterion ends; asked about one particle of each prompt at a time."""
        texts = self.texts(self.stopping.device)
        asked = [self.stopping.ask(texts[i :: self.particles]) for i in range(self.particles)]
        return [stops for of_prompt in zip(*asked, strict=True) for stops in of_prompt]

    def stop_together(self) -> None:
        """Ask the foreign criteria about every step that all sequences have reached, and end those that they end.

        Sequences that are ahead go on meanwhile, and lose what lies behind the step at which they end.
        """
        while self.stopping.foreign:
            step = self.steps_judged + 1
            reached = [len(sequence.new_tokens) >= step for sequence in self.sequences]
            waits = any(not (there or s.finished) for there, s in zip(reached, self.sequences, strict=True))
            if waits or not any(reached):
                return
            stops = self.stopping.ask(self.texts(self.stopping.device, step), foreign=True)
            self.stopped |= {index for index, stop in enumerate(stops) if stop and reached[index]}
            if not self.stopping.goes_on or len(self.stopped) == len(self.sequences):
                for index in self.stopped:
                    if reached[index]:
                        self.sequences[index].end_after(step)
            self.steps_judged = step

    def check_decided(self, sequence: Sequence, tokens: SequenceOf[int]) -> None:
        """Raise UndecidableToken if any of ``tokens`` is below 0."""
        if tokens and min(tokens) < 0:
            raise UndecidableToken(sequence.index // self.particles, len(sequence.tokens))
