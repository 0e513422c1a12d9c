"""The training loss of Resample-Previous-Tokens: cross-entropy on texts with some windows reordered.

Source: arXiv 2506.06215. Attention stays causal over slots; what differs from next-token training is the order of a few
tokens and the offset code of the rows around them. In the layout "branches", which is ours, nothing is reordered.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from decoding.forward.attention import run_trunk
from decoding.forward.gating import marked_offsets
from decoding.forward.visibility import Visibility
from decoding.training.objective import Objective, RowsPerToken
from decoding.training.packed import Packing, find_loss_mask, next_token_rows, row_losses
from rpt.branches import Branches
from rpt.config import ResampleConfig
from rpt.offset_code import OffsetCode, attach_offset_code
from rpt.permutation import Reordered, WindowPermuter


@dataclass(frozen=True)
class ResampleObjective(ResampleConfig, Objective):
    """Mean cross-entropy in nats of all rows whose target is to be learned, each row weighing the same.

    The fields are those of ResampleConfig. The model needs the offset code that ``prepare`` gives it.

    Metrics: ``ntp_loss`` of rows with offset 1, ``ptp_loss`` of those that predict a previous token, ``skip_loss`` of
    those that skip some; absent where the batch has none.
    """

    tags = ("resample-previous-tokens",)

    def prepare(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        """Attach an offset code, unless the model has the one that this objective trains; else a ValueError."""
        own = getattr(model.config, "resample", None)
        if own is None:
            attach_offset_code(model, self)
            return
        code = getattr(model, "offset_code", None)
        if code is None:
            raise ValueError(
                "the model was trained with an offset code and has none here: load it with decoding.load_model"
            )
        code.requires_grad_(True)  # one that was loaded is frozen
        if ResampleConfig(**own).as_dict() != self.as_dict():
            # Other shares are another training of the same rows; the rest changes what rows mean.
            kept = {"sequence_share": None, "window_share": None, "layout": None}
            if own | kept != self.as_dict() | kept:
                raise ValueError(f"the model was trained with {own}; it cannot go on with {self.as_dict()}")
            model.config.resample = self.as_dict()

    def added_parameters(self, model: PreTrainedModel) -> list[nn.Parameter]:
        code = model.offset_code
        assert isinstance(code, OffsetCode)
        return list(code.parameters())

    def rows_per_token(self) -> RowsPerToken:
        if self.layout == "windows":
            return RowsPerToken()
        return RowsPerToken(1 + self.window_share * (self.window - 1), 0, 1 + self.window_share * self.sequence_share)

    def __call__(self, model: PreTrainedModel, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor | int]]:
        packing = Packing.from_document_ids(batch["document_ids"])
        loss_mask = find_loss_mask(batch, packing)
        if self.layout == "branches":
            losses, offset = self.branch_losses(model, batch["input_ids"], packing, loss_mask)
        else:
            order = WindowPermuter(self)(packing, loss_mask)
            losses, offset = self.losses(model, batch["input_ids"], packing, loss_mask, order)
        loss = losses.sum() / max(1, losses.numel())
        metrics: dict[str, Tensor | int] = {"num_targets": losses.numel()}
        for name, rows in (("ntp", offset == 1), ("ptp", offset < 0), ("skip", offset > 1)):
            if rows.any():
                metrics[f"{name}_loss"] = losses.detach()[rows].mean()
        return loss, metrics

    def losses(
        self, model, tokens: Tensor, packing: Packing, loss_mask: Tensor, order: Reordered
    ) -> tuple[Tensor, Tensor]:
        """Cross-entropies in nats [N] of the rows of an order whose target is in ``loss_mask`` [B, L], and their
        offsets [N]."""
        hidden = self.trunk(model, tokens, packing, order)
        target = order.tau.clamp_max(tokens.shape[1] - 1)
        rows = order.has_target & loss_mask.gather(1, target)
        labels = tokens.gather(1, target)[rows]
        return row_losses(model, hidden[rows], labels), order.offset[rows]

    def branch_losses(self, model, tokens: Tensor, packing: Packing, loss_mask: Tensor) -> tuple[Tensor, Tensor]:
        """The same of a plain text and of the branches beside it."""
        branches = Branches.draw(self, packing, loss_mask)
        length, causal = tokens.shape[1], Visibility.causal(packing.index, packing.start)
        with marked_offsets(torch.cat([torch.ones_like(tokens), branches.offset], dim=1)):
            hidden = run_trunk(
                model,
                torch.cat([tokens, tokens.gather(1, branches.token)], dim=1),
                torch.cat([packing.position, branches.position], dim=1),
                causal.beside(branches.visibility),
                length + branches.token.shape[1],
            )
        text, last = hidden[:, :length], hidden[:, length:].unflatten(1, (-1, self.window - 1))[:, :, -1]
        next_rows = next_token_rows(packing, loss_mask)
        rows = torch.cat([text[next_rows], last[branches.is_real]])
        labels = torch.cat([tokens.roll(-1, dims=1)[next_rows], tokens.gather(1, branches.index)[branches.is_real]])
        offset = torch.full_like(labels, 1)
        offset[next_rows.sum() :] = 1 - self.window
        return row_losses(model, rows, labels), offset

    def trunk(self, model, tokens: Tensor, packing: Packing, order: Reordered) -> Tensor:
        """Hidden states [B, L, D] of the rows of an order."""
        index = order.sigma if self.rope_index == "token" else packing.index
        with marked_offsets(order.offset):
            return run_trunk(
                model,
                tokens.gather(1, order.sigma),
                index - packing.start,
                Visibility.causal(packing.index, packing.start),
                tokens.shape[1],
            )
