"""Next-token prediction on packed rows: the baseline objective, on the same batches as the methods'."""

from dataclasses import dataclass

from torch import Tensor

from decoding.forward.attention import run_trunk
from decoding.forward.visibility import Visibility
from decoding.training.packed import Packing, find_loss_mask, next_token_rows, row_losses


@dataclass(frozen=True)
class NextTokenObjective:
    """Mean next-token cross-entropy in nats over the tokens to be learned.

    Called as ``objective(model, batch) -> (loss, metrics)`` with a batch as in :mod:`decoding.training.packed`.
    """

    def __call__(self, model, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        tokens = batch["input_ids"]
        packing = Packing.from_document_ids(batch["document_ids"])
        visibility = Visibility.causal(packing.index, packing.start)
        hidden = run_trunk(model, tokens, packing.position, visibility, num_slots=tokens.shape[1])
        rows = next_token_rows(packing, find_loss_mask(batch, packing))
        losses = row_losses(model, hidden[rows], tokens.roll(-1, dims=1)[rows])
        loss = losses.sum() / max(1, losses.numel())  # a batch may hold prompts only
        return loss, {"ntp_loss": loss.detach(), "num_targets": losses.numel()}
