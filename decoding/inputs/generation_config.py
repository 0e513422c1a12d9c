"""The generation config of a model: fields of the wrong type are named at once, not where a library stumbles over them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import GenerationConfig


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_whole, value))


def _are_texts(value: Any) -> bool:
    return isinstance(value, str) or isinstance(value, list) and all(isinstance(text, str) for text in value)


def _is_decay(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2 and _is_whole(value[0]) and _is_number(value[1])


# What a field must be, for people, and whether it is; None is allowed in all of them.
Kind = tuple[str, Callable[[Any], bool]]
NUMBER: Kind = ("a number", _is_number)
WHOLE: Kind = ("a whole number", _is_whole)
ID: Kind = ("the id of a token", _is_whole)
ID_OR_IDS: Kind = ("the id of a token or a list of them", lambda value: _is_whole(value) or _are_ids(value))
IDS: Kind = ("a list of ids of tokens", _are_ids)
LISTS_OF_IDS: Kind = ("a list of lists of ids", lambda value: isinstance(value, list) and all(map(_are_ids, value)))
SIZES: Kind = ("a list of whole numbers", _are_ids)
FIELDS: dict[str, Kind] = {
    **dict.fromkeys(("temperature", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"), NUMBER),
    **dict.fromkeys(("repetition_penalty", "encoder_repetition_penalty", "length_penalty", "max_time"), NUMBER),
    **dict.fromkeys(("guidance_scale", "penalty_alpha"), NUMBER),
    **dict.fromkeys(("top_k", "max_length", "max_new_tokens", "min_length", "min_new_tokens"), WHOLE),
    **dict.fromkeys(("num_beams", "num_return_sequences", "no_repeat_ngram_size"), WHOLE),
    **dict.fromkeys(("encoder_no_repeat_ngram_size", "prompt_lookup_num_tokens"), WHOLE),
    **dict.fromkeys(("bos_token_id", "pad_token_id", "mask_token_id", "forced_bos_token_id"), ID),
    **dict.fromkeys(("eos_token_id", "forced_eos_token_id"), ID_OR_IDS),
    **dict.fromkeys(("suppress_tokens", "begin_suppress_tokens"), IDS),
    "bad_words_ids": LISTS_OF_IDS,
    "force_words_ids": LISTS_OF_IDS,
    "stop_strings": ("a text or a list of texts", _are_texts),
    "exponential_decay_length_penalty": ("a whole number and a number", _is_decay),
    "trained_block_sizes": SIZES,
    "decoder": ("the spec of a decoder, such as 'ntp'", lambda value: isinstance(value, str)),
}


def check_generation_file(path: Path | None) -> None:
    """Raise ValueError if there is a file that holds no generation config; transformers would go on without one."""
    if path is None:
        return
    try:
        values = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its {path.name} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"its {path.name} must be a mapping of fields to values, got {values!r}")


def check_generation_config(config: GenerationConfig) -> None:
    """Raise ValueError for a field whose value cannot be one."""
    for name, (kind, holds) in FIELDS.items():
        value = getattr(config, name, None)
        if value is not None and not holds(value):
            raise ValueError(f"{name} of its generation config must be {kind}, got {value!r}")
