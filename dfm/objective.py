"""The flow-matching objective: predict the clean text from a noisy copy of it, whole or block by block.

Sources: arXiv 2407.15595 (whole texts); for blocks the layout of Set Block Decoding, arXiv 2509.04185, in which a clean
causal copy runs beside a noisy one. A causal checkpoint is converted by nothing but this training: its mask rows, or
the directions of its noise level, start from zero knowledge and the rest from its own weights.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from decoding.forward.attention import run_trunk
from decoding.forward.mask_token import find_mask_token
from decoding.forward.noise_level import add_noise_level_rows, noise_levels, with_noise_level
from decoding.forward.visibility import Visibility
from decoding.inputs.checks import check_choice, check_range
from decoding.training.blocks import BlockGrid, check_block_sizes, draw_block_size
from decoding.training.copies import run_copies
from decoding.training.new_mask_token import choose_mask_token, initialise_mask_token
from decoding.training.objective import Objective, RowsPerToken
from decoding.training.packed import Packing, find_loss_mask, in_chunks, next_token_losses
from dfm.draws import BatchDraws
from dfm.flow_config import SOURCES, FlowTraits, ids_without_text
from dfm.paths.given import draw_outside_span, draw_prefix, draw_share
from dfm.paths.mixture import MixturePath
from dfm.paths.schedulers import named_scheduler
from dfm.rates.losses import generalised_kl, stratified_times

GIVEN = {"prefix": draw_prefix, "share": draw_share, "span": draw_outside_span}
FREE = {"none": 1, "prefix": 1 / 2, "share": 1 / 2, "span": 1 / 3}  # the mean share of tokens that are not given
LAST_TIME = 1 - 1e-3  # the weight of the generalised KL has a pole at 1


@dataclass(frozen=True)
class NoisyBatch:
    """What a network is shown and asked. All [B, L]: the text, its noisy copy, which of it may be noise, which tokens
    are to be predicted, and the time of each token (float64)."""

    clean: Tensor
    noisy: Tensor
    free: Tensor
    asked: Tensor
    time: Tensor


@dataclass(frozen=True)
class FlowObjective(Objective):
    """Mean loss in nats of predicting the clean tokens of X_t, and with blocks of the next token too.

    The first token of a text is always given.

    source: "mask" or "uniform" noise; scheduler: a name of :data:`dfm.paths.schedulers.SCHEDULERS`.
    block_sizes: one is drawn for each call; None trains on whole texts, in both directions.
    loss: "cross_entropy" of the tokens that may be noise (with a mask source, of those that are), without time weight;
        or the "generalised_kl", which bounds -log p(text) from above, per token that may be noise.
    span: what a whole text is: a "document", or the packed "row" with all its documents (as in the paper).
    given: tokens of a whole text that stay clean: "none", a random "prefix", a random "share", or all but a "span".
    time_scope: with blocks, one time for each "row" or for each "block".
    phase: where the grid of blocks starts, as in SetBlockObjective.
    time_input: tell the network the noise level (:mod:`decoding.forward.noise_level`): "none", "additive", or by
        default none for the mask source, whose posterior does not depend on it, and additive for the uniform one.
    shift: row i - 1 predicts token i, which keeps the habit of a causal checkpoint.
    ntp_weight: weight of the next-token cross-entropy of the clean copy; only with blocks.
    gated: what is trained acts on the noisy copy's rows only, so the clean rows are constants: they run without
        gradient, and the next-token loss is left out. For blocks of masks that tell no noise level and are not
        shifted, which is what decoders take a model to be that says nothing else.
    mask_token_id: by default the one that the model's generation config names.

    Metrics: ``flow_loss`` and, with blocks, ``ntp_loss``.
    """

    tags = ("discrete-flow-matching",)

    source: Literal["mask", "uniform"] = "mask"
    scheduler: str = "linear"
    block_sizes: tuple[int, ...] | None = None
    loss: Literal["cross_entropy", "generalised_kl"] = "cross_entropy"
    span: Literal["document", "row"] = "document"
    given: Literal["none", "prefix", "share", "span"] = "none"
    time_scope: Literal["row", "block"] = "block"
    phase: Literal["document", "random", "response"] = "random"
    time_input: Literal["none", "additive"] | None = None
    shift: bool = False
    ntp_weight: float = 1.0
    gated: bool = False
    mask_token_id: int | None = None

    def __post_init__(self):
        check_choice("source", self.source, SOURCES)
        named_scheduler(self.scheduler, FlowTraits().make_source(2, 1))
        check_choice("loss", self.loss, ("cross_entropy", "generalised_kl"))
        check_choice("span", self.span, ("document", "row"))
        check_choice("given", self.given, ("none", *GIVEN))
        check_choice("time_scope", self.time_scope, ("row", "block"))
        check_choice("phase", self.phase, ("document", "random", "response"))
        check_choice("time_input", self.time_input, (None, "none", "additive"))
        check_choice("shift", self.shift, (True, False))
        check_range("ntp_weight", self.ntp_weight, 0)
        if self.block_sizes is not None:
            object.__setattr__(self, "block_sizes", check_block_sizes(self.block_sizes))
            if self.given != "none":
                raise ValueError(
                    f"given must be 'none' with block_sizes: what stands before is given, got {self.given!r}"
                )
        if self.gated and self.block_sizes is None:
            raise ValueError(
                "block_sizes must be given with gated=True: whole texts have no rows that stay as they are"
            )
        allowed = {"source": ("mask",), "shift": (False,), "time_input": (None, "none"), "ntp_weight": (1,)}
        for name, values in allowed.items() if self.gated else ():
            if getattr(self, name) not in values:
                raise ValueError(f"{name} must be {values[0]!r} with gated=True, got {getattr(self, name)!r}")

    @property
    def takes_level(self) -> bool:
        return self.time_input == "additive" or (self.time_input is None and self.source == "uniform")

    def traits(self, model) -> FlowTraits:
        """What ``model.config.flow`` will say; a gated adapter leaves that alone, so it is what no entry means."""
        excluded = () if self.gated else tuple(ids_without_text(model))
        return FlowTraits(self.source, self.shift, excluded, self.block_sizes)

    def path(self, model) -> MixturePath:
        """The path, for the vocabulary of ``model``."""
        mask_id = find_mask_token(model, self.mask_token_id) if self.source == "mask" else None
        source = self.traits(model).make_source(model.config.vocab_size, mask_id)
        return MixturePath(source, named_scheduler(self.scheduler, source))

    def for_tuning(self, kind: str) -> "FlowObjective":
        if kind == "lora":
            raise ValueError(f"lora keeps no config.flow, which {type(self).__name__} writes for decoders to read")
        return replace(self, gated=True) if kind == "gated" else self

    def prepare(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        if self.source == "mask":
            initialise_mask_token(model, choose_mask_token(model, tokenizer, self.mask_token_id))
        if self.takes_level:
            add_noise_level_rows(model)

    def record(self, model: PreTrainedModel) -> None:
        traits, settings = self.traits(model), model.generation_config
        settings.trained_block_sizes = None if traits.block_sizes is None else list(traits.block_sizes)
        if not self.gated:
            model.config.flow = traits.as_dict()
            settings.suppress_tokens = list(traits.excluded) or None

    def rows_per_token(self) -> RowsPerToken:
        asked = FREE[self.given]
        if self.source == "mask":  # of the tokens that may be noise, those that are
            times = LAST_TIME * (torch.arange(1000) + 0.5) / 1000
            scheduler = named_scheduler(self.scheduler, FlowTraits().make_source(2, 1))
            asked *= 1 - float(scheduler.kappa(times).mean())
        if self.block_sizes is None:
            return RowsPerToken(1, 0, asked)
        return RowsPerToken(1, 1, asked) if self.gated else RowsPerToken(2, 0, asked + bool(self.ntp_weight))

    def __call__(self, model: PreTrainedModel, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor | int]]:
        tokens = batch["input_ids"]
        packing = Packing.from_document_ids(batch["document_ids"])
        loss_mask = find_loss_mask(batch, packing)
        blocks, path = self._blocks(packing, loss_mask), self.path(model)
        noisy = self._noise(tokens, packing, loss_mask, blocks, path)
        states, clean = self._run(model, packing, blocks, noisy, path)

        losses = self._losses(model, states, noisy, path)
        # Masked tokens alone are asked, but the bound is on all that may be noise.
        targets = noisy.free if self.loss == "generalised_kl" else noisy.asked
        total, count = losses.sum(), int(targets.sum())
        metrics = {"flow_loss": total.detach() / count}
        if clean is not None and self.ntp_weight and not self.gated:
            ntp = next_token_losses(model, clean, tokens, packing, loss_mask)
            metrics["ntp_loss"] = ntp.detach().mean()
            total, count = total + self.ntp_weight * ntp.sum(), count + ntp.numel()
        metrics["num_targets"] = count
        return total / max(1, count), metrics

    def _blocks(self, packing: Packing, loss_mask: Tensor) -> BlockGrid | None:
        if self.block_sizes is None:
            return None
        return BlockGrid.from_packing(packing, loss_mask, draw_block_size(self.block_sizes), self.phase)

    def _noise(self, tokens, packing: Packing, loss_mask: Tensor, blocks: BlockGrid | None, path) -> NoisyBatch:
        """Draw times, what is given, and X_t."""
        draws = BatchDraws(torch.default_generator)
        free = loss_mask & (packing.index > self._start(packing))
        if self.given != "none":
            free = free & ~GIVEN[self.given](~packing.is_padding, draws)
        times = stratified_times(len(tokens), torch.default_generator, 1.0)[:, None].to(tokens.device)
        unit = self._start(packing) if blocks is None else blocks.start
        if blocks is None or self.time_scope == "block":
            # The units of a row are strata of their own: the row's time, moved around the circle for all but the first.
            own = torch.rand(tokens.shape, dtype=torch.float64).to(tokens.device).gather(1, unit)
            times = (times + own - own[:, :1]) % 1
        times = LAST_TIME * times.expand(tokens.shape)
        noised = path.sample(path.source.sample(tokens, draws), tokens, times, draws)
        noisy = torch.where(free, noised.tokens, tokens)
        asked = free & noised.hidden if self.source == "mask" else free
        return NoisyBatch(tokens, noisy, free, asked, times)

    def _start(self, packing: Packing) -> Tensor:
        """Where the text of each token starts, [B, L]."""
        whole_row = self.block_sizes is None and self.span == "row"
        return torch.where(packing.is_padding, packing.index, 0) if whole_row else packing.start

    def _run(self, model, packing: Packing, blocks: BlockGrid | None, noisy: NoisyBatch, path, levels=None):
        """Hidden states [B, L, D] that predict each token, and those of the clean copy, None for whole texts.

        levels: [B, L], what a model is told that takes levels, if not the time alone.
        """
        if levels is None:
            levels = noise_levels(path.scheduler.kappa(noisy.time), ~noisy.free)
        if blocks is None:
            clean, states = None, self._run_whole_text(model, packing, noisy.noisy, levels)
        else:
            clean, states = run_copies(
                model, noisy.clean, [noisy.noisy], packing, [blocks], frozen_clean=self.gated, levels=levels
            )
        if self.shift:
            states = states.roll(1, dims=1)
            if blocks is not None:
                opens = (packing.index == blocks.start)[..., None]
                states = torch.where(opens, clean.roll(1, dims=1), states)
        return states, clean

    def _run_whole_text(self, model, packing: Packing, tokens: Tensor, levels: Tensor) -> Tensor:
        """Hidden states [B, L, D] of rows that see their whole text in both directions."""
        start, nothing = self._start(packing), torch.zeros_like(packing.index)
        end, position = packing.end, packing.position
        if self.span == "row":
            count = (~packing.is_padding).sum(-1, keepdim=True)
            end, position = torch.where(packing.is_padding, packing.index + 1, count), packing.index
        visibility = Visibility(nothing, nothing, start, end, packing.index)
        embeddings = with_noise_level(model, tokens, levels)
        return run_trunk(model, tokens, position, visibility, tokens.shape[1], embeddings=embeddings)

    def _losses(self, model, states: Tensor, noisy: NoisyBatch, path: MixturePath) -> Tensor:
        """Losses [N] of the tokens that are asked for."""
        head, never = model.get_output_embeddings(), list(self.traits(model).excluded)
        if path.source.mask_id is not None:
            never.append(path.source.mask_id)

        def losses(states: Tensor, clean: Tensor, shown: Tensor, time: Tensor) -> Tensor:
            logits = head(states).float()
            logits[:, never] = -torch.inf
            if self.loss == "cross_entropy":
                return cross_entropy(logits, clean, reduction="none")
            return generalised_kl(logits[:, None], shown[:, None], clean[:, None], time, path)[:, 0]

        rows = (part[noisy.asked] for part in (states, noisy.clean, noisy.noisy, noisy.time))
        return in_chunks(losses, model.config.vocab_size, *rows)
