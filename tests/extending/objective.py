"""An objective of one's own: next-token prediction with label smoothing."""

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from decoding import Objective, Visibility
from decoding.forward.attention import run_trunk
from decoding.inputs.checks import check_range
from decoding.training.packed import Packing, find_loss_mask, next_token_rows


@dataclass(frozen=True)
class Smoothed(Objective):
    """Mean cross-entropy in nats against labels of which a share ``smoothing`` is spread over the vocabulary."""

    smoothing: float = 0.1

    def __post_init__(self):
        check_range("smoothing", self.smoothing, 0, 1)

    def __call__(self, model: PreTrainedModel, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor | int]]:
        tokens = batch["input_ids"]
        packing = Packing.from_document_ids(batch["document_ids"])
        rows = next_token_rows(packing, find_loss_mask(batch, packing))
        visibility = Visibility.causal(packing.index, packing.start)
        hidden = run_trunk(model, tokens, packing.position, visibility, tokens.shape[1])[rows]
        logits, labels = model.get_output_embeddings()(hidden).float(), tokens.roll(-1, dims=1)[rows]
        loss = cross_entropy(logits, labels, label_smoothing=self.smoothing)
        return loss, {"num_targets": len(labels), "ntp_loss": cross_entropy(logits.detach(), labels)}
