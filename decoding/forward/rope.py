"""How far a model's rotary positions reach, and where their frequencies depend on the length of the text."""

from transformers import PretrainedConfig, PreTrainedModel

SCALED = ("linear", "dynamic", "yarn", "longrope", "proportional")  # types whose factor lengthens the context
LENGTH_DEPENDENT = ("dynamic", "longrope")  # types that compute with other frequencies once a text is long


def context_length(config: PretrainedConfig) -> int | None:
    """How many positions the model can use, its rope scaling counted in; None if it does not say.

    >>> from transformers import LlamaConfig
    >>> rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
    >>> context_length(LlamaConfig(max_position_embeddings=64, rope_parameters=rope))
    256
    """
    config = config.get_text_config()
    longest = getattr(config, "max_position_embeddings", None)
    if longest is None:
        return None
    for rope in _ropes(config):
        if rope.get("rope_type") in SCALED and rope.get("factor"):
            original = rope.get("original_max_position_embeddings") or longest
            longest = max(longest, int(original * rope["factor"]))
    return longest


def steady_length(config: PretrainedConfig) -> int | None:
    """How many positions a rope whose frequencies depend on the length computes alike; None if all of them.

    >>> from transformers import LlamaConfig
    >>> rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    >>> steady_length(LlamaConfig(max_position_embeddings=64, rope_parameters=rope))
    64
    """
    config = config.get_text_config()
    lengths = [
        rope.get("original_max_position_embeddings")
        or getattr(config, "original_max_position_embeddings", None)
        or config.max_position_embeddings
        for rope in _ropes(config)
        if rope.get("rope_type") in LENGTH_DEPENDENT
    ]
    return min(lengths, default=None)


def check_reach(model: PreTrainedModel, last_position: int) -> None:
    """Raise ValueError if rows up to ``last_position`` change the frequencies of a rope that depends on the length.

    Such a model computes all rows of a forward with the frequencies of its last one, so rows that draft ahead would
    change those that verify; and ``generate`` computes the text anew where it crosses the boundary.
    """
    boundary = steady_length(model.config)
    if boundary is not None and last_position >= boundary:
        kinds = {str(rope.get("rope_type")) for rope in _ropes(model.config.get_text_config())} & {*LENGTH_DEPENDENT}
        raise ValueError(
            f"rope_type={min(kinds)!r} computes with other frequencies from position {boundary} on, and this run may reach "
            f"position {last_position}; lower max_new_tokens, shorten the prompt, or use model.generate by itself"
        )


def _ropes(config: PretrainedConfig) -> list[dict]:
    """The rope parameters of the model: one set, or one for each layer type."""
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    return nested or [parameters]
