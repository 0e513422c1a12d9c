"""Next-token prediction on packed rows: the baseline objective, on the same batches as the methods'."""

from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel

from decoding.forward.attention import run_trunk
from decoding.forward.visibility import Visibility
from decoding.training.objective import Objective
from decoding.training.packed import Packing, find_loss_mask, next_token_losses


@dataclass(frozen=True)
class NextTokenObjective(Objective):
    """Mean next-token cross-entropy in nats over the tokens to be learned."""

    def __call__(self, model: PreTrainedModel, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor | int]]:
        tokens = batch["input_ids"]
        packing = Packing.from_document_ids(batch["document_ids"])
        visibility = Visibility.causal(packing.index, packing.start)
        hidden = run_trunk(model, tokens, packing.position, visibility, num_slots=tokens.shape[1])
        losses = next_token_losses(model, hidden, tokens, packing, find_loss_mask(batch, packing))
        loss = losses.sum() / max(1, losses.numel())  # a batch may hold prompts only
        return loss, {"ntp_loss": loss.detach(), "num_targets": losses.numel()}
