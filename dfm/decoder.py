"""Discrete flow matching on the engine: whole texts in both directions, or blocks behind an exact cache.

A block is run like one of Set Block Decoding: its rows see the committed text and each other, the finished block runs
causally with the first forward of the next. What differs is who decides: any sampler of :mod:`dfm.samplers`. Every
sequence has its own sampler state and random generator, so a batch is decoded as its sequences would be alone.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from decoding.batch import Batch, Sequence
from decoding.checks import check_choice, check_count, check_range
from decoding.decoder import Decoder
from decoding.engine import Engine, Step
from decoding.forward.mask_token import find_mask_token
from decoding.forward.noise_level import noise_levels
from decoding.forward.rows import RowList
from decoding.rules import RevealRule
from decoding.sampling import TokenLaw
from dfm.draws import Draws, LikeliestDraws
from dfm.flow_config import SOURCES, FlowTraits
from dfm.networks import Bidirectional
from dfm.paths.fit import FittedSchedule
from dfm.paths.mixture import MixturePath
from dfm.paths.path import delta
from dfm.paths.schedulers import Scheduler, named_scheduler
from dfm.paths.sources import Source
from dfm.samplers import find_sampler
from dfm.samplers.ranked import CanvasRule, RuleSampler, rule_sampler
from dfm.sampling.grid import GridSampler, time_grid
from dfm.sampling.loop import FlowSample, Posterior, sample
from dfm.sampling.state import FlowState, Query, Sampler
from dfm.sampling.state import Step as SamplerStep


@dataclass
class OpenText:
    """A block, or the whole text, that a sampler is working on; its first token is token ``start`` of the sequence.

    query: what the sampler waits for. last_row: hidden state [1, D] of the row before a block, where that row predicts
    the block's first token. decided_at: for each token the forward that last changed it. rows: of the text in the running
    forward; causal: those of the committed text that runs with them.
    """

    start: int
    sampler: Sampler
    state: FlowState
    draws: Draws
    decided_at: list[int]
    step: SamplerStep = field(init=False)
    query: Query = field(init=False)
    last_row: Tensor | None = None
    causal: range = range(0)
    rows: range = range(0)

    def next_step(self) -> None:
        self.step = self.sampler.step(self.state, self.draws)
        self.query = next(self.step)

    @property
    def decided_prefix(self) -> int:
        """How many tokens from its start are decided without a gap."""
        masked = self.state.masked[0].tolist()
        return masked.index(True) if True in masked else len(masked)


@dataclass(frozen=True)
class FlowDecoder(Decoder):
    """Decode by following a probability path from noise to text.

    path: the source of the mixture path: "mask", for models of FlowObjective and of Set Block Decoding, or "uniform".
    scheduler: a name of :data:`dfm.paths.schedulers.SCHEDULERS`; a Scheduler, for instance a fitted one; or the JSON file
        of a :class:`dfm.paths.fit.FittedSchedule`.
    sampler: a name of :data:`dfm.samplers.SAMPLERS`; "rule" to reveal by ``rule``; a subclass of Sampler, or its name as
        ``module:Class``; or a function from a path and a grid of times to a Sampler.
    steps: steps from noise to text, evenly spaced in time, for each block or for the whole text. By default as many as
        there are tokens to decide, or as a fitted schedule has rounds. Not for samplers that choose their number of
        evaluations themselves.
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
        if self.steps is not None and not kind.on_grid:
            raise ValueError(f"steps must be None for sampler {self.sampler!r}, which counts its own, got {self.steps}")

    @property
    def needs_mask_token(self) -> bool:
        return self.path == "mask"

    @property
    def prefills(self) -> bool:
        return self.block_size is not None

    @property
    def _kind(self) -> type[Sampler]:
        """What is known of the sampler before it is made."""
        if self.sampler == "rule":
            return RuleSampler if self.path == "mask" else CanvasRule
        if isinstance(self.sampler, (str, type)):
            return find_sampler(self.sampler, self.path)
        return GridSampler

    @property
    def _keeps(self) -> bool:
        """Whether a revealed token is final, so that it may be committed before its block is finished."""
        return self.path == "mask" and self._kind.keeps

    def check(self, model: PreTrainedModel, law: TokenLaw) -> None:
        law.check_holes(type(self).__name__)
        self._check_traits(model)

    def begin(self, batch: Batch, engine: Engine) -> None:
        if self.block_size is None:
            for sequence in batch.sequences:
                sequence.cached = 0  # a kept cache holds causal keys and values, of no use here

    def plan(self, batch: Batch) -> list[RowList]:
        lists = []
        for sequence in batch.unfinished:
            if sequence.state is None:
                sequence.state = self._open(batch, sequence)
            text, rows = sequence.state, RowList()
            if self.block_size is not None:
                text.causal = rows.add_causal(sequence.tokens[sequence.cached : text.start], sequence.cached)
            levels = noise_levels(self._kappa(batch, text.query.t), text.state.frozen)[0].tolist()
            text.rows = rows.add_block(text.query.x[0].tolist(), text.start, text.start, levels)
            lists.append(rows)
        return lists

    def absorb(self, batch: Batch, step: Step) -> None:
        for index, sequence in enumerate(step.sequences):
            text: OpenText = sequence.state
            old = text.state.x, text.state.masked
            if text.causal and FlowTraits.of(batch.config).shift:
                text.last_row = step.hidden([(index, text.causal[-1:])])
            p1 = self._posterior(batch, step, index)
            if self.block_size is not None:
                sequence.cached = text.start
            text.state.evaluations += ~text.state.done
            try:
                text.query = text.step.send(p1)
                stepped = False
            except StopIteration:
                stepped = True
            changed = (text.state.x != old[0]) | (text.state.masked != old[1])
            for offset in changed[0].nonzero()[:, 0].tolist():
                text.decided_at[offset] = sequence.forwards
            if stepped:
                self._after_step(batch, sequence)

    def preview(self, batch: Batch) -> list[int] | None:
        sequence = batch.sequences[0]
        text: OpenText | None = sequence.state
        return text.state.x[0, len(sequence.tokens) - text.start :].tolist() if text else None

    def infill(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        fixed: Tensor,
        *,
        attention_mask: Tensor | None = None,
        temperature: float = 1.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> FlowSample:
        """Fill the positions of ``input_ids`` [B, L] that are not ``fixed`` [B, L] bool, whatever ids they hold.

        attention_mask: [B, L], 0 where a sequence is padded, on any side. temperature 0 takes likeliest tokens. Sequence
        i draws from its own generator, ``seed`` + i. Returns tokens [B, L] and the number of evaluations [B].
        """
        self._check_infill(model, input_ids, fixed, attention_mask)
        check_range("temperature", temperature, 0)
        real = torch.ones_like(fixed) if attention_mask is None else attention_mask.bool()
        traits = self._check_traits(model)
        source = traits.make_source(model.config.get_text_config().vocab_size, self._mask_id(model))
        frozen = fixed | ~real
        path, sampler = self._make(source, int((~frozen).sum(-1).max()))
        generators = [torch.Generator().manual_seed(seed + i) for i in range(len(input_ids))]
        draws = Draws(generators)
        if temperature == 0 and sampler.ranks_positions:
            draws, temperature = LikeliestDraws(generators), 1.0
        network = Bidirectional(model, real, traits, path.scheduler)
        posterior = Posterior(network, source, temperature=temperature, top_p=top_p)
        return sample(posterior, sampler, input_ids, frozen, draws)

    def _open(self, batch: Batch, sequence: Sequence) -> OpenText:
        """Noise where the next block, or the whole text behind the prompt, will be."""
        device = torch.device("cpu")  # of the sampler's state: small, and asked for one number at a time
        source = self._source(batch)
        if self.block_size is None:
            start, free = 0, sequence.room
            tokens = sequence.tokens + [0] * free
        else:
            start, free = len(sequence.tokens), self.block_size
            tokens = [0] * free
        x = torch.tensor([tokens], device=device)
        frozen = torch.arange(len(tokens))[None] < len(tokens) - free
        _, sampler = self._make(source, free)
        greedy = not batch.law.do_sample and sampler.ranks_positions
        draws = (LikeliestDraws if greedy else Draws)([sequence.generator])
        text = OpenText(start, sampler, FlowState.start(x, frozen, source, draws), draws, [0] * len(tokens))
        text.next_step()
        return text

    def _after_step(self, batch: Batch, sequence: Sequence) -> None:
        """Commit what is final; open the next step, or leave the block if it is finished."""
        text: OpenText = sequence.state
        # Where revealed tokens stay, a block without masks is finished before its time.
        finished = bool(text.state.done.all()) or (self._keeps and not text.state.masked.any())
        done = len(sequence.tokens) - text.start
        prefix = len(text.decided_at) if finished else text.decided_prefix if self._keeps else done
        if prefix > done:
            batch.commit(sequence, text.state.x[0, done:prefix].tolist(), text.decided_at[done:prefix])
        if finished:
            sequence.state = None
        elif not sequence.finished:
            text.next_step()

    def _posterior(self, batch: Batch, step: Step, index: int) -> Tensor:
        """p_1t [1, L, V] for the query of a sequence, or [N, V] of what it asks for; the head runs for those rows alone."""
        text: OpenText = step.sequences[index].state
        query, free = text.query, text.state.free[0]
        asked = free & query.masked[0] if self.path == "mask" and query.carry_over else free
        if query.only is not None:
            asked = query.only[0]
        offsets = asked.nonzero()[:, 0].tolist()
        law = self._law(batch, step, index, offsets)
        if query.only is not None:
            return law
        p1 = delta(query.x, law.shape[-1], law)
        p1[0, asked] = law
        return p1

    def _law(self, batch: Batch, step: Step, index: int, offsets: list[int]) -> Tensor:
        """The processed laws [N, V] of the tokens at ``offsets``."""
        vocabulary = batch.config.get_text_config().vocab_size
        if not offsets:
            return torch.zeros(0, vocabulary)
        sequence = step.sequences[index]
        text: OpenText = sequence.state
        raw = step.head(self._hidden(batch, step, index, offsets))
        raw[:, list(FlowTraits.of(batch.config).excluded)] = -torch.inf
        left = text.query.x[0, len(sequence.tokens) - text.start :].tolist()
        done = len(sequence.tokens) - text.start
        scores = batch.law.scores(raw, lambda i: sequence.left_of(left[: offsets[i] - done])).cpu()
        if batch.law.do_sample or isinstance(text.draws, LikeliestDraws):
            return scores.softmax(-1)
        return delta(scores.argmax(-1), vocabulary, scores)

    def _hidden(self, batch: Batch, step: Step, index: int, offsets: list[int]) -> Tensor:
        """Hidden states of the rows that predict the tokens at ``offsets``: their own, or with a shift the ones before."""
        text: OpenText = step.sequences[index].state
        if not FlowTraits.of(batch.config).shift:
            return step.hidden([(index, [text.rows[offset] for offset in offsets])])
        rows = step.hidden([(index, [text.rows[max(0, offset - 1)] for offset in offsets])])
        if self.block_size is not None and offsets[:1] == [0]:
            rows = torch.cat([text.last_row, rows[1:]])
        return rows

    def _make(self, source: Source, free: int) -> tuple[MixturePath, Sampler]:
        """Path and sampler for ``free`` tokens."""
        scheduler = self.scheduler
        if not isinstance(scheduler, Scheduler):
            scheduler = named_scheduler(scheduler, source)
        path = MixturePath(source, scheduler)
        if self.sampler == "rule":
            return path, rule_sampler(path, self.rule)
        make = self._kind.default if isinstance(self.sampler, (str, type)) else self.sampler
        rounds = len(scheduler.quotas) if isinstance(scheduler, FittedSchedule) else max(1, free)
        return path, make(path, time_grid(self.steps or rounds))

    def _source(self, batch: Batch) -> Source:
        return FlowTraits.of(batch.config).make_source(batch.config.get_text_config().vocab_size, batch.mask_token_id)

    def _kappa(self, batch: Batch, t: Tensor) -> Tensor:
        scheduler = self.scheduler
        if not isinstance(scheduler, Scheduler):
            scheduler = named_scheduler(scheduler, self._source(batch))
        return scheduler.kappa(t)

    def _mask_id(self, model: PreTrainedModel) -> int | None:
        return find_mask_token(model, self.mask_token_id) if self.needs_mask_token else None

    def _check_traits(self, model: PreTrainedModel) -> FlowTraits:
        """How the model was trained; raises ValueError, or warns, if that is not how it shall decode."""
        traits = FlowTraits.of(model.config)
        if traits.source != self.path:
            raise ValueError(
                f"path must be {traits.source!r} for this model, which was trained with that source, got {self.path!r}"
            )
        sizes = traits.block_sizes or getattr(model.generation_config, "trained_block_sizes", None)
        whole = getattr(model.config, "flow", None) is not None and traits.block_sizes is None
        if self.block_size is None and sizes:
            warnings.warn("block_size=None: this model was trained with blocks; expect worse text", stacklevel=3)
        elif self.block_size is not None and whole:
            warnings.warn(
                f"block_size={self.block_size}: this model was trained on whole texts, not blocks; expect worse text",
                stacklevel=3,
            )
        elif self.block_size is not None and sizes and self.block_size not in sizes:
            warnings.warn(
                f"block_size={self.block_size}: this model was trained with block sizes {min(sizes)} to {max(sizes)}; "
                f"expect worse text",
                stacklevel=3,
            )
        return traits

    def _check_infill(self, model, input_ids: Tensor, fixed: Tensor, attention_mask: Tensor | None) -> None:
        Engine.for_model(model).check()
        if self.block_size is not None:
            raise ValueError(f"block_size must be None to infill: whole texts are filled, got {self.block_size}")
        shape = tuple(input_ids.shape)
        if input_ids.dim() != 2:
            raise ValueError(f"input_ids must be [B, L], got shape {shape}")
        if fixed.dtype != torch.bool or fixed.shape != input_ids.shape:
            raise ValueError(f"fixed must be bool of shape {shape}, got {fixed.dtype} of shape {tuple(fixed.shape)}")
        if attention_mask is not None and attention_mask.shape != input_ids.shape:
            raise ValueError(f"attention_mask must have shape {shape}, got {tuple(attention_mask.shape)}")
        vocabulary = model.get_input_embeddings().num_embeddings
        if bool(((input_ids < 0) | (input_ids >= vocabulary))[fixed].any()):
            raise ValueError(f"input_ids must be from 0 to {vocabulary - 1} where they are fixed")
