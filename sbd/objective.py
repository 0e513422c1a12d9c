"""The Set Block Decoding objective: next-token prediction plus masked prediction inside blocks.

Source: arXiv 2509.04185, equation 14 and figures 7 and 9. One forward runs a clean causal copy of the text and masked
copies whose rows see the clean tokens before their block and the whole of their own masked block.
"""

from dataclasses import dataclass, replace
from statistics import mean
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from decoding.forward.mask_token import find_mask_token
from decoding.inputs.checks import check_choice, check_count, check_range
from decoding.training.blocks import BlockGrid, check_block_sizes, draw_block_size
from decoding.training.copies import run_copies
from decoding.training.divergence import DIVERGENCES, Divergence, draft_losses
from decoding.training.new_mask_token import choose_mask_token, initialise_mask_token
from decoding.training.objective import Objective, RowsPerToken
from decoding.training.packed import Packing, find_loss_mask, in_chunks, next_token_losses, row_losses
from sbd.chains import POSITION_WEIGHTS, PositionWeights, dpace_weights, expected_tau, exponential_weights
from sbd.selector import attach_selector, draft_selector


class MaskedCopy(NamedTuple):
    """A copy of the text in which tokens are masked, [B, L] bool, in the blocks of a grid of its own."""

    blocks: BlockGrid
    masked: Tensor


@dataclass(frozen=True)
class SetBlockObjective(Objective):
    """Loss in nats: next-token cross-entropy of the clean rows plus cross-entropy of the masked tokens of the blocks.

    The loss is the sum of both parts divided by the number of all targets (equation 14; no weight for the rate).

    block_sizes: one is drawn for each call; must hold every size used for decoding. The paper draws 2..16.
    eta_scope: the masking rate is uniform on (0, 1), one draw per "sequence" (paper) or per "block".
    all_mask_share: share of blocks that are masked whole, the state in which drafting starts.
    mask_ramp: r in [0, 1): a token at offset j of a block of k is masked if U < eta^(1 - r j / (k - 1)), so later
        tokens are masked more often, as they are while decoding.
    phase: where the grid of blocks starts: "document" (paper), "random" offset, or "response": anew at each change
        between prompt and target tokens, because decoding opens a block right after the prompt.
    complement: add a second masked copy with the other tokens masked, so that each token is a target once (3 L rows).
    ntp_weight, matp_weight: weights of the two parts (1, 1).
    distill: weight of the divergence of the masked distribution q of a token from the model's own next-token
        distribution p of it (detached), by which drafts are verified.
    divergence: "kl", KL(p || q); "tv", 1 - alpha, with alpha the chance that a draft is accepted; "nla", -log alpha; or
        "hybrid" (LK, arXiv 2602.23881), KL where alpha is small and TV where it is not.
    position_weights: of the tokens of a block: "uniform"; "exponential", exp(-(j - 1) / gamma) of draft j; or "dpace"
        (arXiv 2605.18810), what draft j means for the accepted length. Their mean is 1. Drafts begin at the second token
        of a block: but for "uniform" the first, which verification decides, has none.
    gamma: of the exponential weights.
    copies: masked copies for each clean one, each with blocks of a phase of its own; they share the clean rows.
    curriculum: share of the steps over which block sizes grow from the smallest of ``block_sizes`` to the largest, which
        is the only one from then on; 0 draws from all of them all the time.
    selector: rank of a draft selector (:mod:`sbd.selector`) that is trained with the rest; 0 for none. One that the model
        has already is trained on.
    gated: what is trained acts on mask rows only, so the clean rows are constants: they run without gradient, and the
        next-token loss, which nothing can change, is left out.
    mask_token_id: by default the one that the model's generation config names.

    Metrics: ``ntp_loss``, ``matp_loss`` and, with ``distill``, ``distill_loss``, ``acceptance``, the mean of alpha, and
    ``expected_tau``, tokens of a draft-verify cycle (:func:`sbd.chains.expected_tau`).
    """

    tags = ("set-block-decoding",)

    block_sizes: tuple[int, ...] = tuple(range(2, 17))
    eta_scope: Literal["sequence", "block"] = "sequence"
    all_mask_share: float = 0.0
    mask_ramp: float = 0.0
    phase: Literal["document", "random", "response"] = "document"
    complement: bool = False
    ntp_weight: float = 1.0
    matp_weight: float = 1.0
    distill: float = 0.0
    divergence: Divergence = "kl"
    position_weights: PositionWeights = "uniform"
    gamma: float = 5.0
    copies: int = 1
    curriculum: float = 0.0
    selector: int = 0
    gated: bool = False
    mask_token_id: int | None = None

    def __post_init__(self):
        object.__setattr__(self, "block_sizes", check_block_sizes(self.block_sizes))
        check_choice("eta_scope", self.eta_scope, ("sequence", "block"))
        check_choice("phase", self.phase, ("document", "random", "response"))
        check_choice("divergence", self.divergence, DIVERGENCES)
        check_choice("position_weights", self.position_weights, POSITION_WEIGHTS)
        check_range("gamma", self.gamma, 0, include_low=False)
        check_count("copies", self.copies)
        check_range("curriculum", self.curriculum, 0, 1)
        check_count("selector", self.selector, 0)
        check_range("all_mask_share", self.all_mask_share, 0, 1)
        check_range("mask_ramp", self.mask_ramp, 0, 1, include_high=False)
        for name in ("ntp_weight", "matp_weight", "distill"):
            check_range(name, getattr(self, name), 0)
        if not self.distill:
            for name in ("divergence", "position_weights"):
                if getattr(self, name) not in ("kl", "uniform", "exponential"):
                    raise ValueError(f"{name} {getattr(self, name)!r} needs distill above 0")
        if self.gated and self.ntp_weight != 1:
            raise ValueError(f"ntp_weight has no meaning with gated=True, got {self.ntp_weight!r}; leave it out")

    def for_tuning(self, kind: str) -> "SetBlockObjective":
        if kind == "selector" and not self.selector:
            raise ValueError("selector needs the rank of one, objective_options.selector")
        return replace(self, gated=True) if kind in ("gated", "selector") else self

    def at(self, progress: float) -> "SetBlockObjective":
        if not self.curriculum:
            return self
        sizes = sorted(self.block_sizes)
        reached = min(len(sizes) - 1, int(progress / self.curriculum * len(sizes)))
        return replace(self, block_sizes=(sizes[reached],), curriculum=0.0)

    def prepare(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        initialise_mask_token(model, choose_mask_token(model, tokenizer, self.mask_token_id))
        selector = draft_selector(model)
        if selector is None and self.selector:
            attach_selector(model, self.selector)
        elif selector is not None:
            if self.selector not in (0, selector.rank):
                raise ValueError(
                    f"selector must be 0 or {selector.rank}, the rank of the one that the model has, got {self.selector}"
                )
            selector.requires_grad_(True)

    def added_parameters(self, model: PreTrainedModel) -> list[nn.Parameter]:
        selector = draft_selector(model)
        return [] if selector is None else list(selector.parameters())

    def added_token_ids(self, model: PreTrainedModel) -> list[int]:
        return [find_mask_token(model, self.mask_token_id)]

    def record(self, model: PreTrainedModel) -> None:
        model.generation_config.trained_block_sizes = list(self.block_sizes)  # type: ignore[attr-defined]

    def rows_per_token(self) -> RowsPerToken:
        each, masked = 2 if self.complement else 1, 1.0
        if not self.complement:
            rates = (mean(1 / (2 - self.mask_ramp * j / max(1, k - 1)) for j in range(k)) for k in self.block_sizes)
            masked = self.all_mask_share + (1 - self.all_mask_share) * mean(rates)
        rows, masked = self.copies * each, self.copies * masked
        taught = masked if self.distill else 0.0
        return RowsPerToken(rows, 1, masked, taught) if self.gated else RowsPerToken(1 + rows, 0, 1 + masked, taught)

    def __call__(self, model: PreTrainedModel, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor | int]]:
        tokens = batch["input_ids"]
        packing = Packing.from_document_ids(batch["document_ids"])
        loss_mask = find_loss_mask(batch, packing)
        copies = [copy for _ in range(self.copies) for copy in self._draw_copies(packing, loss_mask)]

        mask_id = find_mask_token(model, self.mask_token_id)
        noisy = [tokens.masked_fill(copy.masked, mask_id) for copy in copies]
        grids = [copy.blocks for copy in copies]
        clean, *noisy = run_copies(model, tokens, noisy, packing, grids, frozen_clean=self.gated)

        ntp = next_token_losses(model, clean, tokens, packing, loss_mask & (not self.gated))
        matp, weights, found = self._masked_losses(model, tokens, clean, noisy, copies, packing)
        count = max(1, ntp.numel() + matp.numel())
        loss = (self.ntp_weight * ntp.sum() + self.matp_weight * (weights * matp).sum()) / count
        metrics: dict[str, Tensor | int] = {"matp_loss": matp.detach().mean(), "num_targets": count}
        if not self.gated:
            metrics["ntp_loss"] = ntp.detach().mean()
        if found is not None:
            divergence, learned, alpha, tau = found
            loss = loss + self.distill * (weights * divergence)[learned].sum() / count
            metrics["distill_loss"] = divergence.detach()[learned].mean()
            metrics["acceptance"] = alpha[learned].mean()
            if tau is not None:
                metrics["expected_tau"] = tau
        return loss, metrics

    def draw_masks(self, blocks: BlockGrid) -> Tensor:
        """[B, L] bool: which tokens of the masked copy are replaced by the mask token."""
        shape, device = blocks.start.shape, blocks.start.device
        per_block = torch.rand(shape, device=device).gather(1, blocks.start)
        eta = per_block if self.eta_scope == "block" else torch.rand((shape[0], 1), device=device).expand(shape)
        offset = torch.arange(shape[1], device=device) - blocks.start
        rate = eta ** (1 - self.mask_ramp * offset / max(1, blocks.size - 1))
        whole = torch.rand(shape, device=device).gather(1, blocks.start) < self.all_mask_share
        return whole | (torch.rand(shape, device=device) < rate)

    def _draw_copies(self, packing: Packing, loss_mask: Tensor) -> list[MaskedCopy]:
        """A masked copy in fresh blocks, and with ``complement`` the one of the other tokens."""
        blocks = BlockGrid.from_packing(packing, loss_mask, draw_block_size(self.block_sizes), self.phase)
        masked = self.draw_masks(blocks) & loss_mask
        found = [MaskedCopy(blocks, masked)]
        return [*found, MaskedCopy(blocks, ~masked & loss_mask)] if self.complement else found

    def _masked_losses(self, model, tokens, clean, noisy, copies: list[MaskedCopy], packing: Packing):
        """Of the N targets of all copies: cross-entropies in nats [N], weights [N], and what ``distill`` finds.

        That is divergences [N], which of them are learned [N], since a document's first token has no next-token
        distribution, alpha [N], and the expected tau.
        """
        targets = [copy.masked & self._is_weighed(copy.blocks) for copy in copies]
        masked = torch.cat([half[chosen] for half, chosen in zip(noisy, targets, strict=True)])
        selector, previous = draft_selector(model), tokens.roll(1, dims=1)
        if selector is not None:
            before = torch.cat([previous[chosen] for chosen in targets])
            masked = selector(masked, model.get_input_embeddings()(before).detach())
        labels = torch.cat([tokens[chosen] for chosen in targets])
        if not self.distill:
            return row_losses(model, masked, labels), self._weights(copies, targets), None
        head, teacher = model.get_output_embeddings(), clean.detach().roll(1, dims=1)

        def losses(masked: Tensor, labels: Tensor, teacher: Tensor) -> Tensor:
            with torch.no_grad():
                p = head(teacher).float()
            return draft_losses(head(masked).float(), p, labels, self.divergence)

        teacher = torch.cat([teacher[chosen] for chosen in targets])
        matp, divergence, alpha = in_chunks(losses, model.config.vocab_size, masked, labels, teacher).unbind(1)
        alpha = alpha.detach()
        grids, first = [], 0
        for chosen in targets:
            count = int(chosen.sum())
            grids.append(alpha.new_ones(chosen.shape).masked_scatter(chosen, alpha[first : first + count]))
            first += count
        sums = [expected_tau(copy.blocks, grid, copy.masked) for copy, grid in zip(copies, grids, strict=True)]
        whole = sum(int(count) for _, count in sums)
        tau = sum(total for total, _ in sums) / whole if whole else None
        learned = torch.cat([packing.position[chosen] > 0 for chosen in targets])
        return matp, self._weights(copies, targets, grids), (divergence, learned, alpha, tau)

    def _is_weighed(self, blocks: BlockGrid) -> Tensor:
        """[B, L] bool: what has a weight above 0."""
        index = torch.arange(blocks.start.shape[1], device=blocks.start.device)
        return (blocks.start < index) | (self.position_weights == "uniform")

    def _weights(self, copies: list[MaskedCopy], targets: list[Tensor], alpha: list[Tensor] | None = None) -> Any:
        """Weights [N] of the targets, of mean 1; ``alpha`` [B, L] of each copy."""
        if self.position_weights == "uniform":
            return 1.0
        if self.position_weights == "exponential":
            weights = [exponential_weights(copy.blocks, self.gamma) for copy in copies]
        else:
            assert alpha is not None
            weights = [dpace_weights(copy.blocks, grid) for copy, grid in zip(copies, alpha, strict=True)]
        found = torch.cat([grid[chosen] for grid, chosen in zip(weights, targets, strict=True)])
        return found / found.mean().clamp_min(1e-6)
