"""The mask token: where a model keeps its id."""

from pathlib import Path

from transformers import PreTrainedModel

from decoding.inputs.checks import check_count
from decoding.inputs.source import ADAPTER_FILE


def find_mask_token(model: PreTrainedModel, override: int | None = None) -> int:
    """The id of the mask token: ``override``, else ``mask_token_id`` of the model's generation config, else of its config.

    Raises ValueError if there is none or if it has no row in the embedding matrix.
    """
    mask_id = override
    for config in (model.generation_config, model.config):
        if mask_id is None:
            mask_id = getattr(config, "mask_token_id", None)
    folder = model.name_or_path
    if mask_id is None and folder and (Path(folder) / ADAPTER_FILE).is_file():
        raise ValueError(
            f"mask_token_id: beside this model lies a gated adapter that brings one; load both with "
            f"decoding.load_model({folder!r})"
        )
    if mask_id is None:
        raise ValueError(
            "mask_token_id: this model has no mask token; set model.generation_config.mask_token_id to a token that its "
            "text never uses, or fine-tune it with the set-block objective, which sets it"
        )
    check_count("mask_token_id", mask_id, 0, model.config.vocab_size - 1)
    return mask_id


def has_mask_token(model: PreTrainedModel) -> bool:
    """Whether the model's configurations name one; :func:`find_mask_token` says whether it can be one."""
    return any(getattr(config, "mask_token_id", None) is not None for config in (model.generation_config, model.config))
