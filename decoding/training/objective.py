"""What an objective is: a loss, and what it asks of a model, its tokenizer and its folder besides."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Literal, NamedTuple

from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from decoding.forward.beside import saved_beside


class RowsPerToken(NamedTuple):
    """What a training step runs, in rows for each token of text, if all tokens are to be learned.

    trained: rows with a gradient. constant: rows without one, such as the clean copy beside a gated adapter. labelled:
    rows that meet the head for a loss. taught: rows that meet it once more, without gradient, to teach others.
    """

    trained: float = 1.0
    constant: float = 0.0
    labelled: float = 1.0
    taught: float = 0.0


class Objective(ABC):
    """A way to train. Objectives are frozen dataclasses whose fields are the options of a recipe.

    Only the loss must be written; each other method is for what it says. The order of a run: ``for_tuning``,
    ``prepare``, then ``at`` and the loss once a step, ``record``, ``extra_files``.
    """

    tags: ClassVar[Sequence[str]] = ()  # of the model card

    @abstractmethod
    def __call__(self, model: PreTrainedModel, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor | int]]:
        """The loss in nats, with its gradient, and metrics without, for a batch as in :mod:`decoding.training.packed`.

        ``metrics["num_targets"]`` is the number of targets that the loss is the mean of; the others are means for logs.
        """

    def for_tuning(self, kind: Literal["full", "lora", "gated", "selector"]) -> "Objective":
        """This objective for a model of which all weights are trained, low-rank terms on all or on mask rows, or a selector.

        Raises ValueError if it cannot train that.
        """
        if kind in ("gated", "selector"):
            raise ValueError(f"{kind} trains mask rows alone, which {type(self).__name__} cannot")
        return self

    def at(self, progress: float) -> "Objective":
        """This objective at ``progress`` of a run, from 0 to 1, for what changes while training."""
        return self

    def prepare(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """Before training, with the weights loaded, before LoRA and the optimizer: set a mask token, add modules."""

    def added_parameters(self, model: PreTrainedModel) -> list[nn.Parameter]:
        """Parameters that ``prepare`` added, to be trained even where the model's own are frozen."""
        return []

    def added_token_ids(self, model: PreTrainedModel) -> list[int]:
        """Rows of the embedding table that ``prepare`` gave a meaning, to be trained even where others are frozen."""
        return []

    def record(self, model: PreTrainedModel) -> None:
        """After training, before the model is saved: write into its configurations what decoders must know."""

    def extra_files(self, model: PreTrainedModel, weights: dict[str, Tensor]) -> dict[str, bytes]:
        """Files beside the saved model, by name; what they hold is taken out of ``weights``, the model's state.

        By default those of all modules on the model that have files of their own, whether or not they were trained.
        """
        files: dict[str, bytes] = {}
        for name, module in saved_beside(model).items():
            if any(key.startswith(f"{name}.") for key in weights):
                files |= module.extra_files(model, weights)
        return files

    def rows_per_token(self) -> RowsPerToken:
        """What a step costs, for estimates."""
        return RowsPerToken()
