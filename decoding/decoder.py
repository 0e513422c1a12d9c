"""What a decoder is: two functions around a forward pass."""

from abc import ABC, abstractmethod
from typing import ClassVar

from transformers import PreTrainedModel

from decoding.batch import Batch
from decoding.forward.model import RowLogits
from decoding.forward.rows import RowList
from decoding.kept_arguments import keep_arguments_for
from decoding.sampling import TokenLaw


class Decoder(ABC):
    """Base of all decoders, which are frozen dataclasses: printable, comparable and hashable.

    A decoder holds settings only; everything that changes lives in the batch. It is itself what ``model.generate`` takes
    as ``custom_generate``.
    """

    needs_mask_token: ClassVar[bool] = False
    gives_logprobs: ClassVar[bool] = False  # of the next-token law, which it has to compute anyway

    prefills: ClassVar[bool] = True  # whether the prompt is run causally, a long one in pieces before the first plan
    most_rows: ClassVar[int | None] = None  # if set: the batch gets the cost of forwards up to that many rows

    def check(self, model: PreTrainedModel, law: TokenLaw) -> None:
        """Raise ValueError, or warn, if the model or the settings of ``generate`` do not go with this decoder."""

    def begin(self, batch: Batch) -> None:
        """Set up what the decoder remembers during a run."""

    @abstractmethod
    def plan(self, batch: Batch) -> list[RowList]:
        """The rows of the next forward: a RowList for each sequence of ``batch.unfinished``. Runs no model."""

    @abstractmethod
    def absorb(self, batch: Batch, logits: RowLogits) -> None:
        """Decide tokens from the forward's logits and commit them. Runs no model beyond its head.

        ``logits`` are indexed by the place of a sequence in ``batch.unfinished`` and of a row in its RowList.
        """

    def preview(self, batch: Batch) -> list[int] | None:
        """Ids of the undecided end of the first sequence, the mask token where nothing is decided, for a live view."""
        return None

    def __call__(self, model, input_ids, *, output_logprobs=False, **prepared):
        """The form in which ``model.generate(..., custom_generate=decoder)`` calls us, everything prepared.

        output_logprobs: return the next-token log-probabilities of the new tokens; an argument of our own, which
        ``generate`` passes on because it is named here.
        """
        from decoding.generate import generate

        return generate(self, model, input_ids, output_logprobs=output_logprobs, **prepared)


# Here, so that it holds for every decoder, however it was imported.
keep_arguments_for(Decoder)
