"""How a model was trained to denoise, as its configuration says: what decoders must do alike."""

import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from transformers import PreTrainedModel

from decoding.forward.noise_level import noise_level_ids
from decoding.inputs.checks import check_choice
from dfm.paths.sources import MaskSource, Source, UniformSource

SOURCES = ("mask", "uniform")


@dataclass(frozen=True)
class FlowTraits:
    """What ``model.config.flow`` holds; the defaults are those of a model with mask rows, as set-block training leaves it.

    source: "mask" or "uniform". shift: row i - 1 predicts token i. excluded: ids that are no text, so never
    drawn and never predicted.
    block_sizes: sizes of the blocks it was trained with; None if on whole texts, seen in both directions.
    transition: it is told where a step leads and a random number for each token, as TransitionObjective trains it.
    """

    source: str = "mask"
    shift: bool = False
    excluded: tuple[int, ...] = ()
    block_sizes: tuple[int, ...] | None = None
    transition: bool = False

    def __post_init__(self):
        check_choice("source", self.source, SOURCES)
        object.__setattr__(self, "excluded", tuple(self.excluded))
        if self.block_sizes is not None:
            object.__setattr__(self, "block_sizes", tuple(self.block_sizes))

    @classmethod
    def of(cls, config: Any) -> "FlowTraits":
        """From a model's configuration."""
        values: Mapping | None = getattr(config, "flow", None)
        return cls() if values is None else cls(**values)

    def as_dict(self) -> dict[str, Any]:
        """The form that ``model.config`` keeps."""
        return asdict(self)

    def make_source(self, vocab_size: int, mask_token_id: int | None) -> Source:
        """The source of noise, for a vocabulary of ``vocab_size``."""
        if self.source == "mask":
            return MaskSource(vocab_size, mask_token_id)
        return UniformSource(vocab_size, self.excluded)


def ids_without_text(model) -> list[int]:
    """Ids that no text holds: mask token, padding (unless it also ends texts), and the rows of the noise level."""
    config = model.generation_config
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    ids = {getattr(config, "mask_token_id", None), config.pad_token_id} - {None, *ends}
    return sorted(ids | set(noise_level_ids(model)))


def check_training(model: PreTrainedModel, path: str, block_size: int | None) -> None:
    """Raise ValueError, or warn, if ``model`` was not trained for a decoder with these settings."""
    traits = FlowTraits.of(model.config)
    if traits.source != path:
        raise ValueError(
            f"path must be {traits.source!r} for this model, which was trained with that source, got {path!r}"
        )
    sizes = traits.block_sizes or getattr(model.generation_config, "trained_block_sizes", None)
    whole = getattr(model.config, "flow", None) is not None and traits.block_sizes is None
    if block_size is None and sizes:
        trained = "with blocks"
    elif block_size is not None and whole:
        trained = "on whole texts, not blocks"
    elif block_size is not None and sizes and block_size not in sizes:
        trained = f"with block sizes {min(sizes)} to {max(sizes)}"
    else:
        return
    warnings.warn(f"block_size={block_size}: this model was trained {trained}; expect worse text", stacklevel=3)
