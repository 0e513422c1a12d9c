"""Run the trunk of a stock transformers model under a Visibility, in the form its attention takes."""

from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from decoding.forward import tiles
from decoding.forward.visibility import Visibility

MASK_FORMS = ("sdpa", tiles.NAME, "eager", "flex_attention")
LAYER_TYPES = ("full_attention", "sliding_attention")


def run_trunk(
    model: PreTrainedModel,
    tokens: Tensor,
    positions: Tensor,
    visibility: Visibility,
    num_slots: int,
    cache: Cache | None = None,
    embeddings: Tensor | None = None,
    trunk: nn.Module | None = None,
) -> Tensor:
    """Hidden states [B, R, D] after the last norm, without the language-model head.

    tokens, positions: [B, R] integers. ``num_slots`` is the number of key slots that attention sees; without a cache
    they are the rows themselves, with one they are its slots. ``embeddings`` [B, R, D] take the place of those of the
    tokens, for models that are told more than a token. ``trunk`` is that of ``model``, if it is known: it takes long to find.
    """
    output = (model.get_decoder() if trunk is None else trunk)(
        input_ids=tokens if embeddings is None else None,
        inputs_embeds=embeddings,
        position_ids=positions,
        attention_mask=attention_masks(model, visibility, num_slots),
        past_key_values=cache,
        use_cache=cache is not None,
    )
    return output.last_hidden_state


def attention_masks(model: PreTrainedModel, visibility: Visibility, num_slots: int):
    """The mask argument of the model's trunk: one mask, or one for each layer type of its configuration."""
    config = model.config
    window = getattr(config, "sliding_window", None)
    layer_types = getattr(config, "layer_types", None)
    if layer_types is None:
        return _mask(model, visibility.within_window(window), num_slots)
    windows = dict(zip(LAYER_TYPES, (None, window), strict=True))
    return {kind: _mask(model, visibility.within_window(windows[kind]), num_slots) for kind in set(layer_types)}


def _mask(model: PreTrainedModel, visibility: Visibility, num_slots: int):
    form = model.config._attn_implementation
    if form in ("sdpa", tiles.NAME):
        return visibility.as_bool(num_slots)
    if form == "eager":
        return visibility.as_float(num_slots, model.dtype)
    if form == "flex_attention":
        return visibility.as_block_mask(num_slots)
    raise ValueError(
        f"attn_implementation={form!r} cannot take the masks of set-block decoding; "
        f"load the model with one of {', '.join(map(repr, MASK_FORMS))}"
    )
