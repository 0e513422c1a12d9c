"""Discrete flow matching on the engine: whole texts in both directions, or blocks behind an exact cache.

A block is run like one of Set Block Decoding: its rows see the committed text and each other, the finished block runs
causally with the first forward of the next. What differs is who decides: any sampler of :mod:`dfm.samplers`. The texts of
a batch take their steps together (:mod:`dfm.open_texts`), each with its own time and random generator, so a batch is
decoded as its sequences would be alone. Shapes: B texts of a group, L tokens of each, V vocabulary, N rows.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from decoding.batch import Batch, Sequence, UndecidableToken
from decoding.decoder import Decoder
from decoding.engine import Engine, Step
from decoding.forward.mask_token import find_mask_token
from decoding.forward.noise_level import GIVEN
from decoding.forward.rows import RowList
from decoding.inputs.checks import check_choice, check_count
from decoding.rules import RevealRule
from decoding.sampling import LogitsPipeline, likeliest
from dfm.draws import LikeliestDraws
from dfm.flow_config import SOURCES, FlowTraits, check_training
from dfm.flow_run import FlowRun
from dfm.infill import infill
from dfm.open_texts import Group, OpenText, OpenTexts
from dfm.paths.fit import FittedSchedule
from dfm.paths.mixture import MixturePath
from dfm.paths.path import delta
from dfm.paths.schedulers import Scheduler, named_scheduler
from dfm.samplers import find_sampler
from dfm.samplers.fitted import StepSettings
from dfm.samplers.ranked import CanvasRule, RuleSampler, rule_sampler
from dfm.sampling.grid import GridSampler, time_grid
from dfm.sampling.loop import FlowSample
from dfm.sampling.state import Sampler


@dataclass(frozen=True)
class FlowDecoder(Decoder):
    """Decode by following a probability path from noise to text.

    path: the source of the mixture path: "mask", for models of FlowObjective and of Set Block Decoding, or "uniform".
    scheduler: a name of :data:`dfm.paths.schedulers.SCHEDULERS`; a Scheduler, for instance a fitted one; or the JSON file
        of a :class:`dfm.paths.fit.FittedSchedule`.
    sampler: a name of :data:`dfm.samplers.SAMPLERS`; "rule" to reveal by ``rule``; a subclass of Sampler, or its name as
        ``module:Class``; a function from a path and a grid of times to a Sampler; or a fitted one, which has its own
        number of steps: :class:`dfm.samplers.fitted.StepSettings` or the JSON file of it.
    steps: steps from noise to text, evenly spaced in time, for each block or for the whole text. By default as many as
        there are tokens to decide, or as a fitted schedule has rounds. Not for samplers that choose their number of
        evaluations themselves; "adaptive" cuts most of them: 45 evaluations for 4 steps, 71 for 32 (linear scheduler).
    block_size: tokens in a block; None decodes the whole of prompt and ``max_new_tokens`` at once, every row seeing
        every other, as FlowObjective without block sizes trains it. No exact cache exists for that.
    rule: for sampler "rule": a rule of decoding/rules.py.
    mask_token_id: by default the one that the model's generation config names.

    Tokens are drawn from the posterior as ``generate`` processes it (temperature, top_p, ..). With do_sample=False it is
    sharpened to its likeliest token; where tokens are revealed at random, that is still drawn. Where revealed tokens
    stay, they are committed as soon as no gap is left of them; else at the end of the block.
    Sources: arXiv 2407.15595, 2412.03487; block-causal: 2503.09573.
    """

    path: str = "mask"
    scheduler: str | Scheduler = "linear"
    sampler: str | Callable[[MixturePath, tuple[float, ...]], Sampler] = "exact"
    steps: int | None = None
    block_size: int | None = None
    rule: RevealRule | None = None
    mask_token_id: int | None = None

    def __post_init__(self):
        check_choice("path", self.path, SOURCES)
        if isinstance(self.scheduler, str) and self.scheduler.endswith(".json"):
            object.__setattr__(self, "scheduler", FittedSchedule.load(self.scheduler))
        if isinstance(self.sampler, str) and self.sampler.endswith(".json"):
            object.__setattr__(self, "sampler", StepSettings.load(self.sampler))
        if isinstance(self.sampler, StepSettings) and self.sampler.source != self.path:
            raise ValueError(f"path must be {self.sampler.source!r} for this fitted sampler, got {self.path!r}")
        if not isinstance(self.scheduler, Scheduler):
            named_scheduler(self.scheduler, FlowTraits().make_source(2, 1))
        if not isinstance(self.sampler, str) and not callable(self.sampler):
            raise ValueError(f"sampler must be a name or a function of a path and a grid, got {self.sampler!r}")
        kind = self._kind
        if (self.sampler == "rule") != isinstance(self.rule, RevealRule):
            raise ValueError(
                f"rule must be a rule such as EntropyBound(0.1) for sampler 'rule' and None for others, got {self.rule!r} "
                f"for sampler {self.sampler!r}"
            )
        for name in ("steps", "block_size"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name))
        if isinstance(self.sampler, StepSettings) and self.steps not in (None, self.sampler.steps):
            raise ValueError(
                f"steps must be {self.sampler.steps}, as this sampler was fitted, or left out, got {self.steps}"
            )
        if self.steps is not None and not kind.on_grid:
            raise ValueError(f"steps must be None for sampler {self.sampler!r}, which counts its own, got {self.steps}")

    @property
    def needs_mask_token(self) -> bool:
        return self.path == "mask"

    @property
    def prefills(self) -> bool:
        return self.block_size is not None

    @property
    def can_fork(self) -> bool:
        return self.block_size is not None

    def may_fork(self, sequence: Sequence) -> bool:
        """Between blocks: within one, texts take their steps together."""
        return sequence.state is None

    @property
    def _kind(self) -> type[Sampler]:
        """What is known of the sampler before it is made."""
        if self.sampler == "rule":
            return RuleSampler if self.path == "mask" else CanvasRule
        if isinstance(self.sampler, (str, type)):
            return find_sampler(self.sampler, self.path)
        return GridSampler

    def check(self, model: PreTrainedModel, pipeline: LogitsPipeline) -> None:
        pipeline.check_holes(type(self).__name__)
        self._check_training(model)

    def begin(self, batch: Batch, engine: Engine) -> None:
        run = self.run(batch.config, batch.mask_token_id)
        batch.state = OpenTexts(run, self.block_size, not batch.pipeline.do_sample, engine.device)
        if self.block_size is None:
            for sequence in batch.sequences:
                sequence.cached = 0  # a kept cache holds causal keys and values, of no use here

    def plan(self, batch: Batch) -> list[RowList]:
        texts: OpenTexts = batch.state
        texts.begin_steps(batch.unfinished)
        asked = {group: (group.query.x.tolist(), texts.levels(group)) for group in texts.groups}
        lists = []
        for sequence in batch.unfinished:
            text, rows = sequence.state, RowList()
            ids, levels = (column and column[text.row] for column in asked[text.group])
            if self.block_size is None:
                prompt, given = sequence.tokens[: text.start], [GIVEN] * text.start
                text.rows = rows.add_block(prompt + ids, 0, 0, levels and given + levels)[text.start :]
            else:
                text.causal = rows.add_causal(sequence.tokens[sequence.cached : text.start], sequence.cached)
                text.rows = rows.add_block(ids, text.start, text.start, levels)
            lists.append(rows)
        return lists

    def absorb(self, batch: Batch, step: Step) -> None:
        texts: OpenTexts = batch.state
        for index, sequence in enumerate(step.sequences):
            text: OpenText = sequence.state
            text.index = index
            if self.block_size is not None:
                sequence.cached = text.start
            if text.causal and texts.run.traits.shift:
                text.last_row = step.hidden([(index, text.causal[-1:])])
        for group in texts.groups:
            group.answer(self._posterior(batch, step, group))
            self._commit(batch, group)

    def preview(self, batch: Batch) -> list[int] | None:
        sequence = batch.sequences[0]
        text: OpenText | None = sequence.state
        return text.tokens[len(sequence.tokens) - text.start :].tolist() if text else None

    def infill(self, model: PreTrainedModel, input_ids: Tensor, fixed: Tensor, **options: Any) -> FlowSample:
        """Fill the positions of ``input_ids`` [B, L] that are not ``fixed`` [B, L] bool: see :func:`dfm.infill.infill`."""
        if self.block_size is not None:
            raise ValueError(f"block_size must be None to infill: whole texts are filled, got {self.block_size}")
        self._check_training(model)
        mask_token_id = find_mask_token(model, self.mask_token_id) if self.needs_mask_token else None
        return infill(model, self.run(model.config, mask_token_id), input_ids, fixed, **options)

    def run(self, config: PretrainedConfig, mask_token_id: int | None) -> FlowRun:
        """What these settings come to on a model with this configuration."""
        traits = FlowTraits.of(config)
        source = traits.make_source(config.get_text_config().vocab_size, mask_token_id)
        scheduler = self.scheduler if isinstance(self.scheduler, Scheduler) else named_scheduler(self.scheduler, source)
        path = MixturePath(source, scheduler)
        rounds = len(scheduler.quotas) if isinstance(scheduler, FittedSchedule) else None
        if isinstance(self.sampler, StepSettings):
            rounds = self.sampler.steps
        make = self._kind.default if isinstance(self.sampler, (str, type)) else self.sampler

        @cache
        def make_sampler(free: int) -> Sampler:
            if self.sampler == "rule":
                return rule_sampler(path, self.rule)
            return make(path, time_grid(self.steps or rounds or max(1, free)))

        takes_levels = bool(getattr(config, "noise_level_rows", 0))
        return FlowRun(traits, path, make_sampler, self.path == "mask" and self._kind.keeps, takes_levels)

    def _check_training(self, model: PreTrainedModel) -> None:
        check_training(model, self.path, self.block_size)
        if self._kind.tells_target and not FlowTraits.of(model.config).transition:
            raise ValueError(
                f"sampler {self.sampler!r} needs a model trained with objective dfm-transition, got another"
            )

    def _commit(self, batch: Batch, group: Group) -> None:
        """Make final what is: of texts that are done all, at the end of a step what stays for good."""
        keeps, is_over = batch.state.run.keeps, group.step is None
        done = group.state.done
        if is_over and keeps:  # where revealed tokens stay, a text without masks is finished before its time
            done = done | ~group.state.masked.any(-1)
        ends = done.tolist()
        if not (is_over and keeps or any(ends)):
            return
        columns = torch.stack([group.state.x, group.state.masked.long(), group.decided_at], dim=1).tolist()
        for row, (sequence, (x, masked, decided_at)) in enumerate(zip(group.sequences, columns, strict=True)):
            if sequence is None or not (is_over or ends[row]):
                continue
            committed = len(sequence.tokens) - sequence.state.start
            decided = len(x) if ends[row] else masked.index(True) if keeps else committed
            if decided > committed:
                batch.commit(sequence, x[committed:decided], decided_at[committed:decided])
            if ends[row]:
                sequence.state = group.sequences[row] = None

    def _posterior(self, batch: Batch, step: Step, group: Group) -> Tensor:
        """p_1t [B, L, V] for the query of ``group``, or [N, V] of what it asks for; the head runs where it must."""
        query = group.query
        if not query.conditional:
            raise ValueError("sampler must be one without guidance: a decoder has no unconditional model")
        where = group.state.free if query.only is None else query.only
        unknown = where & query.masked if self.path == "mask" and query.carry_over else where
        unknown = group.among_present(unknown)
        distribution = self._distributions(batch, step, group, unknown)
        if query.only is not None and len(distribution) == int(where.sum()):
            return distribution
        every = delta(query.x, distribution.shape[-1], distribution)
        every[unknown] = distribution
        return every if query.only is None else every[where]

    def _distributions(self, batch: Batch, step: Step, group: Group, where: Tensor) -> Tensor:
        """The processed distributions [N, V] of the tokens ``where`` [B, L] bool."""
        run: FlowRun = batch.state.run
        vocabulary, excluded = run.path.source.vocab_size, list(run.traits.excluded)
        asked = [(group.sequences[row], offset) for row, offset in where.nonzero().tolist()]
        if not asked:
            return torch.zeros(0, vocabulary, device=where.device)
        raw = step.head(self._hidden(step, asked, run.traits.shift))
        if excluded:
            raw[:, excluded] = -torch.inf

        def left_of(i: int) -> tuple[int, list[int]]:
            sequence, offset = asked[i]
            text: OpenText = sequence.state
            drafts = group.query.x[text.row, len(sequence.tokens) - text.start : offset]
            return sequence.left_of(drafts.tolist())

        scores = batch.pipeline.process(raw, left_of)
        for (sequence, offset), undecidable in zip(asked, (likeliest(scores) < 0).tolist(), strict=True):
            if undecidable:
                raise UndecidableToken(sequence.index, sequence.state.start + offset)
        if batch.pipeline.do_sample or isinstance(group.draws, LikeliestDraws):
            return scores.softmax(-1)
        return delta(scores.argmax(-1), vocabulary, scores)

    def _hidden(self, step: Step, asked: list[tuple[Sequence, int]], shift: bool) -> Tensor:
        """Hidden states [N, D] of the rows that predict the tokens: their own, or with a shift the ones before."""
        spans, before = [], []
        for i, (sequence, offset) in enumerate(asked):
            text: OpenText = sequence.state
            if shift and offset == 0 and not text.causal and self.block_size is not None:
                before.append((i, text.last_row))  # the row before the block has run in an earlier forward
            spans.append((text.index, [max(0, text.rows.start + offset - shift)]))
        hidden = step.hidden(spans)
        for i, row in before:
            hidden[i] = row
        return hidden
