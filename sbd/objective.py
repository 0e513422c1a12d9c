"""The Set Block Decoding objective: next-token prediction plus masked prediction inside blocks.

Source: arXiv 2509.04185, equation 14 and figures 7 and 9. One forward runs a clean causal copy of the text and a masked
copy whose rows see the clean tokens before their block and the whole of their own masked block.
"""

from dataclasses import dataclass, replace
from statistics import mean
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import kl_div, nll_loss
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from decoding.forward.mask_token import find_mask_token
from decoding.inputs.checks import check_choice, check_range
from decoding.training.blocks import BlockGrid, check_block_sizes, draw_block_size
from decoding.training.copies import run_copies
from decoding.training.new_mask_token import choose_mask_token, initialise_mask_token
from decoding.training.objective import Objective, RowsPerToken
from decoding.training.packed import Packing, find_loss_mask, in_chunks, next_token_losses, row_losses


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
    distill: weight of KL(p || q) from the model's own next-token distribution p (detached) to the masked
        distribution q of the same token, which aims at the acceptance of drafts, 1 - TV(p, q).
    gated: what is trained acts on mask rows only, so the clean rows are constants: they run without gradient, and the
        next-token loss, which nothing can change, is left out.
    mask_token_id: by default the one that the model's generation config names.

    Metrics: ``ntp_loss``, ``matp_loss`` and, with ``distill``, ``distill_kl``.
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
    gated: bool = False
    mask_token_id: int | None = None

    def __post_init__(self):
        object.__setattr__(self, "block_sizes", check_block_sizes(self.block_sizes))
        check_choice("eta_scope", self.eta_scope, ("sequence", "block"))
        check_choice("phase", self.phase, ("document", "random", "response"))
        check_range("all_mask_share", self.all_mask_share, 0, 1)
        check_range("mask_ramp", self.mask_ramp, 0, 1, include_high=False)
        for name in ("ntp_weight", "matp_weight", "distill"):
            check_range(name, getattr(self, name), 0)
        if self.gated and self.ntp_weight != 1:
            raise ValueError(f"ntp_weight has no meaning with gated=True, got {self.ntp_weight!r}; leave it out")

    def for_tuning(self, kind: str) -> "SetBlockObjective":
        return replace(self, gated=True) if kind == "gated" else self

    def prepare(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        initialise_mask_token(model, choose_mask_token(model, tokenizer, self.mask_token_id))

    def added_token_ids(self, model: PreTrainedModel) -> list[int]:
        return [find_mask_token(model, self.mask_token_id)]

    def record(self, model: PreTrainedModel) -> None:
        model.generation_config.trained_block_sizes = list(self.block_sizes)  # type: ignore[attr-defined]

    def rows_per_token(self) -> RowsPerToken:
        copies, masked = 2 if self.complement else 1, 1.0
        if not self.complement:
            rates = (mean(1 / (2 - self.mask_ramp * j / max(1, k - 1)) for j in range(k)) for k in self.block_sizes)
            masked = self.all_mask_share + (1 - self.all_mask_share) * mean(rates)
        taught = masked if self.distill else 0.0
        return (
            RowsPerToken(copies, 1, masked, taught) if self.gated else RowsPerToken(1 + copies, 0, 1 + masked, taught)
        )

    def __call__(self, model: PreTrainedModel, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor | int]]:
        tokens = batch["input_ids"]
        packing = Packing.from_document_ids(batch["document_ids"])
        loss_mask = find_loss_mask(batch, packing)
        blocks = BlockGrid.from_packing(packing, loss_mask, draw_block_size(self.block_sizes), self.phase)
        masked = self.draw_masks(blocks) & loss_mask
        copies = [masked, ~masked & loss_mask] if self.complement else [masked]

        mask_id = find_mask_token(model, self.mask_token_id)
        noisy = [tokens.masked_fill(mask, mask_id) for mask in copies]
        clean, *noisy = run_copies(model, tokens, noisy, packing, blocks, frozen_clean=self.gated)

        ntp = next_token_losses(model, clean, tokens, packing, loss_mask & (not self.gated))
        matp, divergence = self._masked_losses(model, tokens, clean, noisy, copies, packing)
        count = max(1, ntp.numel() + matp.numel())
        loss = (self.ntp_weight * ntp.sum() + self.matp_weight * matp.sum()) / count
        metrics: dict[str, Tensor | int] = {"matp_loss": matp.detach().mean(), "num_targets": count}
        if not self.gated:
            metrics["ntp_loss"] = ntp.detach().mean()
        if self.distill:
            loss = loss + self.distill * divergence.sum() / count
            metrics["distill_kl"] = divergence.detach().mean()
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

    def _masked_losses(self, model, tokens, clean, noisy, copies, packing: Packing) -> tuple[Tensor, Tensor]:
        """Cross-entropies in nats of the masked tokens and, with ``distill``, KL(p || q) of those behind another."""
        masked = torch.cat([half[mask] for half, mask in zip(noisy, copies, strict=True)])
        labels = torch.cat([tokens[mask] for mask in copies])
        if not self.distill:
            return row_losses(model, masked, labels), masked.new_zeros(0)
        head, before = model.get_output_embeddings(), clean.detach().roll(1, dims=1)

        def losses(masked: Tensor, labels: Tensor, before: Tensor) -> Tensor:
            with torch.no_grad():
                teacher = head(before).float().log_softmax(-1)
            student = head(masked).float().log_softmax(-1)
            divergence = kl_div(student, teacher, log_target=True, reduction="none").sum(-1)
            return torch.stack([nll_loss(student, labels, reduction="none"), divergence], dim=1)

        before = torch.cat([before[mask] for mask in copies])
        matp, divergence = in_chunks(losses, model.config.vocab_size, masked, labels, before).unbind(1)
        return matp, divergence[torch.cat([packing.position[mask] > 0 for mask in copies])]
